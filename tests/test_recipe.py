"""Recipes: plain data in and out, which setting wins, and what is said about a wrong key."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lexigram import Calibration, CospadiConfig, LexigramError, QuantizeConfig, Recipe, SvdConfig
from lexigram.methods import (
    METHODS,
    PRESETS,
    CapConfig,
    DoubleSparseConfig,
    LowRankSparseConfig,
    MagnitudeConfig,
    OatsConfig,
    SparseGptConfig,
    WandaConfig,
)
from lexigram.recipe import merge, method_name

BITS = [2, 3, 4, 6, 8, 10, 12, 14, 16]
LOW_RANK = st.builds(SvdConfig, plain=st.booleans(), value_bits=st.sampled_from(BITS))
OTHERS = st.one_of(
    LOW_RANK,
    st.builds(
        QuantizeConfig,
        value_bits=st.sampled_from([None, 2, 3, 4, 6, 8, 16]),
        symmetric=st.booleans(),
        rounding=st.sampled_from(["gptq", "nearest"]),
    ),
    st.builds(MagnitudeConfig, pattern=st.sampled_from(["any", "2:4", "16x16"]), refit=st.booleans()),
    st.builds(WandaConfig, value_bits=st.sampled_from(BITS)),
    st.builds(SparseGptConfig, columns=st.integers(1, 999), order=st.sampled_from(["activation", "natural"])),
    st.builds(
        DoubleSparseConfig,
        density=st.floats(0.01, 1),
        value_bits=st.none() | st.sampled_from(BITS),
        code_penalty=st.floats(0, 9),
        inertia=st.booleans(),
    ),
    st.builds(OatsConfig, rank_share=st.floats(0, 1), rounds=st.integers(1, 99)),
    st.builds(
        LowRankSparseConfig, rank_share=st.none() | st.floats(0, 1), value_bits=st.none() | st.sampled_from(BITS)
    ),
)
CHOOSING = st.builds(
    CapConfig,
    value_bits=st.sampled_from(BITS),
    sparse_weight=st.none() | st.floats(0.001, 1),
    first=st.sampled_from(["uniform", "random", "sigmoid", "largest"]),
    passes=st.integers(0, 3),
)


def dictionaries(**changes: Any) -> st.SearchStrategy[CospadiConfig]:
    return st.builds(
        CospadiConfig,
        rho=st.floats(1, 8),
        coding=st.sampled_from(["htp", "omp"]),
        htp_rounds=st.none() | st.integers(1, 3),
        tolerance=st.sampled_from([0, 1e-3, 1e-12]),
        **changes,
    )


def recipes(**changes: Any) -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        model=st.sampled_from(["demo", "owner/name", "./folder: with # signs", "ünï 'quoted'"]),
        calibration=st.builds(
            Calibration,
            text=st.lists(st.sampled_from(["self", "demo", "a.txt", "null", "1", "yes"]), min_size=1).map(tuple),
            length=st.none() | st.integers(2, 4096),
        ),
        include=st.lists(st.sampled_from(["q_proj", "*.mlp.*"])).map(tuple),
        seed=st.integers(0, 2**40),
        **{"ratio": st.floats(0.01, 0.99), **changes},
    )


FREE = dictionaries(
    value_bits=st.sampled_from(BITS), dictionary_bits=st.sampled_from(BITS), metric=st.sampled_from(["exact", "mean"])
)
FILES = st.sampled_from(["knapsack", "uniform", "a/allocation.json", "null", "1"])


@given(
    st.one_of(
        recipes(method=OTHERS | FREE, allocation=FILES, measure=st.sampled_from(["loss", "relative", "absolute"])),
        recipes(method=OTHERS | FREE, allocation=st.just("knapsack"), refine=st.integers(0, 99)),
        recipes(method=LOW_RANK | FREE, share=st.just("consecutive"), group=st.integers(2, 9), allocation=FILES),
        recipes(method=LOW_RANK | FREE, share=st.sampled_from(["matched", "site"]), allocation=FILES),
        recipes(method=OTHERS | FREE, sequential=st.booleans(), correction=st.floats(0, 1)),
        recipes(method=OTHERS | FREE, ratio=st.none(), bits=st.floats(0.01, 15.99)),
        recipes(method=OTHERS | FREE, ratio=st.none(), size=st.sampled_from(["4GB", "1.5 gib", "2e9", "12345"])),
        recipes(method=LOW_RANK | FREE, share=st.just("site"), sequential=st.booleans()),
        recipes(method=CHOOSING, allocation=st.sampled_from(["global", "uniform", "a/allocation.json"])),
        recipes(method=CHOOSING, accounting=st.sampled_from(["bytes", "paper"])),
        recipes(
            method=LOW_RANK | dictionaries() | dictionaries(value_bits=st.just(14), dictionary_bits=st.just(16)),
            accounting=st.just("paper"),
            allocation=st.sampled_from(["uniform", "a/allocation.json"]),
        ),
    )
)
@settings(max_examples=200, deadline=None)
def test_yaml_round_trip(recipe: Recipe) -> None:
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_written_recipe_leaves_nothing_to_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe(model="demo").to_yaml(), encoding="utf-8")
    content = Recipe.read(file)
    assert content.keys() == Recipe.model_fields.keys()
    assert content["method"].keys() == CospadiConfig.model_fields.keys()
    assert content["calibration"].keys() == Calibration.model_fields.keys()


def merged(
    content: dict[str, Any],
    *,
    preset: str | None = None,
    method: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    **settings: Any,
) -> Recipe:
    """What a recipe's content and options give, for the model `demo`."""
    return merge(
        content,
        preset=preset,
        method=method or {},
        calibration=calibration or {},
        settings={"model": "demo", **settings},
    )


