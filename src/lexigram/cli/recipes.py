"""Commands that work on a recipe: MODEL and the options that make one, as parameters that typer reads from a signature."""

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from lexigram.cli.arguments import Model
from lexigram.cli.options import PANELS, SOLVERS, Option, listed, options
from lexigram.methods import METHODS, PRESETS
from lexigram.recipe import Recipe, merge
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
        "--recipe", help="YAML with any of these settings, such as a result's recipe.yaml; options win over it."
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
    parameters = [*own[:place], *_fixed(), *map(_parameter, OPTIONS, OPTIONS.values()), *own[place + 1 :]]

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


def declared(option: Option, **changes: Any) -> Any:
    """What typer is told of an option, for the annotation of a parameter that is None where the option is not given."""
    spellings = filter(None, (option.written, option.shown.short))
    told = {"metavar": option.metavar, "help": option.help, "rich_help_panel": option.panel}
    return typer.Option(*spellings, **{**told, **changes})


def _parameter(name: str, option: Option) -> inspect.Parameter:
    """An option that is None where it is not given, so that a recipe file keeps its say."""
    kind: Any = Annotated[option.type | None, declared(option)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _rank(parameter: inspect.Parameter) -> int:
    """Where its panel comes in the help."""
    said = getattr(parameter.annotation, "__metadata__", ())
    return PANELS.index(next((info.rich_help_panel for info in said if isinstance(info, OptionInfo)), None))


def _recipe(model: str, file: Path | None, method: Enum | None, preset: Enum | None, values: dict[str, Any]) -> Recipe:
    parts: dict[str, dict[str, Any]] = {
        "settings": {"model": model},
        "calibration": {},
        "method": {"name": method.value if method else None},
    }
    for name, value in values.items():
        option = OPTIONS[name]
        if value is not None:
            parts[option.part][option.key] = not value if option.negative else value
    return merge(
        Recipe.read(file) if file else {},
        where=str(file or "the settings"),
        preset=preset.value if preset else None,
        **parts,
    )
