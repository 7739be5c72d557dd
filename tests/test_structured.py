"""Structured pruning: losses against least squares on the inputs themselves, forms against all forms, and models in which
nothing reads a dropped channel.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedModel

import lexigram
from conftest import TOYS, build_toy, toy_folder, words_tokenizer
from lexigram import LexigramError, Recipe, cli, compress, plan
from lexigram.allocation.matching import coupled
from lexigram.allocation.units import Allocation
from lexigram.factors import DenseSpec, GroupSpec, Sparse, SparseSpec
from lexigram.gram import Gram
from lexigram.linalg.channels import AsTheyStand, Losses, Refitted, choose_blocks, damped, refit_columns
from lexigram.methods import Budget, BudgetTooSmallError, FitReport, Member, SvdConfig, fit, fit_group, layout
from lexigram.methods.base import couples, layout_group
from lexigram.methods.structured import StructuredConfig
from lexigram.targets import Target, find_targets
from lexigram.transformers_io import FactoredLinear

ATTENTION = [(32, 24), (16, 24), (16, 24), (24, 32)]
"""Four heads of 8 channels, two key/value heads: q, k, v and o of a model 24 wide."""

MLP = [(20, 24), (20, 24), (24, 20)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, tokens: int = 200, seed: int = 2) -> Tensor:
    """Correlated, over one order of magnitude."""
    mixing = torch.linalg.qr(normal(width, width, seed=1)).Q
    return normal(tokens, width, seed=seed) * torch.logspace(0, -1, width) @ mixing


def gram_of(X: Tensor) -> Gram:
    return Gram(X.double().T @ X.double(), len(X))


def members(shapes: list[tuple[int, int]], tokens: int = 200) -> list[Member]:
    """Producers on one input, and the consumer on another."""
    one, other = gram_of(inputs(shapes[0][1], tokens)), gram_of(inputs(shapes[-1][1], tokens, seed=3))
    weights = [normal(*shape, seed=10 + index) for index, shape in enumerate(shapes)]
    return [Member(weight, other if weight is weights[-1] else one) for weight in weights]


def laid_out(
    shapes: list[tuple[int, int]], head_dim: int, ratio: float, config: StructuredConfig | None = None
) -> GroupSpec:
    budget = Budget(int((1 - ratio) * sum(2 * rows * cols for rows, cols in shapes)))
    return layout_group(config or StructuredConfig(), shapes, budget, "unused", head_dim)


def fitted(config: StructuredConfig, group: list[Member], spec: GroupSpec) -> tuple[list[Sparse], list[FitReport]]:
    found = fit_group(config, group, spec, torch.Generator().manual_seed(0))
    assert found.shared is None
    factors = [factor for factor, _ in found.members]
    for factor, own in zip(factors, spec.members, strict=True):
        assert isinstance(factor, Sparse)
        assert factor.spec == own
        factor.check()
    return factors, [report for _, report in found.members]


def columns_kept(factor: Sparse) -> list[bool]:
    support = factor.support()
    assert torch.equal(support, support[:1].expand_as(support))
    return support[0].tolist()


def rows_kept(factor: Sparse) -> list[bool]:
    support = factor.support()
    assert torch.equal(support, support[:, :1].expand_as(support))
    return support[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------ what a block costs


def error_without(weight: Tensor, X: Tensor, dropped: list[int], width: int, refit: bool) -> float:
    """``||X W^T - X V^T||^2`` of the best ``V``, or of ``W`` itself, without the columns of these blocks; in numpy."""
    W, inside = weight.double().numpy(), X.double().numpy()
    gone = [column for block in dropped for column in range(block * width, (block + 1) * width)]
    kept = [column for column in range(W.shape[1]) if column not in gone]
    wanted: NDArray[np.float64] = inside @ W.T
    values = np.linalg.lstsq(inside[:, kept], wanted, rcond=None)[0] if refit else W[:, kept].T
    return float(np.square(wanted - inside[:, kept] @ values).sum())


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_a_score_is_what_the_error_grows_by(width: int, refit: bool) -> None:
    weight, X = normal(7, 12), inputs(12)
    losses: Losses = (Refitted if refit else AsTheyStand)(weight, gram_of(X).matrix, width)
    blocks, gone = 12 // width, list[int]()
    for block in torch.randperm(blocks, generator=torch.Generator().manual_seed(3)).tolist()[:-1]:
        before = error_without(weight, X, gone, width, refit)
        scores = losses.scores()
        for other in set(range(blocks)) - set(gone):
            after = error_without(weight, X, [*gone, other], width, refit)
            assert float(scores[other]) == pytest.approx(after - before, rel=1e-6, abs=1e-8)
        losses.drop(block)
        gone.append(block)


@pytest.mark.parametrize("refit", [False, True])
def test_one_at_a_time_is_nearly_the_best_set_of_all(refit: bool) -> None:
    """Against every set of four of ten; the mean over weights, as a single one may be unlucky."""
    shares = []
    for seed in range(8):
        weight, X = normal(5, 10, seed=seed), inputs(10, seed=seed)
        losses = (Refitted if refit else AsTheyStand)(weight, gram_of(X).matrix, 1)
        kept = choose_blocks(losses, 6)
        found = error_without(weight, X, (~kept).nonzero().flatten().tolist(), 1, refit)
        sets = (list(dropped) for dropped in itertools.combinations(range(10), 4))
        best = min(error_without(weight, X, dropped, 1, refit) for dropped in sets)
        assert best <= found * (1 + 1e-9)
        shares.append(found / best)
    assert float(np.mean(shares)) < 1.1


def test_of_two_channels_that_can_stand_for_each_other_one_stays() -> None:
    """Refitted, either of them is worth nothing as long as the other is there."""
    X = inputs(8)
    X[:, 5] = X[:, 2] + 1e-3 * normal(200, seed=9)
    weight = normal(6, 8)
    weight[:, [2, 5]] *= 5
    kept = choose_blocks(Refitted(weight, gram_of(X).matrix, 1), 4)
    assert int(kept[[2, 5]].sum()) == 1


class Fixed:
    """Losses that do not change."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.gone = torch.tensor(values), list[int]()

    def scores(self) -> Tensor:
        return self.values

    def drop(self, block: int) -> None:
        self.gone.append(block)


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_so_many_blocks_in_so_many_groups(data: st.DataObject, together: int, groups: int) -> None:
    blocks = together * groups
    most = data.draw(st.integers(1, groups))
    kept = data.draw(st.integers(1, most * together))
    values = data.draw(st.lists(st.floats(-1, 1), min_size=blocks, max_size=blocks))
    losses = Fixed(values)
    alive = choose_blocks(losses, kept, together=together, groups=most)
    assert int(alive.sum()) == kept
    assert int(alive.view(groups, together).any(1).sum()) <= most
    assert sorted(losses.gone) == (~alive).nonzero().flatten().tolist()
    if most == groups:
        assert sorted(losses.values[alive].tolist()) == sorted(losses.values.tolist())[blocks - kept :]


