"""The options that are made of fields: all are there, each reaches its field, and the help tells what the models hold."""

import itertools
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from lexigram import Calibration, LexigramError, Recipe, cli
from lexigram.allocation import uniform
from lexigram.cli import compress as compressing
from lexigram.cli.arguments import DtypeName
from lexigram.cli.fields import choices, marked, value_type
from lexigram.cli.options import PANELS, SOLVERS, Option
from lexigram.cli.recipes import OPTIONS
from lexigram.methods import METHODS, PRESETS
from lexigram.recipe import AMOUNTS
from lexigram.shown import BUDGET, FORM, Shown

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
PARAMETERS = {parameter.name: parameter for parameter in COMMANDS["compress"].params}


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """(model, key, field) of everything that a recipe consists of."""
    for owner, model in {"recipe": Recipe, "calibration": Calibration, **METHODS}.items():
        yield from ((owner, key, field) for key, field in model.model_fields.items())


EVERY = [pytest.param(*found, id=f"{found[0]}.{found[1]}") for found in fields()]
BY_OWNER = {"recipe": "settings", "calibration": "calibration"}


def option_of(owner: str, key: str) -> tuple[str, Option]:
    """The one option of a field, and its parameter's name."""
    part = BY_OWNER.get(owner, "method")
    [found] = [
        (name, option)
        for name, option in OPTIONS.items()
        if (option.part, option.key) == (part, key) and (part != "method" or owner in option.fields)
    ]
    return found


# ---------------------------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize(("owner", "key", "field"), EVERY)
def test_every_field_is_described_and_has_an_option_or_says_that_it_has_none(
    owner: str, key: str, field: FieldInfo
) -> None:
    if owner in METHODS and key == "name":
        assert owner in f"{PARAMETERS['method'].metavar} {PARAMETERS['method'].help}"
        return
    assert re.fullmatch(r"[A-Zk`].*\.", field.description or ""), "a sentence"
    if not marked(field).option:
        assert (owner, key) in {("recipe", "model"), ("recipe", "method"), ("recipe", "calibration")}
        return
    name, option = option_of(owner, key)
    assert any(info is field for info in option.fields.values())
    parameter = PARAMETERS[name]
    assert parameter.opts[0] == f"--{name.replace('_', '-')}"
    assert parameter.default is None
    assert parameter.rich_help_panel in PANELS


def test_there_is_no_option_for_a_field_that_is_not_there() -> None:
    found = {(owner, key) for owner, key, field in fields() if marked(field).option and key != "name"}
    made = {
        ({"settings": "recipe"}.get(owner, owner), option.key) for option in OPTIONS.values() for owner in option.fields
    }
    assert made == found


@pytest.mark.parametrize("key", ["ratio", "method", "value_bits", "text"])
def test_the_names_that_scripts_use(key: str) -> None:
    written = {"ratio": ["--ratio", "-r"], "method": ["--method", "-m"], "text": ["--calibration", "-c"]}
    name = {"text": "calibration"}.get(key, key)
    assert PARAMETERS[name].opts == written.get(key, ["--value-bits"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("allocation", "uniform|knapsack|global|FILE"),
        ("include", "PATTERN"),
        ("calibration", "TEXT"),
        ("value_bits", "2|3|4|6|8|10|12|14|16"),
        ("plain", ""),
        ("ratio", None),
    ],
)
def test_what_stands_for_a_value(name: str, shown: str | None) -> None:
    """The choices of all methods; a word of the field's own; nothing for a flag; else what typer makes of the type."""
    assert PARAMETERS[name].metavar == shown


def test_the_choices_stand_once() -> None:
    assert choices(Recipe.model_fields["accounting"]) == get_args(uniform.Accounting)
    assert PARAMETERS["accounting"].metavar == "|".join(get_args(uniform.Accounting))
    assert {name.value for name in DtypeName} == {"auto", *choices(Recipe.model_fields["dtype"])}


# ------------------------------------------------------------------------------------------------------------ what is told


def said(default: Any, field: FieldInfo) -> str:
    """A default as the help should tell it."""
    if default is None:
        return marked(field).none or "none"
    if isinstance(default, tuple):
        return ", ".join(default)
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def told_for(method: str, text: str, *, differs: bool) -> str:
    """The default of a method in `8 for a and b, 4 for c`, `8 for a, else 4` or `4, but 8 for a`."""
    if not differs:
        return text
    parts = [part.rpartition(" for ") for part in re.split(", (?:but |else )?", text)]
    own = [value for value, _, names in parts if value and method in names.split(" and ")]
    return own[0] if own else next(rest for value, _, rest in parts if not value)


