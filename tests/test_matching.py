"""Groups of targets: every target once and in order; pairs against all pairings; distances against the plain formula."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import TOYS
from lexigram.allocation.matching import consecutive, pair_distance, pairs, same_site, siblings
from lexigram.errors import LexigramError
from lexigram.targets import Target, find_targets

_SITES = {
    "self_attn.q_proj": ("self_attn.q_proj", (8, 8)),
    "self_attn.k_proj": ("self_attn.q_proj", (4, 8)),
    "self_attn.v_proj": ("self_attn.q_proj", (4, 8)),
    "self_attn.o_proj": ("self_attn.o_proj", (8, 8)),
    "mlp.gate_proj": ("mlp.gate_proj", (16, 8)),
    "mlp.up_proj": ("mlp.gate_proj", (16, 8)),
    "mlp.down_proj": ("mlp.down_proj", (8, 16)),
}


def _target(name: str, shape: tuple[int, int], layer: int | None, site: str) -> Target:
    return Target(name, shape, layer, site, transposed=False, bias=False)


def _llama(layers: int) -> list[Target]:
    return [
        _target(f"model.layers.{layer}.{place}", shape, layer, f"model.layers.{layer}.{site}")
        for layer in range(layers)
        for place, (site, shape) in _SITES.items()
    ]


def _is_partition(groups: list[tuple[str, ...]], names: list[str]) -> bool:
    """Every name once, in the order of the names, within the groups and from group to group."""
    position = {name: index for index, name in enumerate(names)}
    places = [[position[name] for name in group] for group in groups]
    return (
        sorted(itertools.chain(*places)) == list(range(len(names)))
        and places == sorted(places)
        and all(group == sorted(group) for group in places)
    )


# ---- rules that need no numbers


def test_one_input_makes_one_group() -> None:
    targets = _llama(2)
    groups = same_site(targets)
    assert _is_partition(groups, [target.name for target in targets])
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 2
    assert groups[0] == tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")


_SIBLINGS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([None, {"q_proj"}, {"gate_proj", "down_proj", "o_proj"}]))
@settings(max_examples=100, deadline=None)
def test_neighbouring_layers_make_groups_of_one_kind(layers: int, size: int, kinds: set[str] | None) -> None:
    targets = _llama(layers)
    by_name = {target.name: target for target in targets}
    sharing = None if kinds is None else {target.name for target in targets if target.kind in kinds}
    groups = [[by_name[name] for name in group] for group in consecutive(targets, size, sharing)]
    assert _is_partition([tuple(target.name for target in group) for group in groups], list(by_name))
    for group in groups:
        assert len({(target.kind, target.shape) for target in group}) == 1
        first = group[0].layer
        assert first is not None
        assert [target.layer for target in group] == list(range(first, first + len(group)))
    for kind in {target.kind for target in targets}:
        sizes = [len(group) for group in groups if group[0].kind == kind]
        whole, rest = divmod(layers, size)
        shared = kind in (_SIBLINGS if kinds is None else kinds)
        assert sizes == ([size] * whole + [rest] * (rest > 0) if shared else [1] * layers)


@pytest.mark.parametrize("name", TOYS)
def test_every_architecture_is_parted(name: str) -> None:
    with torch.device("meta"):
        targets = find_targets(AutoModelForCausalLM.from_config(TOYS[name](), attn_implementation="eager"))
    names = [target.name for target in targets]
    for groups in (same_site(targets), consecutive(targets, 2), consecutive(targets, 2, names)):
        assert _is_partition(groups, names)
    assert {len(group) for group in consecutive(targets, 2, names)} == {2}
    shared = {target.kind for target in targets if (target.name,) not in consecutive(targets, 2)}
    assert shared == {target.kind for target in targets if target.name in siblings(targets)}
    expected: dict[str, set[str]] = {"gpt2": set(), "phi": {"q_proj", "k_proj", "v_proj", "fc1"}}
    assert shared == expected.get(name, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


def test_a_run_of_layers_ends_at_a_gap_and_at_another_shape() -> None:
    shapes = {0: (4, 8), 1: (4, 8), 3: (4, 8), 4: (6, 8), 5: (6, 8), 6: (6, 8)}
    targets = [_target(f"h.{layer}.fc", shape, layer, f"h.{layer}.fc") for layer, shape in shapes.items()]
    groups = consecutive(targets, 3, [target.name for target in targets])
    assert [[int(name.split(".")[1]) for name in group] for group in groups] == [[0, 1], [3], [4, 5, 6]]


def test_experts_share_with_their_like_and_what_is_outside_of_the_layers_with_none() -> None:
    targets = [
        _target(f"h.{layer}.experts.{expert}.{kind}", (4, 8), layer, f"h.{layer}.experts.{expert}")
        for layer in (0, 1)
        for expert in (0, 1)
        for kind in ("gate", "up")
    ] + [_target(name, (4, 8), None, "norm") for name in ("head_1", "head_2")]
    assert consecutive(targets, 2) == [
        *(
            (f"h.0.experts.{expert}.{kind}", f"h.1.experts.{expert}.{kind}")
            for expert in (0, 1)
            for kind in ("gate", "up")
        ),
        ("head_1",),
        ("head_2",),
    ]


def test_a_target_alone_at_its_input_joins_no_group_by_default() -> None:
    targets = [target for target in _llama(2) if target.name != "model.layers.0.mlp.up_proj"]
    groups = consecutive(targets, 2)
    assert ("model.layers.0.mlp.gate_proj",) in groups
    assert ("model.layers.1.mlp.gate_proj",) in groups


def test_a_size_without_layers_is_refused() -> None:
    with pytest.raises(LexigramError, match="0 layers"):
        consecutive(_llama(2), 0)


# ---- pairs


def _pairings(names: list[str], distances: dict[tuple[str, str], float]) -> Iterator[list[float]]:
    """The distances of every possible pairing, partial ones among them."""
    if not names:
        yield []
        return
    first, *rest = names
    yield from _pairings(rest, distances)
    for other in rest:
        if math.isfinite(distance := distances.get((first, other), math.inf)):
            for others in _pairings([name for name in rest if name != other], distances):
                yield [distance, *others]


@given(st.integers(0, 7), st.data())
@settings(max_examples=200, deadline=None)
def test_pairs_are_as_many_and_as_close_as_can_be(count: int, data: st.DataObject) -> None:
    names = [f"layer_{index}" for index in range(count)]
    distance = st.floats(0, 2) | st.sampled_from([0.0, 1.0, math.inf])
    distances = {
        couple: data.draw(distance) for couple in itertools.combinations(names, 2) if data.draw(st.integers(0, 4))
    }
    groups = pairs(names, {(b, a): value for (a, b), value in distances.items()})
    assert _is_partition(groups, names)
    assert all(len(group) <= 2 for group in groups)
    found = [distances[group] for group in groups if len(group) == 2]
    all_pairings = list(_pairings(names, distances))
    most = max(map(len, all_pairings))
    assert len(found) == most
    least = min(sum(pairing) for pairing in all_pairings if len(pairing) == most)
    assert sum(found) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize(
    "distances",
    [{("a", "x"): 1.0}, {("a", "a"): 1.0}, {("a", "b"): math.nan}, {("a", "b"): 1.0, ("b", "a"): 1.0}],
)
def test_distances_that_say_nothing_are_refused(distances: dict[tuple[str, str], float]) -> None:
    with pytest.raises(ValueError, match=r"of \w and"):
        pairs(["a", "b"], distances)


# ---- distances


def _plain_distance(first: Tensor, second: Tensor, stride: int) -> float:
    small, large = (first, second) if len(first) <= len(second) else (second, first)
    last = len(large) - len(small)
    starts = sorted({*range(0, last + 1, stride), last})
    norms = [small.norm(), large.norm()] if last == 0 else [small.norm()]
    return min(
        sum(float((large[start : start + len(small)] - small).norm() / norm) for norm in norms) / len(norms)
        for start in starts
    )


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_the_distance_is_that_of_the_closest_window(rows: int, others: int, width: int, stride: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(size, width, generator=generator, dtype=torch.float64) for size in (rows, others))
    found = pair_distance(first, second, stride)
    assert found == pytest.approx(_plain_distance(first, second, stride), rel=1e-12)
    assert pair_distance(second, first, stride) == found
    by_default = max(1, min(rows, others) // 8)
    assert pair_distance(first, second) == pytest.approx(_plain_distance(first, second, by_default), rel=1e-12)


@pytest.mark.parametrize("start", [0, 8, 64, 83])
def test_a_copy_is_found_where_a_window_lies(start: int) -> None:
    large = torch.randn(147, 30, generator=torch.Generator().manual_seed(0))
    assert pair_distance(large, large[start : start + 64].clone()) == 0
    assert pair_distance(large, 2 * large[start : start + 64]) == pytest.approx(0.5)


def test_zeros_are_close_to_zeros_only() -> None:
    zeros, ones = torch.zeros(4, 3), torch.ones(8, 3)
    assert pair_distance(zeros, torch.zeros(8, 3)) == 0
    assert pair_distance(zeros, ones) == math.inf
    assert pair_distance(ones[:2], torch.zeros(4, 3)) == 1


def test_signals_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 inputs"):
        pair_distance(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="0 rows"):
        pair_distance(torch.ones(2, 3), torch.ones(2, 3), stride=0)
