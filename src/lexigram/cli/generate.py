"""`lexigram generate`: a model at work, to see that it still speaks."""

from typing import Annotated

import typer

from lexigram.cli.arguments import AUTO_DTYPE, Device, Dtype, Model
from lexigram.cli.screen import say
from lexigram.devices import resolve_device
from lexigram.evaluation import greedy_sentence
from lexigram.transformers_io import open_model

EXAMPLES = ('lexigram generate smaller "The capital of France is"',)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 32,
    chat: Annotated[bool, typer.Option("--chat", metavar="", help="Ask through the model's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = AUTO_DTYPE,
) -> None:
    """Let MODEL go on from PROMPT, the likeliest token each time."""
    opened, tokenizer = open_model(model, device=resolve_device(device), dtype=dtype.value)
    say(greedy_sentence(opened, tokenizer, prompt, tokens, chat=chat))