@pytest.mark.parametrize(("kept", "groups"), [(5, 2), (3, 1), (-1, 2), (1, 3)])
def test_more_than_there_is_room_for_cannot_be_kept(kept: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {kept} of 4 blocks in {groups} groups of 2"):
        choose_blocks(Fixed([1.0] * 4), kept, together=2, groups=groups)


def test_refitted_columns_are_those_of_least_squares() -> None:
    weight, X = normal(7, 12).double(), inputs(12).double()
    kept = torch.tensor([True, False, True, True] * 3)
    values = refit_columns(weight, gram_of(X).matrix, kept)
    best = torch.linalg.lstsq(X[:, kept], X @ weight.T).solution.T
    assert torch.allclose(values[:, kept], best, atol=1e-8)
    assert not values[:, ~kept].any()


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [5, 200])
def test_a_refit_never_raises_the_error_of_a_row(damping: float, tokens: int) -> None:
    weight, X = normal(7, 12).double(), inputs(12, tokens).double()
    kept = torch.tensor([True, False, True, True] * 3)
    matrix = gram_of(X).matrix
    values = refit_columns(weight, damped(matrix, damping), kept)

    def errors(V: Tensor) -> Tensor:
        return (X @ (weight - V).T).square().sum(0)

    assert bool((errors(values) <= errors(weight * kept) * (1 + 1e-9)).all())


