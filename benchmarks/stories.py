"""Compressions of stories260K, a model of 260 thousand weights, calibrated on TinyStories and evaluated on a part held out."""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recording import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer

import lexigram
from lexigram import Calibration, Recipe
from lexigram.records import RunRecord

MODEL = DATA / "stories260K"
CONTEXT = 512
TOKENS = 64 * CONTEXT
"""Of the calibration."""


def texts() -> tuple[str, str]:
    """The first nine tenths of TinyStories, and the last."""
    text = (DATA / "tinystories" / "tinystories.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def compressed(
    work: Path, seed: int, held_out: str, *, length: int = CONTEXT, **settings: Any
) -> tuple[RunRecord, dict[str, float]]:
    """The record and the figures of one compression, calibrated on ``work/text.txt``."""
    out = work / f"{len(list(work.iterdir()))}"
    recipe = Recipe(
        model=str(MODEL),
        calibration=Calibration(text=(str(work / "text.txt"),), sequences=TOKENS // length, length=length, seed=seed),
        seed=seed,
        device="cpu",
        compute_dtype="float32",
        **settings,
    )
    start = time.perf_counter()
    record = lexigram.compress(recipe, out)
    return record, {
        "perplexity": perplexity(out, held_out),
        "mean_relative_error": record.mean_relative_error,
        "seconds": time.perf_counter() - start,
    }


def means(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of all figures; of perplexities the geometric one, as their logarithms are what differs alike."""
    found = {key: statistics.fmean(each[key] for each in runs) for key in runs[0]}
    return {**found, "perplexity": math.exp(statistics.fmean(math.log(each["perplexity"]) for each in runs))}


def perplexity(folder: Path, text: str) -> float:
    """Of a model, on a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lexigram.evaluate(model.eval(), tokenizer, text, context=CONTEXT).token_perplexity
