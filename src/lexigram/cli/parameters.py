"""Options as parameters that typer reads from a command's signature; and commands that work on one model of settings."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from lexigram.cli.options import Option


def declared(option: Option, **changes: Any) -> Any:
    """What typer is told of an option, for the annotation of a parameter that is None where the option is not given."""
    spellings = filter(None, (option.written, option.shown.short))
    told = {"metavar": option.metavar, "help": option.help, "rich_help_panel": option.panel}
    return typer.Option(*spellings, **{**told, **changes})


def parameter(name: str, option: Option) -> inspect.Parameter:
    """An option that is None where it is not given, so that a recipe file or the field's own default keeps its say."""
    kind: Any = Annotated[option.type | None, declared(option)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for every field of its parameter `settings` in place of that.

    Its annotation is a pydantic model with a `parse`, which is given what was given. What has no default is required, and
    stands outside of the panels.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    place = [each.name for each in own].index("settings")
    model = own[place].annotation
    made = []
    for key, field in model.model_fields.items():
        option = Option("settings", key, {"settings": field})
        known = parameter(key, option)
        if field.is_required():
            known = known.replace(
                default=inspect.Parameter.empty,
                annotation=Annotated[option.type, declared(option, rich_help_panel=None)],
            )
        made.append(known)

    @wraps(command)
    def run(**given: Any) -> None:
        told = {key: given.pop(key) for key in model.model_fields}
        command(settings=model.parse({key: value for key, value in told.items() if value is not None}), **given)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own[:place], *made, *own[place + 1 :])]
    )
    return run