def test_what_is_no_gram_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive semi-definite"):
        damped(torch.diag(torch.tensor([1.0, -1.0, 1.0])), 0.01)
    with pytest.raises(ValueError, match="not finite"):
        damped(torch.full((2, 2), torch.inf), 0.01)
    with pytest.raises(ValueError, match="not positive definite; damp it"):
        Refitted(normal(3, 4), torch.zeros(4, 4), 1)
    with pytest.raises(ValueError, match=r"a Gram \(3, 3\) does not fit a weight \(3, 4\)"):
        AsTheyStand(normal(3, 4), torch.eye(3), 1)
    with pytest.raises(ValueError, match="4 columns are not whole blocks of 3"):
        Refitted(normal(3, 4), torch.eye(4), 3)


# ----------------------------------------------------------------------------------------------------------------- the form


def bytes_by_hand(heads: int, groups: int, kept: int, kept_groups: int, width: int, hidden: int) -> int:
    """q and o, k and v: values in two bytes and a bit for every head, in whole bytes; few heads may be cheaper listed."""

    def one(count: int, of: int) -> int:
        return 2 * count * width * hidden + -(-of // 8)

    return 2 * one(kept, heads) + 2 * one(kept_groups, groups)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.floats(0.02, 0.95))
@settings(max_examples=200, deadline=None)
def test_as_many_heads_as_a_budget_has_room_for_and_then_as_many_that_they_share(
    together: int, groups: int, width: int, ratio: float
) -> None:
    width, hidden, heads = 2 * width, 12, together * groups
    shapes = [(heads * width, hidden), *[(groups * width, hidden)] * 2, (hidden, heads * width)]
    amount = int((1 - ratio) * sum(2 * rows * cols for rows, cols in shapes))
    # Of all forms in which the kept heads fit into their groups; the index takes at most the bitmask's bytes.
    forms = {
        (kept, few): bytes_by_hand(heads, groups, kept, few, width, hidden)
        for kept in range(1, heads + 1)
        for few in range(1, groups + 1)
        if few <= kept <= few * together
    }
    fitting = [form for form, size in forms.items() if size <= amount]
    try:
        spec = layout_group(StructuredConfig(), shapes, Budget(amount), "unused", width)
    except BudgetTooSmallError:
        assert not fitting
        return
    assert spec.bytes <= amount
    q, k, v, o = spec.members
    assert isinstance(q, SparseSpec)
    assert isinstance(k, SparseSpec)
    assert isinstance(o, SparseSpec)
    assert v == k
    found = q.nonzeros // (width * hidden), k.nonzeros // (width * hidden)
    assert found == max(fitting) if fitting else sum(forms[found]) > amount
    assert (q.block, o.block) == ((width, hidden), (hidden, width))
    assert o.nonzeros == q.nonzeros


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.6])
@pytest.mark.parametrize(("shapes", "head_dim"), [(ATTENTION, 8), (MLP, 1), (MLP[1:], 1), ([MLP[2]], 1)])
def test_stored_bytes_are_those_of_the_form(
    shapes: list[tuple[int, int]], head_dim: int, ratio: float, bits: Any
) -> None:
    budget = int((1 - ratio) * sum(2 * rows * cols for rows, cols in shapes))
    config = StructuredConfig(value_bits=bits, refit=True)
    spec = laid_out(shapes, head_dim, ratio, config)
    factors, _ = fitted(config, members(shapes), spec)
    stored = sum(tensor.nbytes for factor in factors for tensor in factor.state_dict().values())
    assert stored == spec.bytes <= budget


def test_the_papers_parameters_are_the_kept_rows_and_columns() -> None:
    spec = layout_group(StructuredConfig(), MLP, Budget(3 * 24 * 13, "parameters"), "unused")
    assert spec.parameters == 3 * 24 * 13


def test_the_smallest_form_is_one_head() -> None:
    with pytest.raises(BudgetTooSmallError, match="lower the ratio") as error:
        laid_out(ATTENTION, 8, 0.99)
    needed = error.value.needed
    assert layout_group(StructuredConfig(), ATTENTION, Budget(needed), "unused", 8).bytes == needed
    with pytest.raises(BudgetTooSmallError):
        layout_group(StructuredConfig(), ATTENTION, Budget(needed - 1), "unused", 8)


