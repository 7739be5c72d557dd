"""Healing: stored values that train where they stand, and nothing else.

The oracles: the leaf's own bytes, autograd through float arithmetic without rounding, the next-token loss as transformers
computes it, KL divergence in float64, the bytes of an uninterrupted run.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lexigram
from conftest import TEMPLATE, Command, build_toy, contents, templated_folder, toy_folder, words_tokenizer
from drawn import generator, normal
from endings import Stop, StopAt
from lexigram import HealingSettings, LexigramError, Recipe, RunRecord, distillation, training
from lexigram.devices import forward_dtype
from lexigram.distillation import Objective, recomputing
from lexigram.factors import (
    Bfloat,
    Codec,
    Dense,
    DenseSpec,
    Factor,
    Integer,
    Leaf,
    Product,
    Shared,
    SharedSpec,
    Sparse,
    SparseSpec,
    Sum,
    TrainableLeaf,
    encode,
    in_blocks,
    with_leaves,
)
from lexigram.factors.training import LEAST_STEPS, MARGIN, RUN, built_once
from lexigram.headers import file_sha256
from lexigram.records import read_run
from lexigram.runfolder import MANIFEST, run_folder
from lexigram.runfolder import opened as runfolder_opened
from lexigram.staging import REPLACED
from lexigram.transformers_io import (
    SHARED,
    FactoredLinear,
    describe,
    factored_layers,
    replace_leaves,
    share,
    shared_matrices,
    stored_tensors,
)

WEIGHTS = "lexigram.safetensors"
INDICES = ("mask", "columns", "counts")
CODECS: dict[str, Codec] = {
    **{f"bfloat {bits}": Bfloat(bits=bits) for bits in (10, 12, 14, 16)},
    **{
        f"int{bits} {group} {'symmetric' if symmetric else 'affine'}": Integer(
            bits=bits, group=group, symmetric=symmetric
        )
        for bits in (2, 3, 4, 6, 8)
        for group in (7, 128)
        for symmetric in (False, True)
    },
}
ROWS, COLS = 12, 10


def leaves(codec: Codec) -> dict[str, Leaf]:
    """Every form of leaf with this codec."""
    sparse = {
        f"{index} {block}": SparseSpec(rows=ROWS, cols=COLS, nonzeros=24, codec=codec, index=index, block=block)
        for index in ("bitmask", "list")
        for block in ((1, 1), (2, 2), (3, 1))
    }
    empty = SparseSpec(rows=ROWS, cols=COLS, nonzeros=0, codec=codec)
    return {"dense": DenseSpec(rows=ROWS, cols=COLS, codec=codec), **sparse, "empty": empty}


def stored(spec: Leaf, seed: int = 0) -> Any:
    """A leaf with values of the size that weights have, in random places."""
    matrix = 0.02 * normal(spec.rows, spec.cols, seed=seed)
    if isinstance(spec, SparseSpec):
        height, width = spec.block
        kept = torch.zeros(spec.rows // height * (spec.cols // width))
        kept[torch.randperm(len(kept), generator=generator(seed))[: spec.nonzeros // (height * width)]] = 1
        kept = kept.view(spec.rows // height, -1).repeat_interleave(height, 0).repeat_interleave(width, 1)
        matrix = matrix * kept
    return encode(matrix, spec)


def bits(factor: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in factor.state_dict().items()}


def units(leaf: Any) -> Tensor:
    """For each stored value the power of two below the root mean square of its run."""
    runs = leaf.decode(torch.float32).split(RUN)
    return torch.cat(
        [torch.full_like(run, 2.0 ** math.floor(math.log2(float(run.square().mean().sqrt())))) for run in runs]
    )


def move(module: nn.Module, by: float = 0.1, seed: int = 3) -> None:
    """As an optimiser might, in the units of the parameters."""
    draw = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))


# ----------------------------------------------------------------------------------------------------------------- leaves


@pytest.mark.parametrize("name", CODECS)
def test_a_leaf_that_did_not_train_is_packed_to_its_own_bytes(name: str) -> None:
    for spec in leaves(CODECS[name]).values():
        leaf = stored(spec)
        opened = TrainableLeaf(leaf)
        assert torch.equal(opened.to_dense(), leaf.to_dense())
        assert bits(opened.packed()) == bits(leaf)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_trained_is_what_is_stored(name: str) -> None:
    """To the bit; only in the support, and in as many bytes."""
    for spec in leaves(CODECS[name]).values():
        leaf = stored(spec)
        opened = TrainableLeaf(leaf)
        move(opened)
        packed = opened.packed()
        packed.check()
        assert torch.equal(packed.to_dense(), opened.to_dense())
        assert {key: tensor.shape for key, tensor in packed.state_dict().items()} == {
            key: tensor.shape for key, tensor in leaf.state_dict().items()
        }
        assert packed.spec == spec
        if isinstance(spec, SparseSpec):
            assert all(bits(packed)[key] == bits(leaf)[key] for key in INDICES if key in bits(leaf))
            assert not packed.to_dense()[~leaf.support()].any()
        if spec.count:
            assert bits(packed) != bits(leaf)


@pytest.mark.parametrize("name", ["bfloat 10", "bfloat 16"])
def test_gradients_pass_the_rounding_of_floats(name: str) -> None:
    """As through the same places without a codec, in the leaf's units."""
    for spec in leaves(CODECS[name]).values():
        if not spec.count:
            continue
        leaf = stored(spec)
        opened, weight = TrainableLeaf(leaf), normal(ROWS, COLS, seed=5)
        (opened.to_dense() * weight).sum().backward()
        wanted = weight.view(-1)
        if isinstance(spec, SparseSpec):
            wanted = in_blocks(weight, spec.block)[in_blocks(leaf.support(), spec.block).all(dim=(2, 3))].view(-1)
        assert torch.equal(opened.values.grad, wanted * units(leaf))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_gradients_of_values_and_scales_are_those_of_lsq(width: int, symmetric: bool) -> None:
    """Esser et al., eq. 1 to 3, of values that are multiples of their scale: ``s`` and the integer, where the grid reaches.

    Beyond its ends only what leads back has a gradient.
    """
    codec = Integer(bits=width, group=6, symmetric=symmetric)  # type: ignore[arg-type]
    leaf = stored(DenseSpec(rows=ROWS, cols=COLS, codec=codec))
    opened, weight = TrainableLeaf(leaf), normal(ROWS, COLS, seed=5).view(-1, 6)
    move(opened, 0.3)
    (opened.to_dense() * weight.view(ROWS, COLS)).sum().backward()
    grid = codec.stored_grid(dict(leaf.named_parameters()))
    assert grid.scale is not None
    assert grid.zero is not None
    assert opened.scales is not None
    first, zero = grid.scale.float()[:, None], grid.zero.float()[:, None]
    unit = steps_a_unit(leaf)
    scale = (opened.scales.detach()[:, None] * first).bfloat16().float()
    exact = opened.values.detach().view(-1, 6) * unit
    low, high = -zero, 2**width - 1 - zero
    inside = (exact > low - 0.5) & (exact < high + 0.5)
    back = torch.where(exact > 0, weight * scale > 0, weight * scale < 0)  # a step of descent is against the gradient
    integers = exact.round().clamp(low, high)
    assert not bool(inside.all())
    assert opened.values.grad is not None
    assert opened.scales.grad is not None
    wanted_values = weight * scale * unit * (inside | back)
    assert torch.allclose(opened.values.grad.view(-1, 6), wanted_values, rtol=1e-5)
    wanted = (weight * integers * first).sum(1)
    assert torch.allclose(opened.scales.grad, wanted, rtol=1e-4, atol=1e-6)


def steps_a_unit(leaf: Any) -> Tensor:
    """By hand, for groups of six: the power of two below the root mean square of their integers, `LEAST_STEPS` at least."""
    grid = leaf.spec.codec.stored_grid(dict(leaf.named_parameters()))
    integers = leaf.decode(torch.float32).view(-1, 6) / grid.scale.float()[:, None]
    return torch.tensor(
        [[max(LEAST_STEPS, 2.0 ** math.floor(math.log2(math.hypot(*row) / 6**0.5)))] for row in integers]
    )


