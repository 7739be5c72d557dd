"""The forms at which a unit is measured and offered to an allocation that chooses. Fits nothing and knows no weights."""

import hashlib
from collections.abc import Sequence

from lexigram.errors import LexigramError
from lexigram.factors import GroupSpec
from lexigram.methods import Budget, BudgetTooSmallError, MethodConfig, layout_group
from lexigram.methods.base import useful, variants
from lexigram.targets import Target

MEASURED = (0.1, 0.35, 0.6, 0.8, 0.92)
"""Ratios at which a unit's error is measured by a sketch, where a form is of use there."""

GRID = tuple(step / 50 for step in range(1, 47))
"""Ratios that the knapsack chooses among; errors between the measured ones are interpolated."""

RANKED = (*(step / 50 for step in range(1, 50)), 0.985, 0.99, 0.995)
"""Ratios of the forms whose parts are ranked."""


def form_at(method: MethodConfig, members: Sequence[Target], ratio: float) -> GroupSpec | None:
    """The form that has removed `ratio` of the members' bytes; None where the method has none so small.

    Raises:
        LexigramError: where the method has none for such a shape.
    """
    name = "group_" + hashlib.sha256(" ".join(member.name for member in members).encode()).hexdigest()[:8]
    amount = int((1 - ratio) * sum(member.dense_bytes for member in members))
    try:
        return layout_group(method, [member.shape for member in members], Budget(amount), name, members[-1].head_dim)
    except BudgetTooSmallError:
        return None
    except ValueError as error:
        raise LexigramError(f"{' + '.join(m.name for m in members)} {members[0].shape}: {error}") from error


def measured_forms(
    method: MethodConfig, members: Sequence[Target], ratios: Sequence[float] = MEASURED
) -> list[GroupSpec]:
    """The forms at these ratios, ascending, where they are of use: the largest first, no size twice.

    Raises:
        LexigramError: where the method has none for such a shape.
    """
    least, most = useful(method)
    forms = [form_at(method, members, ratio) for ratio in ratios if least <= ratio <= most]
    return list({form.bytes: form for form in reversed(forms) if form is not None}.values())[::-1]


def check_reach(
    method: MethodConfig, groups: Sequence[Sequence[Target]], amount: int, ratios: Sequence[float] = MEASURED
) -> None:
    """Raise LexigramError where the smallest forms at these ratios need, of all groups, more than `amount` bytes."""
    fewest = 0
    for members in groups:
        dense = sum(member.dense_bytes for member in members)
        forms = [form for variant in variants(method) for form in measured_forms(variant, members, ratios)]
        fewest += min((form.bytes for form in forms), default=dense)
    if fewest > amount:
        before = sum(member.dense_bytes for members in groups for member in members)
        raise LexigramError(
            f"a budget of {amount} bytes is too small: the smallest forms among which the allocation chooses, of {method.name} "
            f"at most {max(ratios):g} removed, need {fewest}, a ratio of {1 - fewest / before:.3f}; lower the ratio, or take "
            "the allocation uniform"
        )