@pytest.mark.parametrize(
    ("shapes", "head_dim"),
    [
        ([(48, 24), (24, 32)], 8),  # fused, or not of this consumer
        ([(32, 24), (16, 24), (8, 24), (24, 32)], 8),  # two numbers of heads that are shared
        ([(24, 24), (24, 32)], 8),  # three heads cannot serve four equally
        ([(32, 24), (24, 32)], 5),
    ],
)
def test_shapes_that_do_not_couple_are_refused(shapes: list[tuple[int, int]], head_dim: int) -> None:
    with pytest.raises(ValueError, match="not the two sides of the same channels"):
        layout_group(StructuredConfig(), shapes, Budget(10_000), "unused", head_dim)


# ------------------------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("refit", [False, True])
def test_rows_go_with_the_columns_that_read_them(refit: bool) -> None:
    factors, reports = fitted(StructuredConfig(refit=refit), group := members(MLP), laid_out(MLP, 1, 0.4))
    *producers, down = factors
    kept = columns_kept(down)
    assert 0 < sum(kept) < 20
    for factor, member in zip(producers, group, strict=False):
        assert rows_kept(factor) == kept
        assert torch.equal(factor.to_dense(), (member.weight * torch.tensor(kept)[:, None]).bfloat16().float())
    if not refit:
        assert torch.equal(down.to_dense(), (group[-1].weight * torch.tensor(kept)).bfloat16().float())
    assert {report.message for report in reports[:-1]} == {f"{sum(kept)} of 20 channels kept"}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35, 0.5, 0.6])
def test_a_key_value_head_stays_where_a_query_head_reads_it(ratio: float, refit: bool) -> None:
    spec = laid_out(ATTENTION, 8, ratio)
    (q, k, v, o), _ = fitted(StructuredConfig(refit=refit), members(ATTENTION), spec)
    heads = torch.tensor(columns_kept(o)).view(4, 8)
    assert torch.equal(heads.all(1), heads.any(1))
    assert rows_kept(q) == columns_kept(o)
    shared = torch.tensor(rows_kept(k)).view(2, 8)
    assert rows_kept(v) == rows_kept(k)
    assert bool(shared.all(1)[heads.any(1).view(2, 2).any(1)].all())
    assert int(shared.sum()) * 24 == spec.members[1].parameters


def test_the_heads_that_lose_least_go_whatever_the_queries_are() -> None:
    """Head 2 has a consumer of zeros and head 3 no input; both share the second key/value head, which goes with them."""
    group = members(ATTENTION)
    X = inputs(32, seed=3)
    X[:, 24:] = 0
    group[-1].weight[:, 16:24] = 0
    group[-1] = Member(group[-1].weight, gram_of(X))
    for refit in (False, True):
        spec = laid_out(ATTENTION, 8, 0.49)
        (q, k, _, o), reports = fitted(StructuredConfig(refit=refit), group, spec)
        assert columns_kept(o) == [True] * 16 + [False] * 16
        assert rows_kept(q) == columns_kept(o)
        assert rows_kept(k) == [True] * 8 + [False] * 8
        assert reports[-1].relative_error < 2**-8, "only rounding"


@pytest.mark.parametrize("refit", [False, True])
def test_channels_without_inputs_or_without_weight_go_first(refit: bool) -> None:
    group = members(MLP)
    X = inputs(20, seed=3)
    X[:, [3, 11]] = 0
    group[-1].weight[:, [7, 19]] = 0
    group[-1] = Member(group[-1].weight, gram_of(X))
    config = StructuredConfig(refit=refit)
    spec = laid_out(MLP, 1, 0.19)
    factors, reports = fitted(config, group, spec)
    assert [index for index, kept in enumerate(columns_kept(factors[-1])) if not kept] == [3, 7, 11, 19]
    assert reports[-1].relative_error < 2**-8


@pytest.mark.parametrize(("shapes", "head_dim"), [(ATTENTION, 8), (MLP, 1)])
def test_the_error_reported_is_that_of_the_outputs_and_a_refit_lowers_it(
    shapes: list[tuple[int, int]], head_dim: int
) -> None:
    group, spec = members(shapes), laid_out(shapes, head_dim, 0.4)
    X, weight = inputs(shapes[-1][1], seed=3).double(), group[-1].weight.double()
    errors = []
    for refit in (False, True):
        factors, reports = fitted(StructuredConfig(refit=refit), group, spec)
        lost = X @ (weight - factors[-1].to_dense(torch.float64)).T
        errors.append(float(lost.norm() / (X @ weight.T).norm()))
        assert reports[-1].relative_error == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] < 0.98 * errors[0]