@pytest.mark.parametrize("steps", [40, training.STEPS])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_integers_change_within_the_budget(width: int, steps: int) -> None:
    """A loss that falls with every value: by default settings values of few bits go that way, some of them soon.

    As many of them as the travel of a value in steps of the grid is of the cells they begin in, none in the other direction.
    """
    codec = Integer(bits=width, group=32)  # type: ignore[arg-type]
    leaf = encode(0.02 * normal(64, 64), DenseSpec(rows=64, cols=64, codec=codec))
    opened, settings = TrainableLeaf(leaf), HealingSettings(texts="t", steps=steps)
    assert opened.scales is not None
    opened.scales.requires_grad_(False)
    optimiser = torch.optim.AdamW([opened.values], betas=(0.9, 0.95), weight_decay=0)
    shares = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = settings.rate_at(step, 0.0)
        optimiser.zero_grad()
        (-opened.to_dense()).sum().backward()
        optimiser.step()
        moved = opened.packed().to_dense() - leaf.to_dense()
        assert not bool((moved < 0).any())
        shares.append(float((moved > 0).float().mean()))
    travel = LEAST_STEPS * (sum(settings.rate_at(step, 0.0) for step in range(steps)) - MARGIN)
    share = min(1.0, travel / (1 - 2 * MARGIN * LEAST_STEPS))
    room = float((leaf.decode(torch.float32) < reach(leaf)).float().mean())
    assert shares[-1] == pytest.approx(share * room, rel=0.2)
    assert all(later - before < 0.05 for before, later in itertools.pairwise(shares)), "never many at once"


def reach(leaf: Any) -> Tensor:
    """The largest value of each one's group."""
    grid = leaf.spec.codec.stored_grid(dict(leaf.named_parameters()))
    last = (2**leaf.spec.codec.bits - 1 - grid.zero.float()) * grid.scale.float()
    first = -grid.zero.float() * grid.scale.float()
    return torch.maximum(first, last).repeat_interleave(leaf.spec.codec.group)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_a_scale_takes_its_group_along(width: int, symmetric: bool) -> None:
    """Whatever it becomes: the integers stay, so the values are as many times theirs as the scale is."""
    codec = Integer(bits=width, group=6, symmetric=symmetric)  # type: ignore[arg-type]
    leaf = stored(DenseSpec(rows=ROWS, cols=COLS, codec=codec))
    opened = TrainableLeaf(leaf)
    assert opened.scales is not None
    with torch.no_grad():
        opened.scales.mul_(torch.linspace(0.5, 2.0, len(opened.scales)))
    packed = opened.packed()
    assert bits(packed)["values"] == bits(leaf)["values"]
    ratio = packed.scales.view(torch.bfloat16).float() / leaf.scales.view(torch.bfloat16).float()
    assert torch.allclose(ratio, torch.linspace(0.5, 2.0, len(ratio)), rtol=2**-8)
    assert torch.allclose(packed.to_dense().view(-1, 6), leaf.to_dense().view(-1, 6) * ratio[:, None])


def test_integers_that_were_carried_past_the_end_come_back() -> None:
    leaf = stored(DenseSpec(rows=ROWS, cols=COLS, codec=Integer(bits=2, group=6)))
    opened = TrainableLeaf(leaf)
    with torch.no_grad():
        opened.values.add_(4)
    last = opened.to_dense().detach()
    optimiser = torch.optim.AdamW([opened.values], lr=0.2, weight_decay=0)
    for _ in range(40):
        optimiser.zero_grad()
        opened.to_dense().sum().backward()
        optimiser.step()
    assert bool((opened.to_dense() < last).all())


def test_a_matrix_that_is_built_once_gives_the_gradients_of_one_that_is_built_anew() -> None:
    for name in ("bfloat 16", "int4 7 affine", "int3 128 symmetric"):
        for spec in leaves(CODECS[name]).values():
            found = []
            for once in (False, True):
                opened = TrainableLeaf(stored(spec))
                if not opened.values.requires_grad:
                    continue
                model = nn.Sequential(opened)
                with built_once(model) if once else nullcontext():
                    for seed in (1, 2, 3):
                        (model(normal(4, COLS, seed=seed)) ** 2).sum().backward()
                assert opened._built is None
                found.append([parameter.grad for parameter in opened.parameters()])
            for a, b in zip(*found, strict=True) if found else ():
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_leaf_of_zeros_does_not_train_and_neither_does_a_group_of_them() -> None:
    for codec in (Bfloat(), Integer(bits=4, group=5)):
        spec = DenseSpec(rows=ROWS, cols=COLS, codec=codec)
        nothing = TrainableLeaf(encode(torch.zeros(ROWS, COLS), spec))
        assert not any(parameter.requires_grad for parameter in nothing.parameters())
    matrix = normal(ROWS, COLS)
    matrix[0] = 0
    opened = TrainableLeaf(encode(matrix, DenseSpec(rows=ROWS, cols=COLS, codec=Integer(bits=4, group=5))))
    move(opened)
    opened.to_dense().sum().backward()
    assert not opened.packed().to_dense()[0].any()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in opened.parameters() if parameter.grad is not None)


def test_only_a_leaf_is_opened() -> None:
    leaf = stored(DenseSpec(rows=4, cols=4))
    with pytest.raises(ValueError, match="only a stored matrix trains, and Product is none"):
        TrainableLeaf(Product(leaf, leaf))


def test_a_value_that_is_not_finite_is_not_packed() -> None:
    for codec in (Bfloat(), Integer(bits=4)):
        opened = TrainableLeaf(stored(DenseSpec(rows=4, cols=4, codec=codec)))
        with torch.no_grad():
            opened.values[1] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            opened.packed()


def expressions() -> dict[str, tuple[Factor, dict[str, Factor]]]:
    """What models consist of, 12 x 10, with the matrices that they share."""
    int4, few = Integer(bits=4, group=8), Bfloat(bits=12)

    def dense(rows: int, cols: int, codec: Codec = int4) -> Dense:
        return stored(DenseSpec(rows=rows, cols=cols, codec=codec))  # type: ignore[no-any-return]

    def sparse(rows: int, cols: int, codec: Codec = few, count: int = 20) -> Sparse:
        return stored(SparseSpec(rows=rows, cols=cols, nonzeros=count, codec=codec))  # type: ignore[no-any-return]

    dictionary = dense(ROWS, 6)
    reference = Shared(SharedSpec(name="d", rows=ROWS, cols=6), dictionary)
    return {
        "dictionary x sparse": (Product(dense(ROWS, 6), sparse(6, COLS)), {}),
        "low rank": (Product(dense(ROWS, 3, Bfloat()), dense(3, COLS, Bfloat())), {}),
        "low rank + sparse": (Sum(Product(dense(ROWS, 3), dense(3, COLS)), sparse(ROWS, COLS)), {}),
        "product of sparse": (Product(sparse(ROWS, 8), sparse(8, COLS)), {}),
        "shared dictionary": (Product(reference, sparse(6, COLS)), {"d": dictionary}),
    }


@pytest.mark.parametrize("name", expressions())
def test_an_expression_computes_the_same_opened_and_packed(name: str) -> None:
    factor, shared = expressions()[name]
    x = normal(7, COLS)
    opened_shared = {key: with_leaves(leaf, TrainableLeaf) for key, leaf in shared.items()}
    opened = with_leaves(factor, TrainableLeaf, opened_shared)
    assert opened.spec == factor.spec
    assert torch.equal(opened(x), factor(x))
    for module in (opened, *opened_shared.values()):
        move(module)
    opened(x).sum().backward()
    for module in (opened, *opened_shared.values()):
        assert all(parameter.grad is not None for parameter in module.parameters())
    packed_shared = {key: leaf.packed() for key, leaf in opened_shared.items()}  # type: ignore[operator]
    packed = with_leaves(opened, lambda leaf: leaf.packed(), packed_shared)  # type: ignore[operator]
    assert torch.equal(packed(x), opened(x))
    assert not torch.equal(packed(x), factor(x))
    assert sum(t.nbytes for t in packed.state_dict().values()) == factor.spec.bytes
    if shared:
        with pytest.raises(ValueError, match="the shared matrix d is not described"):
            with_leaves(factor, TrainableLeaf)


