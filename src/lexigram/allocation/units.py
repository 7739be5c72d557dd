"""What an allocation is, as data: every matrix's method and form, in the units that are fitted together. A JSON file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lexigram.errors import LexigramError
from lexigram.factors import FactorSpec, GroupSpec
from lexigram.methods import AnyMethod


class Unit(BaseModel):
    """One matrix, or several that share a leaf: their names, how they are fitted and into which form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    members: tuple[str, ...]
    method: AnyMethod
    spec: GroupSpec

    @model_validator(mode="after")
    def _complete(self) -> Unit:
        if len(self.members) != len(self.spec.members):
            raise ValueError(f"{len(self.members)} names stand for {len(self.spec.members)} forms")
        return self

    @property
    def shared(self) -> str | None:
        """The name of the leaf that the members share."""
        return next((reference.name for member in self.spec.members for reference in member.references()), None)


class Allocation(BaseModel):
    """All units of a model. Replayed, it gives the same forms whatever method and ratio are asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: tuple[Unit, ...]

    @property
    def bytes(self) -> int:
        """Stored bytes of all units."""
        return sum(unit.spec.bytes for unit in self.units)

    @property
    def specs(self) -> dict[str, FactorSpec]:
        """Every matrix's own form by its name."""
        return {name: spec for unit in self.units for name, spec in zip(unit.members, unit.spec.members, strict=True)}

    @classmethod
    def read(cls, file: Path) -> Allocation:
        """An allocation that `lexigram compress` wrote.

        Raises:
            LexigramError: where it cannot be read or is none.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise LexigramError(
                f"the allocation {file} cannot be read: {error.strerror or error}; name uniform, knapsack, or the "
                "allocation.json of an earlier result"
            ) from error
        except (UnicodeDecodeError, ValidationError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else "it is not text"
            raise LexigramError(f"{file} is no allocation ({reason}); name what `lexigram compress` wrote") from error

    def check(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Raise LexigramError where it does not fit a model's targets, given by name and shape."""
        specs = self.specs
        wrong = sorted(set(specs) ^ set(shapes)) or [
            name for name, spec in specs.items() if (spec.rows, spec.cols) != shapes[name]
        ]
        if wrong or sum(len(unit.members) for unit in self.units) != len(specs):
            raise LexigramError(
                f"the allocation was made for other layers ({wrong[0] if wrong else 'one stands twice'}); make it again for "
                "this model and these --include and --exclude"
            )
        names = [unit.shared for unit in self.units if unit.shared is not None]
        for name in names:
            if names.count(name) > 1:
                raise LexigramError(f"the allocation has several shared matrices of the name {name}; make it again")