def test_more_bytes_hurt_less() -> None:
    for refit in (False, True):
        found = [
            fitted(StructuredConfig(refit=refit), members(MLP), laid_out(MLP, 1, ratio))[1][-1].relative_error
            for ratio in (0.1, 0.3, 0.5, 0.8)
        ]
        assert found == sorted(found)


@pytest.mark.parametrize("refit", [False, True])
def test_no_inputs_and_weights_of_zeros(refit: bool) -> None:
    config, spec = StructuredConfig(refit=refit), laid_out(MLP, 1, 0.4)
    silent = [Member(member.weight, Gram(torch.zeros_like(member.gram.matrix), 5)) for member in members(MLP)]
    zeros = [Member(torch.zeros_like(member.weight), member.gram) for member in members(MLP)]
    for group in (silent, zeros, members(MLP, tokens=3)):
        factors, reports = fitted(config, group, spec)
        assert all(bool(factor.to_dense().isfinite().all()) for factor in factors)
        assert all(0 <= report.relative_error < 1 for report in reports)
    broken = members(MLP)
    broken[1].weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 values that are not finite"):
        fit_group(config, broken, spec, torch.Generator())


def test_a_matrix_alone_loses_whole_columns() -> None:
    weight, X = normal(24, 20), inputs(20)
    spec = layout(StructuredConfig(), (24, 20), Budget(600))
    factor, report = fit(StructuredConfig(refit=True), weight, gram_of(X), spec, torch.Generator())
    assert isinstance(factor, Sparse)
    assert sum(columns_kept(factor)) == 12
    assert 0 < report.relative_error < 1


def test_forms_that_were_not_laid_out_together_are_refused() -> None:
    gate, up, down = laid_out(MLP, 1, 0.4).members
    other = laid_out(MLP, 1, 0.6).members
    assert isinstance(down, SparseSpec)
    entries = SparseSpec(rows=24, cols=20, nonzeros=down.nonzeros)
    for specs in (
        (gate, up, DenseSpec(rows=24, cols=20)),
        (gate, other[1], down),
        (gate, up, entries),
        (gate, entries),
    ):
        with pytest.raises(ValueError, match=r"make the allocation again|two sides of the same channels"):
            fit_group(StructuredConfig(), members(MLP)[-len(specs) :], GroupSpec(members=specs), torch.Generator())


# ------------------------------------------------------------------------------------------------------ what stands together