def test_what_layers_share_is_opened_once_and_stays_shared() -> None:
    model = build_toy("llama")
    dictionary = stored(DenseSpec(rows=64, cols=16))
    share(model, {"d": dictionary})
    reference = SharedSpec(name="d", rows=64, cols=16)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    for seed, name in enumerate(names):
        coefficients = stored(SparseSpec(rows=16, cols=64, nonzeros=200), seed)
        model.set_submodule(name, FactoredLinear(Product(Shared(reference, dictionary), coefficients)))
    describe(model)
    before = stored_tensors(model)
    assert before.keys() == {key for key in model.state_dict() if ".factors." in key or key.startswith(SHARED)}
    replace_leaves(model, TrainableLeaf)
    [opened] = shared_matrices(model).values()
    trained = [name for name, each in model.named_parameters() if isinstance(each, nn.Parameter) and "values" in name]
    assert len(trained) == 3
    model(input_ids=torch.arange(3, 23)[None]).logits.sum().backward()
    one = opened.values.grad.clone()  # type: ignore[union-attr,operator]
    assert bool(one.any())
    move(opened)
    replace_leaves(model, lambda leaf: leaf.packed())  # type: ignore[operator]
    [packed] = shared_matrices(model).values()
    for _, layer in factored_layers(model):
        assert isinstance(layer.factors, Product)
        assert torch.equal(layer.factors.left.to_dense(), packed.to_dense())
    assert stored_tensors(model).keys() == before.keys()


# -------------------------------------------------------------------------------------------------------------- objectives


@pytest.fixture
def pair() -> tuple[Any, Any]:
    return build_toy("llama"), build_toy("llama", seed=1)


IDS = torch.randint(3, 199, (5, 24), generator=torch.Generator().manual_seed(1))


def test_the_objectives_are_what_they_are_called(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair
    monkeypatch.setattr("lexigram.losses.CHUNK_ELEMENTS", 7 * 200)  # several chunks, the last one shorter
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS, output_hidden_states=True) for model in pair)
        p, q = (run.logits.double().log_softmax(-1) for run in (theirs, ours))
        losses = [float(student(input_ids=row[None], labels=row[None]).loss) for row in IDS]
    wanted = {
        "kl": (p.exp() * (p - q)).sum(-1).mean(1),
        "tokens": torch.tensor(losses),
    }
    for name, expected in wanted.items():
        found = Objective(name, student, None if name == "tokens" else teacher, "model.layers", torch.float32, 48)  # type: ignore[arg-type]
        assert torch.allclose(found.losses(IDS).double(), expected.double(), rtol=1e-4)
        assert found.measured(IDS).objective == pytest.approx(float(expected.mean()), rel=1e-4)
        assert found.measured(IDS).tokens == pytest.approx(sum(losses) / 5, rel=1e-4)
    layers = Objective("layers", student, teacher, "model.layers", torch.float32, 48).losses(IDS)
    outputs: list[list[Tensor]] = []
    for model in pair:
        x, found_layers = model.model.embed_tokens(IDS), []
        positions = torch.arange(24)[None]
        rotary = model.model.rotary_emb(x, positions)
        for layer in model.model.layers:
            x = layer(x, position_embeddings=rotary, position_ids=positions, attention_mask=None)
            found_layers.append(x)
        outputs.append(found_layers)
    errors = [((a - b).square().sum((1, 2)) / b.square().sum((1, 2))).detach() for a, b in zip(*outputs, strict=True)]
    assert torch.allclose(layers, sum(errors) / len(errors), rtol=1e-4)
    for name, expected in wanted.items():
        both = Objective(name, student, teacher, "model.layers", torch.float32, 48, 0.3)  # type: ignore[arg-type]
        assert torch.allclose(both.losses(IDS), expected.float() + 0.3 * layers, rtol=1e-4)
        assert both.measured(IDS).tokens == pytest.approx(sum(losses) / 5, rel=1e-4)


def test_imitating_oneself_costs_nothing(pair: tuple[Any, Any]) -> None:
    for name in distillation.NEEDS_TEACHER:
        objective = Objective(name, pair[0], pair[0], "model.layers", torch.float32, 48)
        assert objective.measured(IDS).objective == pytest.approx(0, abs=1e-6)


def test_recomputing_layers_changes_no_gradient(pair: tuple[Any, Any]) -> None:
    """Each layer runs twice then, and once without."""
    student, teacher = pair
    found: list[list[Tensor]] = []
    calls: list[int] = []
    for layer in student.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(len(found)))
    for within in (False, True):
        student.zero_grad()
        objective = Objective("kl", student, teacher, "model.layers", torch.float32, 1000)
        if within:
            with recomputing(student, "model.layers"):
                objective.losses(IDS).sum().backward()
        else:
            objective.losses(IDS).sum().backward()
        found.append([parameter.grad.clone() for parameter in student.parameters()])
    assert calls == [0] * len(student.model.layers) + [1] * 2 * len(student.model.layers)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any("forward" in vars(layer) for layer in student.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["kl", "tokens"])
