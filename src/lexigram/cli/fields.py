"""A field of a pydantic model as the command line sees it: its mark, its choices, its type, its default in words."""

from collections.abc import Mapping
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lexigram.shown import Shown

_MANY = 3  # methods whose common default is told without their names


def marked(field: FieldInfo) -> Shown:
    """What a field says about its option."""
    return next((mark for mark in field.metadata if isinstance(mark, Shown)), Shown())


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """What a field may be, where that is a list; None aside."""
    annotation = _without_none(field.annotation)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def value_type(field: FieldInfo) -> Any:
    """Of the value on the command line; a list for what may be given several times.

    Raises:
        TypeError: where no option can be made of the field.
    """
    annotation = _without_none(field.annotation)
    if annotation in (bool, int, float, str):
        return annotation
    if get_origin(annotation) is tuple:
        return GenericAlias(list, get_args(annotation)[:1])
    found = {type(choice) for choice in choices(field)}
    if len(found) != 1:
        raise TypeError(f"no option can be made of {annotation}; mark the field with Shown(option=False)")
    return found.pop()


def default(field: FieldInfo) -> str:
    """In words; `none` for nothing, `on` and `off` for a flag."""
    value = field.default
    if field.is_required() or value is None or value == ():
        return marked(field).none or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of every text, in order."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        found.setdefault(text, []).append(name)
    return found


def together(told: Mapping[str, list[str]]) -> str:
    """Different defaults with the methods that have them; one that many have without their names."""
    usual = max(told, key=lambda text: len(told[text]))
    few = len(told[usual]) < _MANY
    said = ", ".join(f"{text} for {' and '.join(names)}" for text, names in told.items() if few or text != usual)
    if few:
        return said
    return f"{usual}, but {said}" if usual == next(iter(told)) else f"{said}, else {usual}"


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    inner, *more = (part for part in get_args(annotation) if part is not NoneType)
    return annotation if more else inner