def skeleton(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(TOYS[name](), attn_implementation="eager")


def kinds(groups: list[tuple[str, ...]]) -> list[list[str]]:
    return [[name.rsplit(".", 1)[-1] for name in group] for group in groups]


LLAMA = [["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]] * 2


@pytest.mark.parametrize("name", sorted(TOYS.keys() - {"gpt2"}))
def test_what_makes_the_inputs_of_a_matrix_stands_with_it(name: str) -> None:
    targets = find_targets(skeleton(name))
    groups = coupled(targets)
    expected = [["q_proj", "k_proj", "v_proj", "dense"], ["fc1", "fc2"]] * 2 if name == "phi" else LLAMA
    assert kinds(groups) == expected
    assert sorted(itertools.chain(*groups)) == sorted(target.name for target in targets)
    assert {target.head_dim for target in targets if "attn" in target.name} == {16}
    assert {target.head_dim for target in targets if "mlp" in target.name} == {1}


def test_some_of_a_module_will_do() -> None:
    found = coupled(find_targets(skeleton("llama"), include=["q_proj", "o_proj", "up_proj", "down_proj"]))
    assert kinds(found) == [["q_proj", "o_proj"], ["up_proj", "down_proj"]] * 2
    assert kinds(coupled(find_targets(skeleton("gpt2"), include=["*.mlp.*"]))) == [["c_fc", "c_proj"]] * 2


@pytest.mark.parametrize(
    ("name", "include", "said"),
    [
        ("gpt2", (), r"c_attn \(192, 64\), c_proj \(64, 64\) in transformer.h.0.attn \(and 1 more modules\)"),
        ("llama", ("down_proj",), r"down_proj \(64, 128\) in model.layers.0.mlp \(and 1 more modules\)"),
        ("llama", ("*.0.*.gate_proj", "*.0.*.up_proj"), r"up_proj \(128, 64\) in model.layers.0.mlp cannot"),
        ("llama", ("lm_head",), "lm_head"),
    ],
)
def test_what_stands_with_nothing_is_refused(name: str, include: tuple[str, ...], said: str) -> None:
    with pytest.raises(LexigramError, match=said + ".*--exclude"):
        coupled(find_targets(skeleton(name), include))


def test_the_inputs_maker_may_stand_after_it_in_the_model() -> None:
    def target(kind: str, shape: tuple[int, int], site: str) -> Target:
        return Target(f"layers.0.mlp.{kind}", shape, 0, f"layers.0.mlp.{site}", transposed=False, bias=False)

    mixed = [target("w1", (16, 8), "w1"), target("w2", (8, 16), "w2"), target("w3", (16, 8), "w1")]
    assert kinds(coupled(mixed)) == [["w1", "w3", "w2"]]
    assert kinds(coupled([mixed[1], mixed[0], mixed[2]])) == [["w1", "w3", "w2"]]
    three = [target(kind, (8, 8), "q") for kind in "qkv"]
    with pytest.raises(LexigramError, match="cannot lose channels together"):
        coupled([*three, target("o", (8, 8), "o")])  # an attention that does not tell its heads


def recipe(model: Path, words: Path, **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": str(model),
        "method": {"name": "structured", **changes.pop("options", {})},
        "ratio": 0.4,
        "dtype": "float32",
        "compute_dtype": "float32",
        "device": "cpu",
        "calibration": {"text": [str(words)], "sequences": 8, "length": 64},
    }
    return Recipe.parse({**content, **changes})


SAMPLED = {"text": "self", "sequences": 4, "length": 32}
"""Calibration without text, for Qwen2, whose own tokenizer class does not know the toys' words."""


def test_heads_under_one_norm_are_refused(tmp_path: Path, words: Path) -> None:
    """OLMo 2 divides the queries of all heads by one norm, so that none can go without changing the others."""
    config = Olmo2Config(**{key: getattr(TOYS["llama"](), key) for key in ("hidden_size", "vocab_size")})
    config.intermediate_size, config.num_hidden_layers = 128, 2
    config.num_attention_heads, config.num_key_value_heads, config.pad_token_id = 4, 2, 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    words_tokenizer().save_pretrained(tmp_path / "olmo")
    said = r"self_attn.q_norm.weight runs over all outputs of model.layers.0.self_attn.q_proj"
    with pytest.raises(LexigramError, match=said):
        plan(recipe(tmp_path / "olmo", words))
    assert plan(recipe(tmp_path / "olmo", words, exclude=["*.self_attn.*"])).targets


# -------------------------------------------------------------------------------------------------------------- whole models


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).view(2, 20)).logits.float()


def without(original: PreTrainedModel, compressed: PreTrainedModel, rows: bool) -> PreTrainedModel:
    """The original with zeros for the columns that consumers lost, and where asked for the rows that producers lost."""
    for name, module in compressed.named_modules():
        if isinstance(module, FactoredLinear):
            place = original.get_submodule(name)
            factor = module.factors
            assert isinstance(factor, Sparse)
            consumer = factor.spec.block[0] == factor.spec.rows
            keep = factor.support() if rows or consumer else torch.ones(factor.spec.rows, factor.spec.cols)
            keep = keep.T if module.transposed else keep
            place.weight.data = place.weight.data.bfloat16().float() * keep
    return original


@pytest.mark.parametrize("name", sorted(TOYS))
def test_a_loaded_model_is_the_original_without_those_channels(name: str, tmp_path: Path, words: Path) -> None:
    """With the rows of the producers or with them: with their biases, nothing reads what they make."""
    toy = toy_folder(tmp_path / "toy", name)
    changes: dict[str, Any] = {"gpt2": {"include": ["*.mlp.*"]}, "qwen2": {"calibration": SAMPLED}}.get(name, {})
    record = compress(recipe(toy, words, **changes), tmp_path / "out")
    assert record.ratio >= 0.4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = logits_of(loaded)
    for rows in (True, False):
        original = build_toy(name)
        assert not torch.allclose(logits_of(original), found, atol=1e-3)
        assert torch.allclose(logits_of(without(original, loaded, rows)), found, atol=1e-5)
    dense = lexigram.load(tmp_path / "out", dense=True)
    assert torch.allclose(logits_of(dense), found, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "phi"])