def test_gradients_of_losses_are_those_of_autograd(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through softmaxes in float64; in parts of rows, the last of them shorter."""
    monkeypatch.setattr("lexigram.losses.CHUNK_ELEMENTS", 4 * 200)
    logits, wanted = ((3 * normal(5, 6, 200, seed=seed)).to(dtype) for seed in (1, 2))
    ids, own = IDS[:, :6], logits.clone().requires_grad_()
    weights = normal(5, seed=3)
    losses = distillation._LOSSES[name](  # type: ignore[index]
        distillation.Outputs(own, []), distillation.Outputs(wanted, []), ids
    )
    (losses * weights).sum().backward()
    exact = logits.double().requires_grad_()
    ours, theirs = exact.log_softmax(-1), wanted.double().log_softmax(-1)
    if name == "kl":
        expected = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    else:
        expected = -ours[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2).mean(1)
    (expected * weights).sum().backward()
    assert own.grad is not None
    assert exact.grad is not None
    assert own.grad.dtype == dtype
    assert torch.allclose(losses.double(), expected, rtol=1e-5)
    rough = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(own.grad.double(), exact.grad, rtol=rough, atol=rough * float(exact.grad.abs().max()))


@pytest.mark.parametrize("name", ["kl", "tokens"])
def test_few_rows_of_logits_are_in_float32_at_a_time(
    name: str, pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lexigram.losses.CHUNK_ELEMENTS", 7 * 200)
    rows: list[int] = []
    real = torch.Tensor.log_softmax

    def noting(tensor: Tensor, *args: Any) -> Tensor:
        rows.append(len(tensor))
        return real(tensor, *args)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noting)
    teacher = pair[1] if name == "kl" else None
    Objective(name, pair[0], teacher, "model.layers", torch.float32, 1000).losses(IDS).sum().backward()  # type: ignore[arg-type]
    assert rows
    assert max(rows) == 7


def test_layers_are_compared_without_logits(pair: tuple[Any, Any]) -> None:
    """Of the last position alone, as models can leave out no less; held-out text has all, for its next-token loss."""
    seen: list[int] = []
    for model in pair:
        model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[1]))
    objective = Objective("layers", *pair, "model.layers", torch.float32, 1000)
    objective.losses(IDS).sum().backward()
    assert seen == [1, 1]
    objective.measured(IDS)
    assert seen[2:] == [24, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi"])
@pytest.mark.parametrize(("objective", "weight"), [("kl", 0.0), ("kl", 0.5), ("layers", 0.0), ("tokens", 0.5)], ids=str)
def test_the_teacher_sees_sequences_that_come_again_once(name: str, objective: Any, weight: float) -> None:
    """In whatever company they come; the losses are those of a teacher that sees them every time."""
    student, teacher = build_toy(name), build_toy(name, seed=1)
    layers = next(each for each, module in teacher.named_modules() if isinstance(module, nn.ModuleList))
    calls: list[int] = []
    teacher.get_submodule(layers)[0].register_forward_hook(lambda _module, args, _output: calls.append(len(args[0])))
    keeping, plain = (Objective(objective, student, teacher, layers, torch.float32, 1000, weight) for _ in range(2))
    for ids, new in ((IDS[:3], 3), (IDS[[2, 0, 4]], 1), (IDS[[1, 4]], 0), (IDS, 1)):
        calls.clear()
        found = keeping.losses(ids, again=True)
        assert calls == [1] * new
        assert torch.allclose(found, plain.losses(ids), rtol=1e-4)
    assert not any("forward" in vars(module) for module in teacher.modules())


def test_a_teacher_that_is_more_than_a_base_and_a_head_is_run_every_time(pair: tuple[Any, Any]) -> None:
    """Here logits depend on a layer in the middle, which the head by itself does not see."""
    student, teacher = pair
    inside: list[Tensor] = []
    teacher.model.layers[0].register_forward_hook(lambda _module, _args, output: inside.append(output))
    teacher.lm_head.register_forward_hook(
        lambda _module, _args, output: output + (inside.pop().mean(-1, keepdim=True) * output if inside else 0)
    )
    keeping = Objective("kl", student, teacher, "model.layers", torch.float32, 1000)
    for _ in range(2):
        assert torch.equal(keeping.losses(IDS, again=True), keeping.losses(IDS))


# ------------------------------------------------------------------------------------------------------------ the settings


def test_the_rate_warms_up_and_falls() -> None:
    settings = HealingSettings(texts="t", steps=100, rate=0.1, warmup=10)
    rates = [settings.rate_at(step, 0.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates.index(max(rates)) == 9
    assert rates[50] == pytest.approx(0.05)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert settings.model_copy(update={"schedule": "constant"}).rate_at(90, 0.0) == 0.1
    clock = HealingSettings(texts="t", minutes=2, rate=0.1, warmup=0)
    assert clock.most_steps is None
    assert clock.rate_at(10**6, 60.0) == pytest.approx(0.05)
    assert HealingSettings(texts="t").most_steps == training.STEPS


def test_every_sequence_is_drawn_once_before_any_is_drawn_again() -> None:
    settings = HealingSettings(texts="t", batch=3, seed=4)
    drawn = training._batches(7, settings)
    found = torch.cat([next(drawn) for _ in range(14)]).view(6, 7)
    assert all(sorted(order.tolist()) == list(range(7)) for order in found)
    assert len({tuple(order.tolist()) for order in found}) > 1


# ----------------------------------------------------------------------------------------------------------- whole healings


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2000 random words, of 20 kinds: a model of random weights can learn so much of it in a few steps."""
    numbers = torch.randint(0, 20, (2000,), generator=generator()).tolist()
    file = tmp_path_factory.mktemp("words") / "words.txt"
    file.write_text(" ".join(f"w{number}" for number in numbers))
    return file


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "toy", "llama")


FORMS: dict[str, dict[str, Any]] = {
    "cospadi": {"method": {"name": "cospadi", "iterations": 2}},
    "cospadi at 14 and 16 bits": {
        "method": {"name": "cospadi", "iterations": 2, "value_bits": 14, "dictionary_bits": 16},
        "ratio": 0.2,
    },
    "shared dictionaries": {"method": {"name": "cospadi", "iterations": 2}, "share": "site"},
    "low rank": {"method": {"name": "svd"}},
    "low rank, int4": {"method": {"name": "svd", "value_bits": 4}, "ratio": 0.8},
    "shared bases": {"method": {"name": "svd"}, "group": 2, "share": "consecutive"},
    "int3": {"method": {"name": "quantize", "value_bits": 3}, "ratio": 0.7},
    "sparse": {"method": {"name": "wanda"}},
    "blocks": {"method": {"name": "magnitude", "pattern": "4x4"}},
    "low rank + sparse": {"method": {"name": "oats", "rounds": 3}},
    "lowrank-sparse": {
        "method": {"name": "lowrank-sparse", "rank_share": 0.2, "rounds": 3},
        "allocation": "uniform",
        "ratio": 0.8,
    },
    "structured": {"method": {"name": "structured"}},
    "double-sparse": {"method": {"name": "double-sparse", "iterations": 2, "tightening": 2}, "ratio": 0.8},
    "index list": {"method": {"name": "magnitude"}, "ratio": 0.95},
}


def test_the_forms_are_what_they_are_called(compressed: Callable[[str], Path]) -> None:
    record = read_run(compressed("index list"))
    assert {layer.factors.index for layer in record.layers} == {"list"}
    record = read_run(compressed("double-sparse"))
    assert {getattr(layer.factors, side).form for layer in record.layers for side in ("left", "right")} == {"sparse"}


