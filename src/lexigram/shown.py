"""What a field of a recipe, of a method's config or of a comparison's settings may say about its option on the command line
besides its description.

The fields stand in `recipe`, `methods` and `comparison.planning`, which know no command line; `cli.options` makes the options.
"""

from dataclasses import dataclass

BUDGET, FORM, CALIBRATION, MACHINE = "What and how much", "Form", "Calibration", "Machine and output"
EVALUATION = "Evaluation"
"""Panels of the help; a method's solver has one of its own."""


@dataclass(frozen=True)
class Shown:
    """A mark in the annotation of a field. A field without one has an option too, in the panel of its model.

    Args:
        panel: where the help shows the option.
        name: the option's, where the field's own would be taken for another.
        short: a second spelling, such as `-r`.
        metavar: what stands for the value; choices stand for themselves.
        none: what a default of None or of no values comes to, in words.
        option: False for a field that no option sets.
    """

    panel: str | None = None
    name: str | None = None
    short: str | None = None
    metavar: str | None = None
    none: str | None = None
    option: bool = True
