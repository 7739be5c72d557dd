"""The options that the fields of the recipe, its calibration and the methods' configs make: names, types, help, defaults.

A field that several methods have is one option, whose help says which of them take it and how their defaults differ. Nothing
here knows typer; `recipes` makes its parameters.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lexigram.cli.fields import by_text, choices, default, marked, together, value_type
from lexigram.methods import METHODS
from lexigram.recipe import METHOD_DEFAULTS, Calibration, Recipe
from lexigram.shown import BUDGET, CALIBRATION, FORM, MACHINE, Shown

Part = Literal["settings", "calibration", "method"]

SEVERAL = "Solver of several methods"
SOLVERS = {name: f"Solver of {name}" for name in METHODS}
PANELS = (None, BUDGET, FORM, CALIBRATION, SEVERAL, *SOLVERS.values(), MACHINE)
"""As the help shows them; an option without a panel stands before all others."""

_WIDEST = 32  # characters that a list of choices may take from the help text beside it


@dataclass(frozen=True)
class Option:
    """One option: the part of a recipe that it goes to, the key there, and the field of every model that has the key.

    Args:
        part: as `lexigram.recipe.merge` names them.
        key: of the field.
        fields: by method; a single one, by the part, where the part is not the method.
        defaults: by method, of a setting whose default is the method's own.
    """

    part: Part
    key: str
    fields: Mapping[str, FieldInfo]
    defaults: Mapping[str, str] | None = None

    @property
    def shown(self) -> Shown:
        """What the fields say of themselves, each thing as the first to say it has it."""
        marks = zip(*(astuple(marked(field)) for field in self.fields.values()), strict=True)
        first: list[Any] = [next((said for said in saying if said is not None), None) for saying in marks]
        return Shown(*first)

    @property
    def name(self) -> str:
        """As it is written, without the two dashes before it."""
        name = (self.shown.name or self.key).replace("_", "-")
        return f"no-{name}" if self.negative else name

    def given(self, value: Any) -> str:
        """As it was written, where it has this value."""
        return f"--no-{self.name}" if value is False else f"--{self.name}"

    @property
    def negative(self) -> bool:
        """Whether it is a flag that turns something off: a flag says what is unusual."""
        return all(field.default is True for field in self.fields.values())

    @property
    def written(self) -> str:
        """As it is declared; a flag that only some methods have on by default can be given either way."""
        defaults = {field.default for field in self.fields.values()}
        return f"--{self.name}/--no-{self.name}" if self.type is bool and len(defaults) > 1 else f"--{self.name}"

    @property
    def panel(self) -> str:
        """The one that the field asks for, or that of the model that it stands in."""
        own = {"settings": BUDGET, "calibration": CALIBRATION}.get(self.part)
        return self.shown.panel or own or (SOLVERS[next(iter(self.fields))] if len(self.fields) == 1 else SEVERAL)

    @property
    def type(self) -> Any:
        """Of the value; a list for what may be given several times.

        Raises:
            TypeError: where no option can be made of a field, or one option cannot be that of all methods that have it.
        """
        found = {value_type(field) for field in self.fields.values()}
        if found == {int, float}:
            return float
        if len(found) > 1:
            raise TypeError(f"--{self.name} cannot be one option for {', '.join(self.fields)}; rename a field")
        return found.pop()

    @property
    def choices(self) -> tuple[Any, ...]:
        """Of all methods."""
        return tuple(dict.fromkeys(choice for field in self.fields.values() for choice in choices(field)))

    @property
    def metavar(self) -> str | None:
        """What stands for the value; None leaves it to the type. A flag has no value."""
        return "" if self.type is bool else self.shown.metavar or listed(self.choices, self.name)[0]

    @property
    def help(self) -> str:
        """The description, which methods take the option, and the default; of a flag that turns off, the opposite."""
        texts = by_text({name: field.description or "" for name, field in self.fields.items()})
        said = " ".join(self._with_methods(text, names) for text, names in texts.items())
        if self.negative:
            said = f"Do not {said[:1].lower()}{said[1:]}"
        many = " Repeatable." if get_origin(self.type) is list and not (self.metavar or "").endswith("...") else ""
        wide = listed(self.choices, self.name)[1]
        return f"{said}{many}{wide}{f' [default: {self.default}]' if self.default else ''}"

    @property
    def default(self) -> str:
        """In words; where methods differ, of each. Empty where the option itself tells: a flag, or nothing unless given."""
        told = by_text(self.defaults or {name: default(field) for name, field in self.fields.items()})
        if len(told) > 1:
            return together(told)
        (only,) = told
        return "" if self.type is bool or (only == "none" and not self.choices) else only

    def _with_methods(self, text: str, names: list[str]) -> str:
        if self.part != "method" or self.panel == SOLVERS[names[0]]:
            return text
        said = "all methods" if len(names) == len(METHODS) else ", ".join(names)
        return f"{text.removesuffix('.')} ({said})."


def listed(names: tuple[Any, ...], name: str) -> tuple[str | None, str]:
    """Choices as a metavar; where that would be too wide, `name` for it, and the choices as a sentence."""
    written = "|".join(map(str, names))
    return (name.upper(), f" One of {', '.join(map(str, names))}.") if len(written) > _WIDEST else (written or None, "")


def options() -> dict[str, Option]:
    """Every option by its name, in the order of the models and of their fields.

    A method's `name` is not among them: it says which config the others go to.

    Raises:
        TypeError: where two different fields would have one option.
    """
    parts: dict[Part, Mapping[str, type[BaseModel]]] = {
        "calibration": {"calibration": Calibration},
        "settings": {"settings": Recipe},
        "method": METHODS,
    }
    found: dict[str, Option] = {}
    for part, models in parts.items():
        fields: dict[str, dict[str, FieldInfo]] = {}
        for owner, model in models.items():
            for key, field in model.model_fields.items():
                if marked(field).option and (part, key) != ("method", "name"):
                    fields.setdefault(key, {})[owner] = field
        own = METHOD_DEFAULTS if part == "settings" else {}
        for option in (Option(part, key, owners, own.get(key)) for key, owners in fields.items()):
            if option.name in found:
                raise TypeError(f"--{option.name} would set two fields; mark one of them with Shown(name=...)")
            found[option.name] = option
    return found