@pytest.fixture(scope="module")
def compressed(toy: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The toy in one of the forms; made once, so nobody may write into it."""
    place = tmp_path_factory.mktemp("forms")

    def compress(form: str) -> Path:
        if not (out := place / form).exists():
            made(toy, words, out, **FORMS[form])
        return out

    return compress


def made(toy: Path, words: Path, out: Path, **settings: Any) -> RunRecord:
    calibration = {"text": str(words), "sequences": 8, "length": 32}
    content = {"model": str(toy), "ratio": 0.5, "device": "cpu", "compute_dtype": "float32", "calibration": calibration}
    return lexigram.compress(Recipe.parse({**content, **settings}), out)


def loss_of_stored(folder: Path, words: Path, dtype: torch.dtype) -> float:
    """The next-token loss of what is stored, on the text that is held out."""
    student = lexigram.load(folder, dtype=torch.float32)
    held = torch.cat(list(held_ids(words)))
    return Objective("tokens", student, None, "model.layers", dtype, 64).measured(held).tokens


def quick(words: Path, **changes: Any) -> HealingSettings:
    content = {"sequences": 12, "held_out": 4, "length": 32, "batch": 4, "steps": 6, "warmup": 2, "measure_every": 3}
    return HealingSettings.parse(
        {"texts": str(words), **content, "rate": 0.02, "compute_dtype": "float32", "save_every": 2, **changes}
    )


def healed(folder: Path, out: Path, settings: HealingSettings, **options: Any) -> RunRecord:
    return lexigram.heal(folder, out, settings, **{"device": "cpu", **options})


@pytest.fixture(scope="module")
def small(compressed: Callable[[str], Path]) -> Path:
    """A result with shared matrices."""
    return compressed("shared bases")


@pytest.mark.parametrize(
    ("form", "objective"),
    [
        *((form, "kl") for form in FORMS),
        *((form, "tokens") for form in ("shared dictionaries", "int3", "double-sparse")),
    ],
)
def test_every_form_is_healed_in_the_same_bytes(
    form: str, objective: str, toy: Path, compressed: Callable[[str], Path], words: Path, tmp_path: Path
) -> None:
    """Tensors, dtypes, shapes, indices and what is not compressed stay; `verify` passes; what is packed is what was trained."""
    small = compressed(form)
    # The original is near, so what is won is little.
    near = {"layer_weight": 0.1, "rate": 0.003, "steps": 12, "measure_every": 4}
    settings = quick(words, objective=objective, **({"rate": 0.05} if objective == "tokens" else near))
    record = healed(small, tmp_path / "out", settings)
    before, after = load_file(small / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {key: (t.dtype, t.shape) for key, t in before.items()} == {
        key: (t.dtype, t.shape) for key, t in after.items()
    }
    assert (small / WEIGHTS).stat().st_size == (tmp_path / "out" / WEIGHTS).stat().st_size
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(".factors." in key or key.startswith(SHARED) for key in changed)
    assert {key.rsplit(".", 1)[-1] for key in changed} <= {"values", "scales"}
    for name in record.files:
        if name not in (WEIGHTS, "run.json"):
            assert (small / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert read_run(tmp_path / "out") == record
    old = json.loads((small / "run.json").read_text())
    new = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {key for key in new if new[key] != old.get(key)} == {"healing", "tensors_sha256"}
    found = lexigram.verify(tmp_path / "out", against=str(toy))
    assert [check for check in found.checks if not check.passed] == []
    healing = record.healing[0]
    assert healing.after.objective < healing.before.objective
    student = lexigram.load(tmp_path / "out", dtype=torch.float32)
    packed = Objective("tokens", student, None, "model.layers", torch.float32, 64).measured(
        torch.cat(list(held_ids(words)))
    )
    assert packed.tokens == pytest.approx(healing.after.tokens, rel=1e-4)


def held_ids(words: Path) -> Iterator[Tensor]:
    """Held-out sequences of `quick`, drawn again from the text by hand: 16 windows of 32 words, one in four."""
    table = torch.tensor(words_tokenizer()(words.read_text())["input_ids"])
    count = len(table) // 32
    chosen = torch.randperm(count, generator=generator(0))[:16].sort().values
    for window in chosen[::4].tolist():
        yield table[32 * window : 32 * window + 32][None]


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "llama-tied", "phi"))]
)
@pytest.mark.parametrize(("objective", "layer_weight"), [("kl", 0), ("layers", 0), ("tokens", 0), ("kl", 0.5)])
def test_other_models_and_objectives(
    name: str, objective: str, layer_weight: float, words: Path, tmp_path: Path
) -> None:
    """Transposed layers, biases, tied heads, dropout in the config; gradient checkpointing changes no byte."""
    toy = toy_folder(tmp_path / "toy", name)
    made(toy, words, tmp_path / "small", method={"name": "svd"})
    settings = quick(words, objective=objective, layer_weight=layer_weight, rate=0.005)
    record = healed(tmp_path / "small", tmp_path / "out", settings)
    healing = record.healing[0]
    assert healing.after.objective < healing.before.objective
    assert (healing.original is None) == (objective == "tokens" and not layer_weight)
    healed(tmp_path / "small", tmp_path / "again", settings.model_copy(update={"checkpointing": True}))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    assert lexigram.verify(tmp_path / "out", against=str(toy)).passed


def test_parts_of_the_text_are_disjoint_and_hashed(small: Path, words: Path, tmp_path: Path) -> None:
    """Every token of this text has a window of its own: the windows of both parts are found in it at different places."""
    numbers = tmp_path / "numbers.txt"
    numbers.write_text(" ".join(f"w{(7 * n + n // 196) % 196}" for n in range(640)))
    settings = quick(numbers, sequences=15, held_out=5)
    tokenizer = words_tokenizer()
    train, held = lexigram.healing._parts(tokenizer, settings, 32)
    assert (len(train), len(held)) == (15, 5)
    every = {tuple(row.tolist()) for row in train.ids} | {tuple(row.tolist()) for row in held.ids}
    assert len(every) == 20
    record = healed(small, tmp_path / "out", settings)
    assert (record.healing[0].text_sha256, record.healing[0].held_out_sha256) == (train.sha256, held.sha256)


def test_a_seed_repeats_bytes_and_another_does_not(small: Path, words: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        healed(small, tmp_path / name, quick(words, seed=seed))
    found = {name: (tmp_path / name / WEIGHTS).read_bytes() for name in "abc"}
    assert found["a"] == found["b"] != found["c"]


def test_healing_again_adds_a_record(small: Path, words: Path, tmp_path: Path) -> None:
    first = healed(small, tmp_path / "one", quick(words))
    second = healed(tmp_path / "one", tmp_path / "two", quick(words))
    assert second.healing[0] == first.healing[0]
    assert second.healing[1].before.objective == pytest.approx(first.healing[0].after.objective, rel=1e-4)
    healed(small, tmp_path / "one", quick(words, steps=1), overwrite=True)
    assert len(read_run(tmp_path / "one").healing) == 1


TOO_FAR: dict[str, Any] = {"rate": 1.0, "warmup": 0, "clip": 1e9, "measure_every": 1, "back_off": 100}


def test_a_rate_that_is_too_high_comes_down(small: Path, words: Path, tmp_path: Path) -> None:
    """After a look that is worse the next step starts from the best state; without `back_off` nothing is found."""
    settings = quick(words, **TOO_FAR, steps=6, schedule="constant")
    record = healed(small, tmp_path / "out", settings).healing[0]
    losses = [look.objective for look in record.held_out]
    assert losses[1] > losses[0]
    assert losses[2] < losses[0]
    assert record.best_step >= 2
    worse = sum(loss > min(losses[: at + 1]) for at, loss in enumerate(losses))
    assert re.search(
        f"{worse} looks at held-out text .* with {100.0**-worse:g} for a rate in the end", record.remarks[0]
    )
    # The same as from the beginning at the lower rate, but for what the optimiser knows.
    slow = healed(small, tmp_path / "slow", quick(words, **{**TOO_FAR, "rate": 0.01}, steps=1)).healing[0]
    assert losses[2] == pytest.approx(slow.held_out[1].objective, rel=0.05)
    never = healed(small, tmp_path / "never", quick(words, **{**TOO_FAR, "back_off": 1}, steps=6)).healing[0]
    assert never.best_step == 0
    still = healed(small, tmp_path / "still", quick(words, **{**TOO_FAR, "back_off": 1e300}, steps=4)).healing[0]
    assert (still.best_step, still.steps) == (0, 4)  # twice as far down is no number but 0


def test_early_stop_keeps_the_best(small: Path, words: Path, tmp_path: Path) -> None:
    """A rate that destroys the model: what is kept are the bytes of before, and training ends after two looks."""
    settings = quick(words, **{**TOO_FAR, "back_off": 1}, steps=50, patience=2, schedule="constant")
    healing = healed(small, tmp_path / "out", settings).healing[0]
    assert (healing.stopped, healing.best_step, healing.steps) == ("patience", 0, 2)
    assert (small / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert healing.after == healing.before == healing.held_out[0]
    assert re.search("all values are as they were; a --rate below 1 may", healing.remarks[0])
    other = healed(small, tmp_path / "other", quick(words, measure_every=1)).healing[0]
    assert other.after.objective == min(look.objective for look in other.held_out)


def test_layers_run_again_in_the_backward_pass_where_that_is_asked_for(
    small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[bool, int] = {}
    real = FactoredLinear.forward
    for again in (False, True):
        seen: list[int] = []
        monkeypatch.setattr(FactoredLinear, "forward", lambda layer, x, seen=seen: seen.append(1) or real(layer, x))
        settings = quick(words, steps=1, measure_every=1, checkpointing=again)
        healed(small, tmp_path / str(again), settings)
        calls[again] = len(seen)
    layers = len(list(factored_layers(lexigram.load(small))))
    assert calls[True] - calls[False] == layers  # one batch


def test_the_clock_ends_a_training(small: Path, words: Path, tmp_path: Path) -> None:
    healing = healed(small, tmp_path / "out", quick(words, steps=None, minutes=0.01)).healing[0]
    assert healing.stopped == "minutes"
    assert healing.steps >= 1
    assert healing.seconds >= 0.6


@pytest.mark.parametrize("objective", ["kl", "layers", "tokens"])
def test_a_forward_pass_in_bfloat16(
    objective: str, small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast; what is trained stays in float32, and what is stored is what was trained."""
    settings = quick(words, objective=objective, compute_dtype="bfloat16")
    dtypes: set[torch.dtype] = set()
    real = FactoredLinear.forward

    def noting(layer: FactoredLinear, x: Tensor) -> Tensor:
        y = real(layer, x)
        dtypes.add(y.dtype)
        return y

    monkeypatch.setattr(FactoredLinear, "forward", noting)
    record = healed(small, tmp_path / "out", settings)
    assert dtypes == {torch.bfloat16}
    healing = record.healing[0]
    assert healing.machine["compute_dtype"] == "bfloat16"
    assert healing.after.objective < healing.before.objective
    assert lexigram.verify(tmp_path / "out").passed
    packed = loss_of_stored(tmp_path / "out", words, torch.bfloat16)
    assert packed == pytest.approx(healing.after.tokens, rel=1e-2)


@pytest.mark.slow
def test_healing_lowers_the_loss_of_a_trained_model(stories: Path, data: Path, tmp_path: Path) -> None:
    """Compressed hard, a few dozen steps; held-out perplexity comes from the evaluation, on other sequences."""
    text = data / "tinystories" / "tinystories.txt"
    calibration = {"text": str(text), "sequences": 8, "length": 128}
    content = {"model": str(stories), "ratio": 0.8, "method": {"name": "wanda"}, "device": "cpu"}
    lexigram.compress(
        Recipe.parse({**content, "calibration": calibration, "compute_dtype": "float32"}), tmp_path / "small"
    )
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[-20_000:])
    training_text = tmp_path / "training.txt"
    training_text.write_text(text.read_text()[:-20_000])
    settings = quick(training_text, sequences=64, length=128, batch=4, steps=24, measure_every=8, warmup=4)
    record = healed(tmp_path / "small", tmp_path / "out", settings)
    losses = [look.objective for look in record.healing[0].held_out]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert record.healing[0].after.tokens < record.healing[0].before.tokens - 0.3
    perplexities = []
    for folder in (tmp_path / "small", tmp_path / "out"):
        model, tokenizer = lexigram.transformers_io.open_model(str(folder))
        found = lexigram.evaluate(model, tokenizer, other.read_text(), context=128, windows=5)
        perplexities.append(found.negative_log_likelihood)
    assert perplexities[1] < perplexities[0] - 0.3


