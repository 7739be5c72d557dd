"""Running a model without leaving a trace on it: evaluation mode, its context, generation by given settings alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lexigram.errors import LexigramError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) after every step."""


class Stages(Protocol):
    """Told how far a long run is, stage by stage; the command line draws bars from it."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A stage of `total` steps begins; what the context gives is called after every step."""
        ...


class Silent:
    """Stages that nobody looks at."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """See `Stages`."""
        return nullcontext(lambda: None)


def counted(step: Callable[[], None]) -> Progress:
    """Progress for what tells (done, total), from a stage that counts single steps."""
    counter = 0

    def progress(done: int, _total: int) -> None:
        nonlocal counter
        for _ in range(done - counter):
            step()
        counter = done

    return progress


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def plain_generate(
    model: PreTrainedModel, ids: torch.Tensor, settings: GenerationConfig, processors: Sequence[Any] = ()
) -> torch.Tensor:
    """`model.generate` from `ids` (batch, length) by `settings` and `processors`, and nothing else; on the CPU.

    What `settings` leaves unset would be filled from the model's generation settings (a repetition penalty, an
    end-of-sequence token). So these are set aside for the call.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ids = ids.to(model.device)
    published = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with inference(model):
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList(processors),
            ).cpu()
    finally:
        model.generation_config = published


def check_context(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Refuse more tokens in one go than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise LexigramError(
            f"{what} {tokens} is more than the {positions} positions of the model "
            f"({type(model).__name__}, max_position_embeddings); use {what} {positions} or less"
        )
