"""Recipes: plain data in and out, which setting wins, and what is said about a wrong key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lexigram import Calibration, CospadiConfig, LexigramError, Recipe, SvdConfig
from lexigram.cli import PresetName, _recipe
from lexigram.methods import METHODS, PRESETS


@given(
    st.builds(
        Recipe,
        model=st.sampled_from(["demo", "owner/name", "./folder: with # signs", "ünï 'quoted'"]),
        method=st.one_of(
            st.builds(SvdConfig, plain=st.booleans()),
            st.builds(
                CospadiConfig,
                rho=st.floats(1, 8),
                coefficient_bits=st.just(14),
                coding=st.sampled_from(["htp", "omp"]),
                tolerance=st.sampled_from([0, 1e-3, 1e-12]),
            ),
        ),
        ratio=st.floats(0.01, 0.99),
        accounting=st.sampled_from(["bytes", "paper"]),
        calibration=st.builds(
            Calibration,
            text=st.lists(st.sampled_from(["self", "demo", "a.txt", "null", "1", "yes"]), min_size=1).map(tuple),
            length=st.none() | st.integers(2, 4096),
        ),
        include=st.lists(st.sampled_from(["q_proj", "*.mlp.*"])).map(tuple),
        seed=st.integers(0, 2**40),
    )
)
@settings(max_examples=60, deadline=None)
def test_yaml_round_trip(recipe: Recipe) -> None:
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_written_recipe_leaves_nothing_to_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe(model="demo").to_yaml(), encoding="utf-8")
    content = Recipe.read(file)
    assert content.keys() == Recipe.model_fields.keys()
    assert content["method"].keys() == CospadiConfig.model_fields.keys()
    assert content["calibration"].keys() == Calibration.model_fields.keys()


def settings_of(tmp_path: Path, content: dict[str, Any] | None, **options: Any) -> Recipe:
    """What the command line makes of a recipe file and options."""
    file = None
    if content is not None:
        file = tmp_path / "r.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    preset = options.pop("preset", None)
    return _recipe(
        "demo",
        file,
        PresetName(preset) if preset else None,
        options.pop("method", {}),
        options.pop("calibration", {}),
        **options,
    )


def test_options_win_over_the_preset_over_the_recipe_over_defaults(tmp_path: Path) -> None:
    content = {
        "ratio": 0.4,
        "seed": 5,
        "method": {"coding": "htp", "rho": 3.0},
        "calibration": {"length": 99, "seed": 8},
    }
    got = settings_of(
        tmp_path,
        content,
        preset="published",
        method={"rho": 4.0, "tolerance": None},
        calibration={"seed": 9, "length": None},
        ratio=0.5,
        seed=None,
    )
    assert got.model == "demo"
    assert (got.ratio, got.seed) == (0.5, 5)  # option, recipe
    assert isinstance(got.method, CospadiConfig)
    assert (got.method.rho, got.method.coding) == (4.0, "omp")  # option, preset
    assert (got.method.update, got.method.iterations) == ("ksvd", 60)  # preset
    assert got.method.cg_steps == CospadiConfig().cg_steps  # default
    assert (got.calibration.seed, got.calibration.length, got.calibration.sequences) == (9, 99, 64)


@pytest.mark.parametrize("content", [None, {"seed": 5, "calibration": {"seed": 8}}])
def test_a_seed_is_for_the_calibration_too_unless_that_has_its_own(content: Any, tmp_path: Path) -> None:
    both = settings_of(tmp_path, content, calibration={"seed": None}, seed=3)
    assert (both.seed, both.calibration.seed) == (3, 3)
    each = settings_of(tmp_path, content, calibration={"seed": 0}, seed=3)
    assert (each.seed, each.calibration.seed) == (3, 0)
    neither = settings_of(tmp_path, content, calibration={"seed": None}, seed=None)
    assert (neither.seed, neither.calibration.seed) == ((5, 8) if content else (42, 0))


def test_without_anything_the_defaults_are_the_fast_preset(tmp_path: Path) -> None:
    assert settings_of(tmp_path, None) == Recipe(model="demo", method=PRESETS["fast"])
    assert settings_of(tmp_path, {}) == Recipe(model="demo")
    assert settings_of(tmp_path, None, preset="published").method == PRESETS["published"]


def test_another_method_on_the_command_line_leaves_the_recipes_options_behind(tmp_path: Path) -> None:
    got = settings_of(tmp_path, {"method": {"name": "cospadi", "rho": 3.0}, "ratio": 0.4}, method={"name": "svd"})
    assert got.method == SvdConfig()
    assert got.ratio == 0.4
    kept = settings_of(tmp_path, {"method": {"name": "svd", "plain": True}}, method={"name": "svd"})
    assert kept.method == SvdConfig(plain=True)


def test_a_preset_beside_another_method_is_refused_and_wins_over_a_recipes_method(tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match=r"--preset fast is a solver of cospadi; leave it out for the method svd"):
        settings_of(tmp_path, {}, preset="fast", method={"name": "svd"})
    assert settings_of(tmp_path, {"method": {"name": "svd"}}, preset="fast").method == PRESETS["fast"]


def test_a_single_name_needs_no_list() -> None:
    got = Recipe.parse({"model": "m", "calibration": {"text": "demo"}, "include": "q_proj", "exclude": "k_proj"})
    assert (got.calibration.text, got.include, got.exclude) == (("demo",), ("q_proj",), ("k_proj",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ratioo": 0.2}, "unknown key 'ratioo'; did you mean 'ratio'?"),
        ({"calibration": {"sequence": 3}}, "unknown key 'calibration.sequence'; did you mean 'sequences'?"),
        (
            {"method": {"name": "cospadi", "iteration": 3}},
            "unknown key 'method.iteration' of the method cospadi; did you mean 'iterations'?",
        ),
        (
            {"method": {"name": "svd", "rho": 3}},
            "unknown key 'method.rho' of the method svd; the keys here are name, plain",
        ),
        ({"zzzz": 1}, "unknown key 'zzzz'; the keys here are model, method, ratio,"),
        ({"method": {"name": "cospady"}}, "unknown method 'cospady'; the methods are " + ", ".join(METHODS)),
        ({"ratio": 1}, "ratio is 1; it should be less than 1"),
        ({"ratio": 0}, "ratio is 0; it should be greater than 0"),
        ({"ratio": float("nan")}, "ratio is nan; it should be "),
        ({"ratio": "much"}, "ratio is 'much'; it should be a valid number"),
        ({"method": {"name": "cospadi", "rho": 0.5}}, "method.rho is 0.5; it should be greater than or equal to 1"),
        ({"method": {"name": "cospadi", "coding": "OMP"}}, "method.coding is 'OMP'; it should be 'htp' or 'omp'"),
        ({"calibration": {"length": 1}}, "calibration.length is 1; it should be greater than or equal to 2"),
        ({"dtype": "int8"}, "dtype is 'int8'; it should be 'bfloat16', 'float16' or 'float32'"),
        ({"model": None}, "model is None; it should be a valid string"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_would_do(content: dict[str, Any], message: str) -> None:
    with pytest.raises(LexigramError) as caught:
        Recipe.parse({"model": "m", **content}, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_a_recipe_without_a_model_says_so() -> None:
    with pytest.raises(LexigramError, match="model is missing"):
        Recipe.parse({"ratio": 0.2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds no mapping; write keys and values"),
        (b"", "holds no mapping; write keys and values"),
        (b"ratio: [1\n", "is not YAML: .*line 2"),
        (b"\xff\xfe\x00", "is not YAML: .*byte 0xff"),
        (b"!!python/object/apply:os.system [true]", "is not YAML: .*could not determine a constructor"),
        (b"method: svd\n", "method is 'svd'; write a mapping such as `method: {name: svd}`"),
        (b"calibration: a.txt\n", "calibration is 'a.txt'; write a mapping such as `calibration: {text: demo}`"),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(LexigramError, match=message) as caught:
        Recipe.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LexigramError, match=r"r\.yaml cannot be read: No such file or directory; check the path"):
        Recipe.read(tmp_path / "r.yaml")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(model="m").ratio = 0.5  # type: ignore[misc]


def test_the_papers_accounting_goes_with_14_bits() -> None:
    """Left open it becomes 14, so that the recipe beside a result says what was stored; another value is refused."""
    recipe = Recipe(model="demo", accounting="paper")
    assert recipe.method == CospadiConfig(coefficient_bits=14)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    with pytest.raises(LexigramError, match="set coefficient_bits to 14"):
        Recipe.parse({"model": "demo", "accounting": "paper", "method": {"name": "cospadi", "coefficient_bits": 16}})
