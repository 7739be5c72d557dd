"""The same ratio for every unit, as the papers do it."""

from collections.abc import Mapping, Sequence
from typing import Literal

from lexigram.allocation.units import Allocation, Unit
from lexigram.errors import LexigramError
from lexigram.methods import AnyMethod, Budget, layout_group
from lexigram.targets import Target

Accounting = Literal["bytes", "paper"]
"""How a ratio is counted: in stored bytes, or in parameters as the paper does."""


def budget(targets: Sequence[Target], ratio: float, accounting: Accounting) -> Budget:
    """What `targets` may keep together: ``1 - ratio`` of their bfloat16 bytes, or of their parameters for the paper's
    accounting.

    Raises:
        LexigramError: for a ratio outside of (0, 1).
    """
    if not 0 < ratio < 1:
        raise LexigramError(
            f"ratio {ratio:g} is out of range; it is the share of stored bytes to remove, above 0 and below 1"
        )
    if accounting == "paper":
        return Budget(int((1 - ratio) * sum(target.weight_count for target in targets)), "parameters")
    return Budget(int((1 - ratio) * sum(target.dense_bytes for target in targets)))


def uniform(
    groups: Sequence[Sequence[str]],
    targets: Mapping[str, Target],
    method: AnyMethod,
    ratio: float,
    accounting: Accounting,
) -> Allocation:
    """Every group keeps its share by itself.

    Raises:
        LexigramError: for a ratio that is out of range, or too large for the smallest form of some group; for a form that the
            shape of a weight does not allow.
    """
    units = []
    for index, names in enumerate(groups):
        members = [targets[name] for name in names]
        try:
            spec = layout_group(
                method,
                [member.shape for member in members],
                budget(members, ratio, accounting),
                f"group_{index}",
                members[-1].head_dim,
            )
        except ValueError as error:
            shapes = ", ".join(str(member.shape) for member in members)
            raise LexigramError(f"{' + '.join(names)} {shapes} at ratio {ratio:g}: {error}") from error
        units.append(Unit(members=tuple(names), method=method, spec=spec))
    return Allocation(units=tuple(units))