@pytest.mark.parametrize(("owner", "key", "field"), [case for case in EVERY if case.values[1] != "name"])
def test_the_default_in_the_help_is_the_models(owner: str, key: str, field: FieldInfo) -> None:
    if not marked(field).option:
        return
    name, option = option_of(owner, key)
    default = field.get_default(call_default_factory=True)
    told = re.search(r" \[default: (.*)\]$", PARAMETERS[name].help)
    if isinstance(default, bool) and len({field.default for field in option.fields.values()}) == 1:
        assert told is None
        assert PARAMETERS[name].opts == [f"--{'no-' if default else ''}{key}".replace("_", "-")]
    elif default == ():
        assert told is None
    else:
        assert told
        assert told_for(owner, told[1], differs=" for " in told[1]) == said(default, field)


@pytest.mark.parametrize("method", METHODS)
def test_the_help_tells_the_allocation_of_every_method(method: str) -> None:
    told = re.search(r" \[default: (.*)\]$", PARAMETERS["allocation"].help)
    assert told
    real = Recipe.parse({"model": "m", "method": {"name": method}}).allocation
    assert told_for(method, told[1], differs=True) == real
    assert real in PARAMETERS["allocation"].metavar.split("|")


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.part == "method"])
def test_the_help_names_the_methods_that_take_an_option(name: str) -> None:
    """By the panel, by their list, or by their defaults."""
    option, text = OPTIONS[name], PARAMETERS[name].help
    told = f"{option.panel} {text}"
    assert (
        "(all methods)" in text if set(option.fields) == set(METHODS) else all(owner in told for owner in option.fields)
    )
    assert [panel for panel in SOLVERS.values() if panel == option.panel] == (
        [] if option.panel not in SOLVERS.values() else [SOLVERS[owner] for owner in option.fields]
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_option_is_shown_whole(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markdown must not take a part of it for something else."""
    monkeypatch.setenv("COLUMNS", "500")
    assert run(name, "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    for parameter in COMMANDS[name].params:
        assert parameter.help
        lines = [line for line in shown.splitlines() if parameter.help.replace("`", "") in line]
        assert any(all(text in line for text in parameter.opts if text.startswith("--")) for line in lines), (
            parameter.name
        )


# ---------------------------------------------------------------------------------------------------------- what it does


def run(*args: object, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of `lexigram ARGS` in this process."""
    monkeypatch.setattr(sys, "argv", ["lexigram", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe that `lexigram compress demo ARGS` would carry out."""

    def recipe(*args: object) -> Recipe:
        found: list[Recipe] = []

        def stop(settings: Recipe, *_options: object) -> None:
            found.append(settings)
            raise LexigramError("far enough")

        monkeypatch.setattr(compressing, "planned", stop)
        run("compress", "demo", "--out", tmp_path / "out", *args, monkeypatch=monkeypatch)
        assert found, "the recipe was refused"
        return found[0]

    return recipe


def within(field: FieldInfo, value: float) -> bool:
    """Whether a number keeps to the bounds of its field."""
    bounds = {
        name: limit
        for mark in field.metadata
        for name in ("gt", "ge", "lt", "le")
        if (limit := getattr(mark, name, None))
    }
    return all(getattr(operator, name)(value, limit) for name, limit in bounds.items())


def another(field: FieldInfo) -> Any:
    """A value of a field that is not its default."""
    if field is Recipe.model_fields["size"]:
        return "4GB"
    kind, words = value_type(field), [word for word in (marked(field).metavar or "").split("|") if word.islower()]
    if kind is bool:
        return not field.default
    if kind == list[str]:
        return ("x.txt",)
    candidates = [
        *choices(field),
        *words,
        *([7, 2] if kind is int else [0.75, 0.5, 2.5, 1.25] if kind is float else ["else"]),
    ]
    return next(
        value for value in candidates if value != field.default and (isinstance(value, str) or within(field, value))
    )


NEEDED = {("recipe", "refine"): ("--allocation", "knapsack")}
"""Options without which another is refused."""


@pytest.mark.parametrize(("owner", "key", "field"), [case for case in EVERY if case.values[1] != "name"])
def test_every_option_reaches_its_field_and_no_other(
    owner: str, key: str, field: FieldInfo, asked: Callable[..., Recipe]
) -> None:
    if not marked(field).option:
        return
    method = ("--method", owner) if owner in METHODS else NEEDED.get((owner, key), ())
    value = another(field)
    written = PARAMETERS[option_of(owner, key)[0]].opts[0]
    given = asked(
        *method, written, *([] if isinstance(value, bool) else value if isinstance(value, tuple) else [value])
    )
    before = asked(*method)
    part, was = {
        "recipe": (given, before),
        "calibration": (given.calibration, before.calibration),
    }.get(owner, (given.method, before.method))
    assert getattr(part, key) == value != getattr(was, key)
    assert part.model_fields.keys() == was.model_fields.keys()
    implied = {
        "group": {"share"},
        "seed": {"calibration"},
        "accounting": {"method"},
        "bits": {"ratio"},
        "size": {"ratio"},
    }.get(key, set())
    changed = {other for other in type(part).model_fields if getattr(part, other) != getattr(was, other)}
    assert changed - (implied if owner == "recipe" else set()) == {key}


def test_options_that_are_not_given_leave_a_recipe_file_as_it_is(asked: Callable[..., Recipe], tmp_path: Path) -> None:
    recipes = [
        Recipe(model="demo", method=PRESETS["published"], calibration=Calibration(text=("a.txt", "b.txt"), length=99)),
        Recipe(model="demo", method=METHODS["quantize"](symmetric=True, clip=False, value_bits=3), include=("q_proj",)),
        Recipe(model="demo", method=METHODS["svd"](plain=True), share="consecutive", group=4, seed=7),
        Recipe(model="demo", sequential=True, correction=0.5, dtype="float32", exclude=("*.mlp.*",)),
        Recipe(model="demo", bits=4.25),
        Recipe(model="demo", size="4GB"),
    ]
    for recipe in recipes:
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        assert asked("--recipe", file) == recipe
        changed = recipe.model_copy(update={**dict.fromkeys(AMOUNTS), "ratio": 0.75})
        assert asked("--recipe", file, "--ratio", 0.75) == changed


@pytest.mark.parametrize(("own", "given"), itertools.permutations(AMOUNTS, 2))
def test_an_option_for_an_amount_stands_in_place_of_whichever_a_recipe_file_has(
    own: str, given: str, asked: Callable[..., Recipe], tmp_path: Path
) -> None:
    values = {"ratio": 0.75, "bits": 4.25, "size": "4GB"}
    file = tmp_path / "recipe.yaml"
    for text in (f"{own}: {values[own]}\n", Recipe.parse({"model": "demo", own: values[own]}).to_yaml()):
        file.write_text(text, encoding="utf-8")
        wanted = {**dict.fromkeys(AMOUNTS), given: values[given]}
        assert {key: getattr(asked("--recipe", file, f"--{given}", values[given]), key) for key in AMOUNTS} == wanted
        kept = {**dict.fromkeys(AMOUNTS), own: values[own]}
        assert {key: getattr(asked("--recipe", file), key) for key in AMOUNTS} == kept


def test_several_amounts_on_the_command_line_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("size: 4GB\n", encoding="utf-8")
    for recipe in ((), ("--recipe", file)):
        said = refused(*recipe, "--ratio", 0.5, "--bits", 4)
        assert said.endswith(": ratio 0.5 and bits 4.0 each say how much is to be left; give one of them")
    assert refused("--bits", 16) == "--bits is 16.0; it should be less than 16"
    assert refused("--size", "plenty") == "--size is 'plenty'; it should be a size such as 4GB, 800MB or 2GiB"


def test_an_option_may_be_repeated(asked: Callable[..., Recipe]) -> None:
    found = asked("-c", "a.txt", "--calibration", "b.txt", "--include", "q_proj", "--include", "k_proj")
    assert found.calibration.text == ("a.txt", "b.txt")
    assert found.include == ("q_proj", "k_proj")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """What `lexigram compress demo ARGS` says against it, before anything is planned."""
    monkeypatch.setattr(compressing, "planned", lambda *_args, **_options: pytest.fail("the options were taken"))

    def error(*args: object) -> str:
        assert run("compress", "demo", "--out", tmp_path / "out", *args, monkeypatch=monkeypatch) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return error


PRUNING = [name for name, config in METHODS.items() if "pattern" in config.model_fields]

STRANGERS = [
    pytest.param(name, method, id=f"{name}-{method}", marks=() if number % 4 == 0 else pytest.mark.slow)
    for number, (name, method) in enumerate(
        (name, method)
        for name, option in OPTIONS.items()
        if option.part == "method"
        for method in METHODS
        if method not in option.fields
    )
]
"""Every option with every method that has no such option; a quarter of them, of all methods, is quick."""


@pytest.mark.parametrize(("name", "method"), STRANGERS)
def test_an_option_of_another_method_is_refused_by_name(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    option = OPTIONS[name]
    monkeypatch.setattr(compressing, "planned", lambda *_args, **_options: pytest.fail("the option was taken"))
    value = another(next(iter(option.fields.values())))
    args = [PARAMETERS[name].opts[0], *([] if isinstance(value, bool) else [value])]
    assert run("compress", "demo", "--out", tmp_path / "out", "-m", method, *args, monkeypatch=monkeypatch) == 1
    said = re.fullmatch(
        rf"error: {args[0]} is an option of (.*), and the method is {method}; leave it out, or take --method (.*)\n",
        capsys.readouterr().err,
    )
    assert said
    for names, word in zip(said.groups(), ("and", "or"), strict=True):
        assert re.split(f", | {word} ", names) == list(option.fields)


@pytest.mark.parametrize(
    ("content", "args", "method"),
    [
        ("{}", (), "cospadi"),
        ("method: {name: svd}", (), "svd"),
        ("method: {name: svd}", ("--preset", "published"), "cospadi"),
        ("method: {name: svd}", ("--method", "oats"), "oats"),
    ],
)
def test_the_method_that_an_option_does_not_suit_is_known_from_wherever_it_is_told(
    content: str, args: tuple[str, ...], method: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    said = refused("--recipe", file, "--pattern", "2:4", *args)
    assert f"--pattern is an option of {', '.join(PRUNING[:-1])} and {PRUNING[-1]}, and the method is {method};" in said


def test_a_method_that_is_not_known_is_what_is_told(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for name in ("cospady", "[svd]", "null"):
        file.write_text(f"method: {{name: {name}}}")
        assert "method" in refused("--recipe", file, "--rho", 2)
        assert "is an option of" not in refused("--recipe", file, "--rho", 2)


@pytest.mark.parametrize(
    ("content", "args", "says"),
    [
        ("{}", ("--value-bits", 5), "--value-bits is 5; it should be 2"),
        ("method: {value_bits: 5}", (), "r.yaml: method.value_bits is 5; it should be 2"),
        ("method: {value_bits: 5}", ("--rho", 2), "r.yaml: method.value_bits is 5; it should be 2"),
        ("method: {value_bits: 5}", ("--value-bits", 7), "--value-bits is 7; it should be 2"),
        ("{}", ("--ratio", 2), "--ratio is 2.0; it should be less than 1"),
        ("ratio: 2", ("--length", 9), "r.yaml: ratio is 2; it should be less than 1"),
        ("{}", ("--sequences", 0), "--sequences is 0; it should be"),
        ("calibration: {sequences: 0}", (), "r.yaml: calibration.sequences is 0; it should be"),
        ("{}", ("--seed", -1), "--seed is -1; it should be"),
        ("{}", ("--seed", 3, "--calibration-seed", -1), "--calibration-seed is -1; it should be"),
        ("calibration: {seed: -1}", (), "r.yaml: calibration.seed is -1; it should be"),
        ("{}", ("-m", "cap", "--allocation", "knapsack"), "r.yaml: the method cap chooses by itself"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_given(
    content: str, args: tuple[object, ...], says: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    """By its option, or by its file and the key there."""
    (tmp_path / "r.yaml").write_text(content)
    assert refused("--recipe", tmp_path / "r.yaml", *args).removeprefix(f"{tmp_path}/").startswith(says)


def test_without_a_file_the_settings_are_named(refused: Callable[..., str]) -> None:
    said = refused("-m", "cap", "--allocation", "knapsack")
    assert said.startswith("the settings: the method cap chooses by itself")
    assert refused("--value-bits", 5).startswith("--value-bits is 5;")


# ---------------------------------------------------------------------------------------- methods that are still to come


class First(BaseModel):
    steps: int = Field(default=3, description="How many steps.")
    keep: bool = Field(default=True, description="Keep the largest.")
    form: Annotated[Literal["a", "b"], Shown(FORM)] = Field(default="a", description="Which form.")
    wide: Literal["first choice", "second choice", "third choice"] = Field(default="first choice", description="Which.")
    size: int = Field(default=1, description="How large.")
    odd: int | str = Field(default=1, description="Anything.")
    start: str = Field(default="x", description="A start.")


class Second(BaseModel):
    steps: float = Field(default=0.5, description="How many steps.")
    keep: bool = Field(default=False, description="Keep the largest.")
    form: Literal["b", "c"] | None = Field(default=None, description="Which form.")
    size: str = Field(default="s", description="How large.")


def merged(key: str, *models: type[BaseModel]) -> Option:
    """The option that methods with these configs would have, under names that exist."""
    return Option("method", key, {name: model.model_fields[key] for name, model in zip(METHODS, models, strict=False)})


def test_one_option_for_fields_that_differ() -> None:
    one, two, *_ = METHODS
    steps = merged("steps", First, Second)
    assert (steps.type, steps.panel) == (float, "Solver of several methods")
    assert steps.help == f"How many steps ({one}, {two}). [default: 3 for {one}, 0.5 for {two}]"
    form = merged("form", First, Second)
    assert (form.metavar, form.panel, form.type) == ("a|b|c", FORM, str)
    assert form.default == f"a for {one}, none for {two}"


def test_a_flag_that_methods_differ_about_can_be_given_either_way() -> None:
    one, two, *_ = METHODS
    flag = merged("keep", First, Second)
    assert (flag.name, flag.written, flag.negative) == ("keep", "--keep/--no-keep", False)
    assert flag.help == f"Keep the largest ({one}, {two}). [default: on for {one}, off for {two}]"
    assert (merged("keep", First).written, merged("keep", First).help) == ("--no-keep", "Do not keep the largest.")
    assert merged("keep", Second).written == "--keep"


@pytest.mark.parametrize(
    ("defaults", "told"),
    [
        ([1, 1, 1, 1], "1"),
        ([1, 2, 1, 2], "1 for a and c, 2 for b and d"),
        ([1, 2, 2, 2], "1 for a, else 2"),
        ([1, 2, 3, 3, 3], "1 for a, 2 for b, else 3"),
        ([1, 1, 2, 1], "1, but 2 for c"),
    ],
)
def test_a_default_that_many_methods_have_is_told_once(defaults: list[int], told: str) -> None:
    fields = {name: FieldInfo(annotation=int, default=value) for name, value in zip("abcde", defaults, strict=False)}
    assert Option("method", "steps", fields).default == told
    for name, value in zip("abcde", defaults, strict=False):
        assert told_for(name, told, differs=len(set(defaults)) > 1) == str(value)


def test_each_thing_is_as_the_first_field_to_say_it_has_it() -> None:
    marks = {"a": Shown(none="by size"), "b": Shown(FORM, short="-x"), "c": Shown(BUDGET, metavar="X")}
    fields = {name: FieldInfo.from_annotation(Annotated[int | None, mark]) for name, mark in marks.items()}
    assert Option("method", "steps", fields).shown == Shown(FORM, short="-x", metavar="X", none="by size")


def test_many_choices_are_told_in_the_help() -> None:
    option = merged("wide", First)
    assert option.metavar == "WIDE"
    assert option.help == "Which. One of first choice, second choice, third choice. [default: first choice]"


def test_what_no_option_can_be_made_of_is_an_error() -> None:
    one, two, *_ = METHODS
    with pytest.raises(TypeError, match=f"--size cannot be one option for {one}, {two}; rename a field"):
        _ = merged("size", First, Second).type
    with pytest.raises(TypeError, match=r"no option can be made of int \| str; mark the field with Shown"):
        _ = merged("odd", First).type


def test_two_fields_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clash(BaseModel):
        ratio: float = Field(default=0.1, description="Another ratio.")

    from lexigram.cli import options

    monkeypatch.setattr(options, "METHODS", {"cospadi": Clash})
    with pytest.raises(TypeError, match=r"--ratio would set two fields; mark one of them with Shown\(name=\.\.\.\)"):
        options.options()


def test_the_panels_come_in_one_order() -> None:
    shown = [parameter.rich_help_panel for parameter in COMMANDS["compress"].params if parameter.name != "help"]
    order = list(dict.fromkeys(shown))
    assert order == [panel for panel in PANELS if panel in order]
    assert order[:2] == [None, BUDGET]
