"""One evaluation as a record: what was measured, of which model on which text, and by which versions.

`lexigram eval --json` writes it, and every row of a comparison holds it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lexigram.calibration.tokens import token_ids
from lexigram.errors import LexigramError
from lexigram.evaluation.perplexity import evaluate
from lexigram.evaluation.sizes import bits_per_weight, stored_bytes
from lexigram.memory import memory_told
from lexigram.records import versions
from lexigram.running import Progress
from lexigram.transformers_io import open_model


@memory_told("free some, or take a smaller --context or --device cpu")
def evaluated(
    model: str,
    texts: Sequence[str],
    content: str,
    *,
    reference: str | None = None,
    context: int = 1024,
    stride: int | None = None,
    windows: int | None = None,
    bos: bool = False,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Open a model, and a reference if there is one, and measure it on a text; plain data, in which a number may be infinite.

    Args:
        model: whatever a command takes as MODEL, compressed or not.
        texts: the names of the texts, for the record.
        content: what is read there.
        reference: a model to measure the distance from.
        context: tokens of a window.
        stride: tokens between windows; None for the context.
        windows: only the first so many; None for all.
        bos: whether every window begins with BOS.
        device: where both models are put.
        dtype: of what is not compressed; ``auto`` for the checkpoint's own.
        progress: is told (windows done, windows in all).

    Returns:
        `model` and `reference` as they were named, the file names of the texts, stored bytes, bits a weight, dtype and device
        of the model, the figures of `Evaluation`, versions and command.

    Raises:
        LexigramError: for a model that cannot be opened, a text that both models do not split into the same tokens, and as
            `evaluate` does.
    """
    opened, tokenizer = open_model(model, device=device, dtype=dtype)
    other = None
    if reference is not None:
        other, its_tokenizer = open_model(reference, device=device, dtype=dtype)
        if not torch.equal(token_ids(tokenizer, content), token_ids(its_tokenizer, content)):
            raise LexigramError(
                f"{model} and {reference} split the text into different tokens, so their predictions cannot be compared; name "
                "the model that was compressed as --reference"
            )
    result = evaluate(
        opened,
        tokenizer,
        content,
        context=context,
        stride=stride,
        windows=windows,
        bos=bos,
        reference=other,
        progress=progress,
    )
    return {
        "model": model,
        "reference": reference,
        "text": ", ".join(Path(name).name for name in texts),
        "model_bytes": stored_bytes(opened),
        "bits_per_weight": bits_per_weight(opened),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "device": str(device),
        **result.model_dump(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