# ------------------------------------------------------------------------------------------------------------ ended early


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("ends", [[3], [2, 5], [1, 4, 6]])
def test_a_training_that_ended_anywhere_ends_in_the_same_bytes(
    ends: list[int], far: bool, small: Path, words: Path, tmp_path: Path
) -> None:
    """The step before which it ended, counted from the beginning of each run; `far` takes steps from which it goes back."""
    settings = quick(words, steps=8, **(TOO_FAR if far else {}))
    for at in ends:
        with pytest.raises(Stop):
            healed(small, tmp_path / "out", settings, resume=True, progress=StopAt(at, of="heal"))
        assert not (tmp_path / "out").exists()
    record = healed(small, tmp_path / "out", settings, resume=True)
    whole = healed(small, tmp_path / "whole", settings)
    assert far == ("went on from the best state" in whole.healing[0].remarks[0])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert record.healing[0].held_out == whole.healing[0].held_out
    assert record.healing[0].best_step > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_ctrl_c_keeps_the_step(small: Path, words: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop = StopAt(3, lambda: os.kill(os.getpid(), signal.SIGINT), of="heal")
        with pytest.raises(KeyboardInterrupt):
            healed(small, tmp_path / "out", quick(words, save_every=100), progress=stop)
    finally:
        signal.signal(signal.SIGINT, before)
    state = run_folder(tmp_path / "out") / training.STATE
    assert state.is_file()
    assert "now." in str(list(load_file(state)))
    healed(small, tmp_path / "out", quick(words, save_every=100), resume=True)
    healed(small, tmp_path / "whole", quick(words))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("at", [5, 6])
def test_ctrl_c_in_the_last_step_ends_the_run_and_loses_nothing(
    at: int, small: Path, words: Path, tmp_path: Path
) -> None:
    """The last of six steps, and the look after it: nothing is left but to write, which another run does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = {5: StopAt(6, interrupt, of="heal"), 6: StopAt(1, interrupt, of="held-out text after 6 steps")}
    try:
        with pytest.raises(KeyboardInterrupt):
            healed(small, tmp_path / "out", quick(words, save_every=100), progress=ends[at])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "out").exists()
    healed(small, tmp_path / "out", quick(words), resume=True, progress=StopAt(1, of="heal"))
    healed(small, tmp_path / "whole", quick(words))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_memory_that_does_not_suffice_is_an_error_and_costs_no_step_that_is_saved(
    small: Path, words: Path, tmp_path: Path
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(LexigramError, match=r"^memory did not suffice \(CUDA out of .*GiB\); .*--checkpointing"):
        healed(small, tmp_path / "out", quick(words), progress=StopAt(6, full, of="heal"))
    assert (run_folder(tmp_path / "out") / training.STATE).is_file()
    healed(small, tmp_path / "out", quick(words), resume=True)
    healed(small, tmp_path / "whole", quick(words))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_disk_that_is_full_when_the_result_is_written_costs_no_step(
    small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lexigram.healing._write", full)
        with pytest.raises(LexigramError, match=r"out could not be written: No space left.*go on with --resume"):
            healed(small, tmp_path / "out", quick(words, save_every=100))
    healed(small, tmp_path / "out", quick(words), resume=True, progress=StopAt(1, of="heal"))
    healed(small, tmp_path / "whole", quick(words))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_kill_after_the_last_rename(
    small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is in its place, and the run's folder was not removed yet."""
    with monkeypatch.context() as patched:
        patched.setattr("lexigram.runfolder._remove", lambda *_: None)
        record = healed(small, tmp_path / "out", quick(words))
    assert (tmp_path / "out.unfinished" / MANIFEST).is_file()
    with pytest.raises(LexigramError, match="out exists and is not empty"):
        healed(small, tmp_path / "out", quick(words))
    again = healed(small, tmp_path / "out", quick(words), resume=True, progress=StopAt(1))
    assert again == record
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(LexigramError, match="out exists and is not empty"):
        healed(small, tmp_path / "out", quick(words, rate=0.01), resume=True)


def test_two_runs_on_one_folder(small: Path, words: Path, tmp_path: Path) -> None:
    """Told before anything that takes long, and never to delete what another works on."""
    folder = unfinished(small, words, tmp_path / "out")
    manifest = json.loads((folder / MANIFEST).read_text())
    for resume in (False, True):
        with (
            runfolder_opened(tmp_path / "out", manifest["identity"], resume=True),
            pytest.raises(LexigramError, match=r"another run works on .*out\.unfinished; wait for it"),
        ):
            healed(small, tmp_path / "out", quick(words), resume=resume, progress=StopAt(1))


def test_what_changes_no_byte_stops_no_resuming(small: Path, words: Path, tmp_path: Path) -> None:
    own = str(forward_dtype(torch.device("cpu"))).removeprefix("torch.")
    first, second = quick(words, compute_dtype="auto"), quick(words, compute_dtype=own, checkpointing=True)
    with pytest.raises(Stop):
        healed(small, tmp_path / "out", first, progress=StopAt(5, of="heal"))
    healed(small, tmp_path / "out", second, resume=True)
    healed(small, tmp_path / "whole", first)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    other = "bfloat16" if own == "float32" else "float32"
    with pytest.raises(Stop):
        healed(small, tmp_path / "other", first, progress=StopAt(5, of="heal"))
    with pytest.raises(LexigramError, match=f"was begun with a forward pass in {own}, and this run has {other}"):
        healed(small, tmp_path / "other", quick(words, compute_dtype=other), resume=True)


def test_batches_in_parts_end_in_the_same_bytes_too(
    small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts a step: with gradient checkpointing, and over an interruption in an epoch that repeats."""
    monkeypatch.setattr("lexigram.healing._AT_ONCE", 64)
    settings = quick(words, steps=8)
    with pytest.raises(Stop):
        healed(small, tmp_path / "out", settings, progress=StopAt(6, of="heal"))
    healed(small, tmp_path / "out", settings.model_copy(update={"checkpointing": True}), resume=True)
    healed(small, tmp_path / "whole", settings)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("begun", [False, True])
def test_the_disk_is_asked_for_what_is_needed(
    begun: bool, small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the most that lies beside the output at once and a tenth more; what is there already is not asked for again."""
    settings = quick(words, save_every=1)
    there = 0
    if begun:
        with pytest.raises(Stop):
            healed(small, tmp_path / "out", settings, progress=StopAt(4, of="heal"))
        there = sum(path.stat().st_size for path in run_folder(tmp_path / "out").rglob("*") if path.is_file())
    most, asked, real, sync = [0], [0], lexigram.healing.check_target, os.fsync

    def noting(*args: Any, needed_bytes: int = 0, **options: Any) -> None:
        asked.append(needed_bytes)
        real(*args, needed_bytes=needed_bytes, **options)

    def synced(file: int) -> None:
        most.append(sum(path.stat().st_size for path in run_folder(tmp_path / "out").rglob("*") if path.is_file()))
        sync(file)

    monkeypatch.setattr("lexigram.healing.check_target", noting)
    monkeypatch.setattr(os, "fsync", synced)
    healed(small, tmp_path / "out", settings, resume=True)
    result = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert max(most) - there < max(asked) < 1.1 * max(most) + result - there


def unfinished(small: Path, words: Path, out: Path) -> Path:
    with pytest.raises(Stop):
        healed(small, out, quick(words), progress=StopAt(5, of="heal"))
    return run_folder(out)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate": 0.5}, r"was begun with rate 0\.02, and this run has 0\.5"),
        ({"steps": 9}, "was begun with steps 6, and this run has 9"),
        ({"objective": "tokens"}, "was begun with objective kl, and this run has tokens"),
        ({"seed": 3}, "was begun with the text [0-9a-f]{64}, and this run has [0-9a-f]{64}"),
    ],
    ids=str,
)
def test_a_state_of_other_settings_is_refused_with_the_difference(
    changes: dict[str, Any], says: str, small: Path, words: Path, tmp_path: Path
) -> None:
    folder = unfinished(small, words, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(LexigramError, match=says):
        healed(small, tmp_path / "out", quick(words, **changes), resume=True)
    assert contents(folder) == before
    healed(small, tmp_path / "out", quick(words, save_every=50), resume=True)


def test_without_resume_an_unfinished_training_is_left_alone(small: Path, words: Path, tmp_path: Path) -> None:
    folder = unfinished(small, words, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(LexigramError, match=r"out\.unfinished holds an unfinished run; go on with --resume"):
        healed(small, tmp_path / "out", quick(words))
    assert contents(folder) == before


def test_an_earlier_result_is_back_before_one_is_told_to_delete_the_training(
    small: Path, words: Path, tmp_path: Path
) -> None:
    """A kill between two renames leaves it in the training's folder."""
    folder, earlier = unfinished(small, words, tmp_path / "out"), contents(small)
    shutil.copytree(small, folder / f".out{REPLACED}x" / "out")
    with pytest.raises(LexigramError, match=r"out\.unfinished holds an unfinished run; go on with --resume, or delete"):
        healed(small, tmp_path / "out", quick(words), overwrite=True)
    assert list(folder.rglob(WEIGHTS)) == []
    assert {Path(name).name: content for name, content in contents(tmp_path / "out").items()} == {
        Path(name).name: content for name, content in earlier.items()
    }


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_state_is_named(damage: str, small: Path, words: Path, tmp_path: Path) -> None:
    file = unfinished(small, words, tmp_path / "out") / training.STATE
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content if damage == "flipped" else content[: -5 if damage == "truncated" else 0])
    with pytest.raises(
        LexigramError, match=r"state\.safetensors is damaged \(.*delete .*out\.unfinished and run again"
    ):
        healed(small, tmp_path / "out", quick(words), resume=True)


# --------------------------------------------------------------------------------------------------------------- bad input


def test_a_compressed_model_is_no_original(small: Path, words: Path, tmp_path: Path) -> None:
    says = "shared bases is compressed itself; name the original model"
    with pytest.raises(LexigramError, match=says):
        healed(small, tmp_path / "out", quick(words), against=str(small))
    with pytest.raises(LexigramError, match=says):
        lexigram.verify(small, against=str(small))
    assert not list(tmp_path.glob("out*"))


def test_an_objective_that_imitates_none_takes_no_original(small: Path, toy: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LexigramError, match=r"tokens imitates no model; leave out --against .*, or take --objective kl or"
    ):
        healed(small, tmp_path / "out", quick(words, objective="tokens"), against=str(toy))


def test_a_result_inside_of_its_own_model_is_refused(small: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "small")
    before = contents(folder)
    for out in (folder / "healed", folder / "a" / "b", tmp_path / "other" / ".." / "small" / "healed"):
        with pytest.raises(LexigramError, match=r"lies in .*small, which has to stay as it is; name another"):
            healed(folder, out, quick(words))
    assert contents(folder) == before


def other_weights(toy: Path, folder: Path) -> Path:
    shutil.copytree(toy, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def other_norm(toy: Path, folder: Path) -> Path:
    shutil.copytree(toy, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_weights, "cannot be healed: the weights of .*other are not those that were compressed; .*--against"),
        (other_norm, r"cannot be healed: model\.norm\.weight is not that of the original; .*--against"),
        (lambda toy, folder: toy_folder(folder, "gpt2"), "cannot be healed: .* is not the model that was compressed"),
        (lambda toy, folder: Path("/no/model"), "there is no model '/no/model'"),
    ],
)
def test_another_original_is_refused(
    change: Callable[[Path, Path], Path], says: str, toy: Path, small: Path, words: Path, tmp_path: Path
) -> None:
    other = change(toy, tmp_path / "other")
    with pytest.raises(LexigramError, match=says):
        healed(small, tmp_path / "out", quick(words), against=str(other))
    assert not list(tmp_path.glob("out*"))


