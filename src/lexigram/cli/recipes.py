"""Commands that work on a recipe: MODEL and the options that make one, as parameters that typer reads from a signature."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from lexigram.cli.arguments import Model
from lexigram.cli.options import PANELS, SOLVERS, listed, options
from lexigram.cli.parameters import parameter
from lexigram.errors import LexigramError
from lexigram.methods import METHODS, PRESETS
from lexigram.recipe import OptionOf, Recipe, merge, method_name
from lexigram.shown import BUDGET

MethodName = Enum("MethodName", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
PresetName = Enum("PresetName", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]

OPTIONS = {name.replace("-", "_"): option for name, option in options().items()}
"""Every option that is made of fields, by the name of the command's parameter."""

_METHOD = Recipe.model_fields["method"]
_METAVAR, _ONE_OF = listed(tuple(METHODS), "method")
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="YAML with any of these settings, such as a result's recipe.yaml; options win over it.",
    ),
]
Method = Annotated[
    MethodName | None,
    typer.Option(
        "--method",
        "-m",
        metavar=_METAVAR,
        help=f"{_METHOD.description}{_ONE_OF} [default: {_METHOD.default.name}]",
        rich_help_panel=BUDGET,
    ),
]
Preset = Annotated[
    PresetName | None,
    typer.Option(
        metavar="|".join(PRESETS),
        help=f"`published` is the paper's own (hours on a real model). [default: {next(iter(PRESETS))}]",
        rich_help_panel=SOLVERS["cospadi"],
    ),
]


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with MODEL and the options of a recipe in place of its parameter `recipe`.

    All commands show the panels of their help in one order. In a panel, those of the command's own options that stand before
    `recipe` come first, the others last.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    place = [parameter.name for parameter in own].index("recipe")
    parameters = [*own[:place], *_fixed(), *map(parameter, OPTIONS, OPTIONS.values()), *own[place + 1 :]]

    @wraps(command)
    def run(*, model: str, recipe: Path | None, method: Enum | None, preset: Enum | None, **given: Any) -> None:
        values = {name: given.pop(name) for name in OPTIONS}
        command(recipe=_recipe(model, recipe, method, preset, values), **given)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in sorted(parameters, key=_rank)]
    )
    return run


def _fixed() -> Iterator[inspect.Parameter]:
    """What is not made of fields: they say where the fields' values come from, and which config they go to."""
    yield inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, annotation=Model)
    for name, annotation in (("recipe", RecipeFile), ("method", Method), ("preset", Preset)):
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _rank(parameter: inspect.Parameter) -> int:
    """Where its panel comes in the help."""
    said = getattr(parameter.annotation, "__metadata__", ())
    return PANELS.index(next((info.rich_help_panel for info in said if isinstance(info, OptionInfo)), None))


def _recipe(model: str, file: Path | None, method: Enum | None, preset: Enum | None, values: dict[str, Any]) -> Recipe:
    given = {name: value for name, value in values.items() if value is not None}
    return merged(
        Recipe.read(file) if file else {},
        model,
        given,
        where=str(file or "the settings"),
        method=method.value if method else None,
        preset=preset.value if preset else None,
    )


def merged(
    content: Mapping[str, Any],
    model: str,
    given: Mapping[str, Any],
    *,
    where: str,
    method: str | None = None,
    preset: str | None = None,
) -> Recipe:
    """Options over the preset over a recipe file's content over defaults, as `lexigram.recipe.merge` has it.

    Args:
        content: of the file; may be empty.
        model: MODEL.
        given: what options of `OPTIONS` were given, by the names of their parameters.
        where: what an error names for a value that came from none of them.
        method: what --method says, if it was given.
        preset: what --preset says, if it was given.

    Raises:
        LexigramError: for an option of another method, and as `merge` does; a value is named by its option.
    """
    _check_method(method_name(content, preset=preset, option=method), given)
    parts: dict[str, dict[str, Any]] = {"settings": {"model": model}, "calibration": {}, "method": {"name": method}}
    for name, value in given.items():
        option = OPTIONS[name]
        parts[option.part][option.key] = not value if option.negative else value
    return merge(content, preset=preset, where=where, option_of=_origins(given), **parts)


def _check_method(method: str, given: Mapping[str, Any]) -> None:
    """Raise for an option that is none of this method's; of a method that is not known nothing is said here."""
    for name, value in given.items():
        option = OPTIONS[name]
        if option.part == "method" and method in list(METHODS) and method not in option.fields:
            *others, last = option.fields
            having, taking = (f"{', '.join(others)} {word} {last}" if others else last for word in ("and", "or"))
            raise LexigramError(
                f"{option.given(value)} is an option of {having}, and the method is {method}; leave it out, or take --method "
                f"{taking}"
            )


def _origins(given: Mapping[str, Any]) -> OptionOf:
    """Which of these options a value of the recipe came from."""
    written: dict[tuple[str, str], str] = {}
    for name, value in given.items():
        option = OPTIONS[name]
        written[option.part, option.key] = option.given(value)
    if ("settings", "seed") in written:  # which is the calibration's too, unless that has its own
        written.setdefault(("calibration", "seed"), written["settings", "seed"])

    def option_of(path: Sequence[str]) -> str | None:
        part, *keys = path if path[0] in ("method", "calibration") else ("settings", *path)
        return written.get((part, keys[0])) if keys else None

    return option_of