def test_biases_of_dropped_channels_are_not_felt(name: str, tmp_path: Path, words: Path) -> None:
    """Random ones: the toys' own are zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_toy(name)
        for parameter, values in model.named_parameters():
            if parameter.endswith("bias"):
                values.data = torch.randn_like(values)
    model.save_pretrained(tmp_path / "toy")
    words_tokenizer().save_pretrained(tmp_path / "toy")
    compress(recipe(tmp_path / "toy", words, calibration=SAMPLED), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits_of(without(model, loaded, rows=True)), logits_of(loaded), atol=1e-4)
    bias = dict(model.named_parameters())
    for key, values in loaded.named_parameters():
        if key.endswith("bias"):
            assert torch.equal(values, bias[key])


@pytest.mark.parametrize("changes", [{}, {"options": {"refit": True}}, {"sequential": True}, {"accounting": "paper"}])
def test_the_ledger_adds_up_and_an_allocation_can_be_replayed(
    changes: dict[str, Any], tmp_path: Path, words: Path
) -> None:
    toy = toy_folder(tmp_path / "toy", "llama")
    wanted = recipe(toy, words, **changes)
    prepared = plan(wanted)
    record = compress(wanted, tmp_path / "out")
    assert prepared.allocation is not None
    assert prepared.bytes_after == record.bytes_after
    assert record.shared == []
    used = Allocation.read(tmp_path / "out" / "allocation.json")
    assert used == prepared.allocation
    assert kinds([unit.members for unit in used.units]) == LLAMA
    if "accounting" in changes:
        assert record.parameter_ratio >= 0.4
    else:
        assert record.ratio >= 0.4
    again = recipe(toy, words, **{**changes, "allocation": str(tmp_path / "out" / "allocation.json")})
    compress(again, tmp_path / "again")
    files = [(tmp_path / folder / "lexigram.safetensors").read_bytes() for folder in ("out", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"allocation": "knapsack"}, "take the allocation uniform"),
        ({"allocation": "global"}, "not for structured"),
        ({"share": "site"}, "structured shares nothing"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], said: str, tmp_path: Path, words: Path) -> None:
    with pytest.raises(LexigramError, match=said):
        recipe(tmp_path, words, **changes)
    assert couples(StructuredConfig())
    assert not couples(SvdConfig())


def test_a_ratio_that_leaves_no_head_is_refused(tmp_path: Path, words: Path) -> None:
    toy = toy_folder(tmp_path / "toy", "llama")
    with pytest.raises(LexigramError, match=r"q_proj \+ .*o_proj .* at ratio 0.9: a budget of .* lower the ratio"):
        plan(recipe(toy, words, ratio=0.9))


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["lexigram", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_on_the_command_line(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, out = toy_folder(tmp_path / "toy", "llama"), tmp_path / "out"
    calibration = ("--calibration", words, "--sequences", 8, "--length", 64, "--device", "cpu")
    chosen = ("--method", "structured", "--refit", "--damping", 0.02, "--ratio", 0.3)
    assert run("compress", toy, "--out", out, *chosen, *calibration, monkeypatch=monkeypatch) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["method"] == {**StructuredConfig(refit=True, damping=0.02).model_dump()}
    assert 0.3 <= record["ratio"] < 0.4
    messages = {layer["kind"]: layer["fit"]["message"] for layer in record["layers"]}
    assert messages["o_proj"].endswith("of 4 heads kept, refitted")
    assert messages["k_proj"].endswith("of 2 heads kept")
    assert messages["gate_proj"].endswith("of 128 channels kept")
    assert logits_of(AutoModelForCausalLM.from_pretrained(out)).isfinite().all()
    assert run("inspect", out, monkeypatch=monkeypatch) == 0
    capsys.readouterr()

    refused = tmp_path / "refused"
    alone = ("--method", "structured", "--include", "down_proj", *calibration)
    assert run("compress", toy, "--out", refused, *alone, monkeypatch=monkeypatch) not in (0, None)
    assert "down_proj (64, 128) in model.layers.0.mlp" in capsys.readouterr().err
    assert not refused.exists()