def test_an_original_that_went_away_is_named(toy: Path, words: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(toy, tmp_path / "toy")
    made(moved, words, tmp_path / "small", method={"name": "svd"})
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(LexigramError, match=r"names .*toy as its original, name another with --against"):
        healed(tmp_path / "small", tmp_path / "out", quick(words))
    healed(tmp_path / "small", tmp_path / "out", quick(words), against=str(tmp_path / "elsewhere"))
    healed(tmp_path / "small", tmp_path / "none", quick(words, objective="tokens"))


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 16
    (folder / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "is not as it was written; fetch it or compress again"),
        (lambda folder: (folder / "run.json").unlink(), r"is no compressed model \(it has no run\.json\)"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"lexigram\.safetensors is missing; fetch"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not as it was written; fetch"),
        (shutil.rmtree, r"is no compressed model \(it has no run\.json\)"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Callable[[Path], object], says: str, small: Path, words: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "small")
    damage(folder)
    with pytest.raises(LexigramError, match=says):
        healed(folder, tmp_path / "out", quick(words))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sequences": 5000}, r"has 2000 tokens, too few for 5004 sequences of 32"),
        ({"length": 129}, "length 129 is more than the 128 positions"),
    ],
)
def test_a_text_that_is_too_short_and_a_length_that_is_too_long(
    changes: dict[str, Any], says: str, small: Path, words: Path, tmp_path: Path
) -> None:
    with pytest.raises(LexigramError, match=says):
        healed(small, tmp_path / "out", quick(words, **changes))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("objective", ["kl", "layers", "tokens"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_loss_that_is_not_finite_ends_in_a_sentence(
    objective: str, at: int, small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind, not even the state: it is of no use to another rate."""
    losses, calls = dict(distillation._LOSSES), []
    real = losses[objective]  # type: ignore[index]

    def broken(*args: Any) -> Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > at + 4 else 1)

    monkeypatch.setitem(distillation._LOSSES, objective, broken)  # type: ignore[misc]
    with pytest.raises(LexigramError, match=r"the loss.* is nan after \d+ steps; lower --rate \(0\.02 now\)"):
        healed(small, tmp_path / "out", quick(words, objective=objective, save_every=1, measure_every=50))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["the loss", "the loss on held-out text"])
def test_what_was_better_before_a_loss_that_is_not_finite_is_the_result(
    place: str, small: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth step fails, or the look after it: the values after the second are written, as the record says."""
    losses = dict(distillation._LOSSES)

    def broken(found: Any, wanted: Any, ids: Tensor) -> Tensor:
        bad = found.logits.requires_grad == (place == "the loss") and state().step >= (3 if place == "the loss" else 4)
        return losses["tokens"](found, wanted, ids) * (float("nan") if bad else 1)

    trainings: list[Any] = []
    begin = training.Training.__init__
    monkeypatch.setattr(
        training.Training, "__init__", lambda self, *args: (trainings.append(self), begin(self, *args))[1]
    )

    def state() -> Any:
        return trainings[-1].state

    with monkeypatch.context() as patched:
        patched.setitem(distillation._LOSSES, "tokens", broken)
        settings = quick(words, objective="tokens", measure_every=2)
        record = healed(small, tmp_path / "out", settings)
    healing = record.healing[0]
    assert (healing.stopped, healing.best_step) == ("not finite", 2)
    assert re.match(rf"{place} is nan after \d steps; these are the values after 2; .*lower --rate", healing.remarks[0])
    assert healing.after.objective < healing.before.objective
    assert lexigram.verify(tmp_path / "out").passed
    packed = loss_of_stored(tmp_path / "out", words, torch.float32)
    assert packed == pytest.approx(healing.after.tokens, rel=1e-4)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(small: Path, words: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    for out, says in (
        (tmp_path / "file", "exists and is not a folder"),
        (tmp_path / "file" / "out", "is a file, so .* cannot be made in it"),
        (full, "exists and is not empty"),
    ):
        with pytest.raises(LexigramError, match=says):
            healed(small, out, quick(words), progress=StopAt(1, of="heal"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"texts": "t", "rate": 0}, r"rate is 0; it should be greater than 0"),
        ({"texts": "t", "steps": 0}, "steps is 0; it should be greater than or equal to 1"),
        ({"texts": ()}, "texts is"),
        ({"texts": "t", "objective": "masked"}, "objective is 'masked'; it should be 'kl', 'layers' or 'tokens'"),
        ({"texts": "t", "zork": 1}, "unknown key 'zork'"),
        ({"texts": "t", "layer_weight": -1}, "layer_weight is -1"),
        ({"texts": "t", "objective": "layers", "layer_weight": 1}, "`layers` is these alone; leave it out, or take"),
    ],
)
def test_bad_settings(content: dict[str, Any], says: str) -> None:
    with pytest.raises(LexigramError, match=says):
        HealingSettings.parse(content)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_heals_and_says_what_came_of_it(command: Command, small: Path, words: Path, tmp_path: Path) -> None:
    settings = ("--sequences", 12, "--held-out", 4, "--length", 32, "--batch", 4, "--steps", 4, "--warmup", 2)
    args = ("heal", small, "--text", words, "--out", tmp_path / "out", "--device", "cpu", *settings)
    ended = command(*args)
    assert ended.code == 0, ended.err
    assert re.search(
        r"kl on held-out text [\d.]+ -> [\d.]+, next-token loss .* of 4 steps \(ended by steps\)", ended.out
    )
    assert command("verify", tmp_path / "out").code == 0
    assert "exists and is not empty" in command(*args).error
    assert command("heal", small, "-t", "/no/text.txt", "-o", tmp_path / "no").error.startswith("there is no file")
    assert "objective is 'mlm'" in command(*args[:-8], "--objective", "mlm", "-o", tmp_path / "no").error


def test_errors_of_before_are_called_so(command: Command, small: Path, toy: Path, words: Path, tmp_path: Path) -> None:
    healed(small, tmp_path / "out", quick(words, steps=1))
    before, after = command("inspect", small).out, command("inspect", tmp_path / "out").out
    assert "before healing" not in before
    assert len(re.findall("before healing", after)) == 2
    said = json.loads(command("inspect", tmp_path / "out", "--json").out)["healing"][0]["remarks"]
    assert said == ["the errors of the layers' fits are those before healing"]
    found = lexigram.verify(tmp_path / "out", against=str(toy), texts=[str(words)], length=32)
    [errors] = [check for check in found.checks if check.name == "layer errors"]
    assert errors.passed is None
    assert re.search(r"by the record [\d.]+ before healing; not held against", errors.message)


def test_a_folder_with_an_adapter_in_it_is_refused(small: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "small")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LexigramError, match=r"adapter_config\.json"):
        healed(folder, tmp_path / "out", quick(words))


def test_files_in_folders_are_healed_with_the_others(words: Path, tmp_path: Path) -> None:
    made(templated_folder(tmp_path / "toy"), words, tmp_path / "small", method={"name": "svd"})
    settings = quick(words, steps=2)
    for _ in range(2):  # the second is in the place of the first
        record = healed(tmp_path / "small", tmp_path / "out", settings, overwrite=True)
        assert (tmp_path / "out" / TEMPLATE).read_bytes() == (tmp_path / "small" / TEMPLATE).read_bytes()
        assert TEMPLATE in record.files_sha256
        assert lexigram.verify(tmp_path / "out").passed
    (tmp_path / "out" / TEMPLATE).with_name("notes.txt").write_text("mine")
    with pytest.raises(
        LexigramError, match=r"out holds additional_chat_templates/notes\.txt, which lexigram did not write"
    ):
        healed(tmp_path / "small", tmp_path / "out", settings, overwrite=True)


def test_what_the_hub_puts_beside_is_not_healed(small: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "small")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    (folder / "README.md").write_text("x")
    healed(folder, tmp_path / "out", quick(words, steps=2))
    assert contents(tmp_path / "out").keys() == {
        key.replace(str(small), str(tmp_path / "out")) for key in contents(small)
    }
    assert lexigram.verify(tmp_path / "out").passed


def test_an_empty_folder_beside_a_result_is_not_replaced(small: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "out")
    (folder / ".git").mkdir()
    with pytest.raises(LexigramError, match=r"out holds \.git, which lexigram did not write"):
        healed(small, folder, quick(words), overwrite=True)


@pytest.mark.parametrize(
    "name",
    ["../payload", "/payload", "inside/../../payload", "./payload", "a//b", "a/", "..", "a\\b", "a\nb", "a/b\nc"],
)
def test_a_record_names_files_of_its_folder_alone(name: str, small: Path, words: Path, tmp_path: Path) -> None:
    """Healing copies them, and would write elsewhere by such a name."""
    folder = shutil.copytree(small, tmp_path / "small")
    record = json.loads((folder / "run.json").read_text())
    record["files"].append(name)
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(LexigramError, match=r"run\.json was not written by lexigram .*: files\."):
        healed(folder, tmp_path / "out", quick(words))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_file_behind_a_link_to_a_folder_is_none_of_the_result(small: Path, words: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "small")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (folder / "inside").symlink_to(tmp_path / "private")
    record = json.loads((folder / "run.json").read_text())
    record["files"].append("inside/key")
    record["files_sha256"] = {}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(LexigramError, match="cannot be healed: inside/key is missing"):
        healed(folder, tmp_path / "out", quick(words))
    assert not (tmp_path / "out").exists()


def test_hashes_of_a_healed_folder_are_those_of_its_files(small: Path, words: Path, tmp_path: Path) -> None:
    record = healed(small, tmp_path / "out", quick(words))
    assert record.files_sha256 == {name: file_sha256(tmp_path / "out" / name) for name in record.files_sha256}
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    names = {torch.uint8: "U8", torch.int16: "I16", torch.bfloat16: "BF16", torch.float32: "F32"}
    for name, tensor in tensors.items():
        head = f"{names[tensor.dtype]} {'x'.join(map(str, tensor.shape))}:".encode()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert record.tensors_sha256[name] == hashlib.sha256(head + content).hexdigest()
