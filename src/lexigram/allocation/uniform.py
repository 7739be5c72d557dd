"""The same ratio for every layer, as the papers do it."""

from collections.abc import Sequence
from typing import Literal

from lexigram.errors import LexigramError
from lexigram.methods.base import Budget
from lexigram.targets import Target


def uniform(targets: Sequence[Target], ratio: float, accounting: Literal["bytes", "paper"]) -> dict[str, Budget]:
    """Every target keeps ``1 - ratio`` of its bfloat16 bytes, or of its parameters where the accounting is the paper's.

    Raises:
        LexigramError: for a ratio outside of (0, 1).
    """
    if not 0 < ratio < 1:
        raise LexigramError(
            f"ratio {ratio:g} is out of range; it is the share of stored bytes to remove, above 0 and below 1"
        )
    if accounting == "paper":
        return {target.name: Budget(int((1 - ratio) * target.weight_count), "parameters") for target in targets}
    return {target.name: Budget(int((1 - ratio) * target.dense_bytes)) for target in targets}