def test_options_win_over_the_preset_over_the_recipe_over_defaults() -> None:
    content = {
        "ratio": 0.4,
        "seed": 5,
        "method": {"coding": "htp", "rho": 3.0},
        "calibration": {"length": 99, "seed": 8},
    }
    got = merged(
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


@pytest.mark.parametrize("content", [{}, {"seed": 5, "calibration": {"seed": 8}}])
def test_a_seed_is_for_the_calibration_too_unless_that_has_its_own(content: dict[str, Any]) -> None:
    both = merged(content, calibration={"seed": None}, seed=3)
    assert (both.seed, both.calibration.seed) == (3, 3)
    each = merged(content, calibration={"seed": 0}, seed=3)
    assert (each.seed, each.calibration.seed) == (3, 0)
    neither = merged(content, calibration={"seed": None}, seed=None)
    assert (neither.seed, neither.calibration.seed) == ((5, 8) if content else (42, 0))


def test_without_anything_the_defaults_are_the_fast_preset() -> None:
    assert merged({}) == Recipe(model="demo", method=PRESETS["fast"]) == Recipe(model="demo")
    assert merged({}, preset="published").method == PRESETS["published"]


def test_another_method_on_the_command_line_leaves_the_recipes_options_behind() -> None:
    got = merged({"method": {"name": "cospadi", "rho": 3.0}, "ratio": 0.4}, method={"name": "svd"})
    assert got.method == SvdConfig()
    assert got.ratio == 0.4
    kept = merged({"method": {"name": "svd", "plain": True}}, method={"name": "svd"})
    assert kept.method == SvdConfig(plain=True)


def test_a_recipe_that_names_no_method_means_the_default_one() -> None:
    content = {"method": {"rho": 3.0}}
    assert merged(content, method={"name": "cospadi"}).method == CospadiConfig(rho=3.0)
    assert merged(content, method={"name": "svd"}).method == SvdConfig()


def test_merging_leaves_what_it_is_given_as_it_was() -> None:
    content = {"method": {"name": "cospadi", "rho": 3.0}, "calibration": {"seed": 8}, "ratio": 0.4}
    before = copy.deepcopy(content)
    merged(content, preset="published", method={"rho": 4.0}, calibration={"length": 99}, seed=3, ratio=0.5)
    assert content == before


@pytest.mark.parametrize(
    ("content", "ratio", "bits", "size", "said"),
    [
        ({}, 0.2, None, None, "ratio 0.2"),
        ({"ratio": None}, 0.2, None, None, "ratio 0.2"),
        ({"ratio": 0.75, "bits": None}, 0.75, None, None, "ratio 0.75"),
        ({"bits": 4.25}, None, 4.25, None, "4.25 bits a weight"),
        ({"ratio": None, "size": "4GB"}, None, None, "4GB", "size 4GB"),
        ({"size": 4_000_000_000}, None, None, "4000000000", "size 4000000000"),
    ],
)
def test_a_recipe_has_one_amount(
    content: dict[str, Any], ratio: float | None, bits: float | None, size: str | None, said: str
) -> None:
    recipe = Recipe.parse({"model": "m", **content})
    assert (recipe.ratio, recipe.bits, recipe.size, recipe.amount) == (ratio, bits, size, said)
    assert Recipe.parse(recipe.model_dump()) == recipe


def test_a_preset_beside_another_method_is_refused_and_wins_over_a_recipes_method() -> None:
    with pytest.raises(LexigramError, match=r"--preset fast is a solver of cospadi; leave it out for the method svd"):
        merged({}, preset="fast", method={"name": "svd"})
    assert merged({"method": {"name": "svd"}}, preset="fast").method == PRESETS["fast"]


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
            "unknown key 'method.rho' of the method svd; the keys here are " + ", ".join(SvdConfig.model_fields),
        ),
        ({"zzzz": 1}, "unknown key 'zzzz'; the keys here are model, method, ratio,"),
        ({"method": {"name": "cospady"}}, "unknown method 'cospady'; the methods are " + ", ".join(METHODS)),
        ({"ratio": 1}, "ratio is 1; it should be less than 1"),
        ({"ratio": 0}, "ratio is 0; it should be greater than 0"),
        ({"ratio": float("nan")}, "ratio is nan; it should be "),
        ({"ratio": "much"}, "ratio is 'much'; it should be a valid number"),
        ({"bits": 0}, "bits is 0; it should be greater than 0"),
        ({"bits": 16}, "bits is 16; it should be less than 16"),
        ({"bits": float("nan")}, "bits is nan; it should be "),
        ({"size": "4 apples"}, "size is '4 apples'; it should be a size such as 4GB, 800MB or 2GiB"),
        ({"size": -5}, "size is -5; it should be a size such as 4GB"),
        ({"size": True}, "size is True; it should be a valid string"),
        (
            {"ratio": 0.2, "size": "4GB"},
            "ratio 0.2 and size 4GB each say how much is to be left; give one of them",
        ),
        (
            {"ratio": 0.3, "bits": 4, "size": 10**9},
            "ratio 0.3 and bits 4.0 and size 1000000000 each say how much is to be left; give one of them",
        ),
        (
            {"accounting": "paper", "bits": 4.25},
            "the accounting `paper` counts parameters, and bits and size count stored bytes; leave the accounting out, or give",
        ),
        ({"accounting": "paper", "size": "4GB"}, "the accounting `paper` counts parameters, and bits and size count"),
        ({"method": {"name": "cospadi", "rho": 0.5}}, "method.rho is 0.5; it should be greater than or equal to 1"),
        (
            {"method": {"name": "cospadi", "coding": "OMP"}},
            "method.coding is 'OMP'; it should be 'htp', 'omp' or 'threshold'",
        ),
        ({"calibration": {"length": 1}}, "calibration.length is 1; it should be greater than or equal to 2"),
        (
            {"method": {"name": "cospadi", "dictionary_bits": 5}},
            "method.dictionary_bits is 5; it should be 2, 3, 4, 6, 8, 10, 12, 14 or 16",
        ),
        (
            {"method": {"name": "quantize", "group": 64}},
            "unknown key 'method.group' of the method quantize; did you mean 'value_group'?",
        ),
        ({"group": 1}, "group is 1; it should be greater than or equal to 2"),
        ({"share": "all"}, "share is 'all'; it should be 'none', 'consecutive', 'matched' or 'site'"),
        ({"measure": "kl"}, "measure is 'kl'; it should be 'loss', 'relative' or 'absolute'"),
        (
            {"share": "consecutive", "sequential": True},
            "sequential calibration needs a layer's factors before the next layer is run, and share 'consecutive' gives",
        ),
        ({"share": "matched", "sequential": True}, "sequential calibration needs a layer's factors before the next"),
        (
            {"accounting": "paper", "allocation": "knapsack"},
            "the allocation knapsack counts stored bytes; leave the accounting",
        ),
        ({"share": "matched", "group": 3}, "share 'matched' takes no group; leave group out, or share consecutive"),
        (
            {"method": {"name": "wanda"}, "share": "site"},
            "the method wanda shares nothing between matrices; leave share and group out",
        ),
        (
            {"method": {"name": "cap"}, "allocation": "knapsack"},
            "the method cap chooses by itself; take the allocation global or uniform",
        ),
        (
            {"method": {"name": "cap"}, "sequential": True},
            "the method cap chooses over the original model's layers together; leave sequential out",
        ),
        (
            {"method": {"name": "svd"}, "allocation": "global"},
            "the allocation global is not for svd; take uniform, knapsack or a file",
        ),
        (
            {"method": {"name": "lowrank-sparse"}, "accounting": "paper"},
            "the allocation knapsack counts stored bytes; leave the accounting `paper` out, or take uniform",
        ),
        (
            {"method": {"name": "wanda", "pattern": "bad"}},
            "method.pattern is 'bad'; write any, rows, N:M such as 2:4, or RxC such as 16x16",
        ),
        (
            {"method": {"name": "double-sparse", "penalty": "l1", "code_penalty": 1}},
            "sizes of one side alone have no price",
        ),
        (
            {"method": {"name": "oats", "rank_share": 1.5}},
            "method.rank_share is 1.5; it should be less than or equal to 1",
        ),
        ({"method": {"name": "cap", "sparse_weight": 0}}, "method.sparse_weight is 0; it should be greater than 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it should be 'bfloat16', 'float16' or 'float32'"),
        ({"model": None}, "model is None; it should be a valid string"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_would_do(content: dict[str, Any], message: str) -> None:
    with pytest.raises(LexigramError) as caught:
        Recipe.parse({"model": "m", **content}, "r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {message}")
    assert "\n" not in str(caught.value)


def test_a_value_from_an_option_is_named_by_that_and_any_other_by_its_file_and_key() -> None:
    asked: list[list[str]] = []

    def option_of(path: Sequence[str]) -> str | None:
        asked.append(list(path))
        return "--ratio" if list(path) == ["ratio"] else None

    for content, said in (
        ({"ratio": 2}, "--ratio is 2; it should be less than 1"),
        ({"seed": -1}, "r.yaml: seed is -1; it should be greater than or equal to 0"),
        ({"calibration": {"length": 1}}, "r.yaml: calibration.length is 1; it should be"),
        ({"method": {"name": "svd", "value_bits": 5}}, "r.yaml: method.value_bits is 5; it should be"),
        ({"include": ["q", 3]}, "r.yaml: include.1 is 3; it should be"),
    ):
        with pytest.raises(LexigramError, match=rf"^{re.escape(said)}"):
            Recipe.parse({"model": "m", **content}, "r.yaml", option_of)
    assert asked == [["ratio"], ["seed"], ["calibration", "length"], ["method", "value_bits"], ["include", "1"]]


@pytest.mark.parametrize(
    ("content", "preset", "option", "name"),
    [
        ({}, None, None, "cospadi"),
        ({"method": None}, None, None, "cospadi"),
        ({"method": {"rho": 3}}, None, None, "cospadi"),
        ({"method": {"name": "svd"}}, None, None, "svd"),
        ({"method": {"name": "svd"}}, "published", None, "cospadi"),
        ({"method": {"name": "svd"}}, None, "wanda", "wanda"),
    ],
)
def test_the_method_is_that_of_the_option_the_preset_the_file_or_the_default(
    content: dict[str, Any], preset: str | None, option: str | None, name: str
) -> None:
    assert method_name(content, preset=preset, option=option) == name
    assert merged(content, preset=preset, method={"name": option}).method.name == name


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


def test_the_papers_accounting_goes_with_14_bits_and_a_bfloat16_dictionary() -> None:
    """Left open they become that, so that the recipe beside a result says what was stored; other values are refused."""
    recipe = Recipe(model="demo", accounting="paper")
    assert recipe.method == CospadiConfig(value_bits=14, dictionary_bits=16)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    for options in ({"value_bits": 14}, {"dictionary_bits": 16}, {"value_bits": 14, "dictionary_bits": 16}):
        given = Recipe.parse({"model": "demo", "accounting": "paper", "method": {"name": "cospadi", **options}})
        assert given == recipe
    for key, right, wrong in (("value_bits", 14, 16), ("value_bits", 14, 8), ("dictionary_bits", 16, 8)):
        with pytest.raises(LexigramError, match=f"stores {key} of {right}; set {key} to that, or leave it out"):
            Recipe.parse({"model": "demo", "accounting": "paper", "method": {"name": "cospadi", key: wrong}})
    published = merged({}, preset="published", accounting="paper")
    assert published.method == PRESETS["published"]
    assert merged({}, method={"name": "svd"}, accounting="paper").method == SvdConfig()


@pytest.mark.parametrize(
    ("method", "allocation"),
    [("cap", "global"), ("lowrank-sparse", "knapsack"), ("oats", "uniform"), ("wanda", "uniform"), ("svd", "uniform")],
)
def test_a_method_brings_its_allocation_along_unless_one_is_asked_for(method: str, allocation: str) -> None:
    recipe = Recipe.parse({"model": "m", "method": {"name": method}})
    assert recipe.allocation == allocation
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe.parse({"model": "m", "method": {"name": method}, "allocation": "uniform"}).allocation == "uniform"


def test_the_papers_accounting_is_not_for_quantised_weights() -> None:
    with pytest.raises(LexigramError, match="quantisation removes none"):
        Recipe.parse({"model": "m", "accounting": "paper", "method": {"name": "quantize"}})


def test_a_preset_gives_way_to_the_papers_accounting_where_it_only_repeats_a_default() -> None:
    found = merge({}, preset="fast", method={}, calibration={}, settings={"model": "m", "accounting": "paper"})
    assert (found.method.value_bits, found.method.dictionary_bits) == (14, 16)


def test_a_group_asks_for_consecutive_layers_beside_a_complete_recipe_too() -> None:
    complete = Recipe(model="m").model_dump(mode="json")
    found = merge(complete, preset=None, method={}, calibration={}, settings={"model": "m", "group": 3})
    assert (found.share, found.group) == ("consecutive", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": {"name": "quantize"}, "share": "site"}, "quantize shares nothing"),
        ({"method": {"name": "cospadi", "update": "ksvd"}, "group": 2}, "knows one metric only"),
        ({"method": {"name": "cospadi", "coding": "threshold"}, "share": "matched"}, "knows one metric only"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_work(content: dict[str, Any], message: str) -> None:
    with pytest.raises(LexigramError, match=message):
        Recipe.parse({"model": "m", **content})
