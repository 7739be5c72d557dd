"""The model layer by layer against a genuine forward pass, and Grams against ``X^T X`` in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import TOYS, build_toy
from drawn import gram_of
from lexigram.calibration.gram import GramAccumulator, collecting
from lexigram.calibration.layerwise import LayerRunner
from lexigram.errors import LexigramError
from lexigram.targets import decoder_layers, find_targets


def tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (sequences, length), generator=torch.Generator().manual_seed(seed))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def outputs_of(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, list[Tensor]]]:
    """What each module gives while the context is open, call by call."""
    found: dict[Any, list[Tensor]] = {key: [] for key in modules}
    with ExitStack() as stack:
        for key, module in modules.items():
            hook = module.register_forward_hook(
                lambda _module, _args, output, key=key: found[key].append(first(output).detach().clone())
            )
            stack.callback(hook.remove)
        yield found


def genuine(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every decoder layer's output and the logits of one ordinary forward pass."""
    with outputs_of(dict(enumerate(decoder_layers(model)))) as found, torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return [found[index][0] for index in range(len(found))], logits


def layer_by_layer(model: PreTrainedModel, ids: Tensor, **options: Any) -> tuple[list[Tensor], Tensor, list[int]]:
    """The same through `LayerRunner`, and the sizes of its batches."""
    layers = decoder_layers(model)
    runner = LayerRunner(model, layers, ids, **options)
    outputs = []
    batches: list[int] = []
    for index, layer in enumerate(layers):
        with outputs_of({0: layer}) as found:
            runner.run(index)
        outputs.append(torch.cat(found[0]))
        batches = [len(output) for output in found[0]]
    head = model.get_output_embeddings()
    with outputs_of({0: head}) as found:
        list(runner.rest())
    return outputs, torch.cat(found[0]), batches


def assert_same_run(model: PreTrainedModel, ids: Tensor, batches: list[int], **options: Any) -> None:
    expected, expected_logits = genuine(model, ids)
    outputs, logits, found_batches = layer_by_layer(model, ids, **options)
    assert found_batches == batches
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.allclose(output, wanted, rtol=1e-4, atol=1e-5), f"layer {index}"
    assert torch.allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)


# --- layer by layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TOYS))
@pytest.mark.parametrize(("batch_tokens", "batches"), [(40, [2, 2, 1]), (4096, [5]), (1, [1] * 5)])
def test_every_layer_gives_what_it_gives_in_the_model(name: str, batch_tokens: int, batches: list[int]) -> None:
    # 20 tokens: longer than Gemma's window of 8, so that its sliding layer differs from full attention.
    assert_same_run(build_toy(name), tokens(5, 20), batches, batch_tokens=batch_tokens)


def test_the_layers_of_the_test_do_something() -> None:
    outputs, _ = genuine(build_toy("gemma3"), tokens(2, 20))
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_implementation(attention: str) -> None:
    model = build_toy("gemma3")
    model.set_attn_implementation(attention)
    assert_same_run(model, tokens(3, 12), [2, 1], batch_tokens=24)


def with_tuples(model: PreTrainedModel) -> PreTrainedModel:
    """Let every layer return a tuple and the model unpack it, as older architectures do."""

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
            return self.layer(*args, **kwargs), "attention weights"

    class Unpacking(nn.ModuleList):
        """What the model's loop sees: callables that unpack. The list itself still holds the layers."""

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                return [self._unpack(layer) for layer in list(nn.ModuleList.__iter__(self))[index]]
            return super().__getitem__(index)

        @staticmethod
        def _unpack(layer: nn.Module) -> Callable[..., Tensor]:
            def call(*args: Any, **kwargs: Any) -> Tensor:
                hidden, extra = layer(*args, **kwargs)
                assert extra == "attention weights"
                return hidden

            return call

    model.model.layers = Unpacking([Wrapped(layer) for layer in model.model.layers])
    return model


def test_layers_that_return_tuples() -> None:
    model = with_tuples(build_toy("llama"))
    plain = genuine(build_toy("llama"), tokens(3, 8))
    assert torch.equal(genuine(model, tokens(3, 8))[1], plain[1]), "the wrapped model is the same model"
    assert_same_run(model, tokens(3, 8), [2, 1], batch_tokens=16)


def test_layers_called_by_keyword() -> None:
    model = build_toy("llama")
    for layer in model.model.layers:
        # A hook with kwargs may rewrite how the layer is called: here, hidden states by keyword.
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: ((), {"hidden_states": args[0], **kwargs}) if args else None, with_kwargs=True
        )
    assert_same_run(model, tokens(3, 8), [2, 1], batch_tokens=16)


def test_one_layer_is_enough() -> None:
    config = TOYS["llama"]()
    config.num_hidden_layers = 1
    config.layer_types = None
    assert_same_run(AutoModelForCausalLM.from_config(config).eval(), tokens(2, 8), [2])


def test_a_float32_model_runs_in_bfloat16_and_keeps_its_weights() -> None:
    model = build_toy("llama")
    ids = tokens(3, 8)
    _, expected = genuine(copy.deepcopy(model).to(torch.bfloat16), ids)
    _, logits, _ = layer_by_layer(model, ids, compute_dtype=torch.bfloat16)
    assert torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert not torch.equal(logits.float(), genuine(model, ids)[1]), "it was not computed in float32"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_replaced_layers_are_carried_on() -> None:
    """Later layers see the outputs of the layers as they are now: a change after its own run comes too late."""
    model = build_toy("llama")
    layers = decoder_layers(model)
    ids = tokens(2, 8)
    _, original = genuine(model, ids)
    runner = LayerRunner(model, layers, ids)
    with torch.no_grad():
        layers[0].mlp.down_proj.weight.mul_(3.0)
        runner.run(0)
        runner.run(1)
    with outputs_of({0: model.lm_head}) as found:
        list(runner.rest())
    assert torch.allclose(found[0][0], genuine(model, ids)[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0][0], original, rtol=1e-2, atol=1e-2)


def untouched(model: PreTrainedModel) -> bool:
    return not any("forward" in layer.__dict__ or layer._forward_hooks for layer in decoder_layers(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_layers_are_left_as_they_were(name: str) -> None:
    model = build_toy(name)
    before = genuine(model, tokens(2, 8))[1]
    layer_by_layer(model, tokens(2, 8))
    assert untouched(model)
    assert torch.equal(genuine(model, tokens(2, 8))[1], before)


@pytest.mark.parametrize("where", ["layer", "after the layers"])
def test_the_layers_are_left_as_they_were_after_an_exception(where: str) -> None:
    model = build_toy("llama")
    broken = model.model.layers[0].mlp if where == "layer" else model.lm_head
    hook = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        layer_by_layer(model, tokens(2, 8))
    hook.remove()
    assert untouched(model)


def test_a_forward_of_the_instance_survives() -> None:
    """accelerate's offloading, among others, sets `forward` on the instance."""
    model = build_toy("llama")
    layer = model.model.layers[1]
    original, calls = layer.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = forward
    layer_by_layer(model, tokens(2, 8))
    assert layer.forward is forward
    assert calls, "and it was used"


# --- Grams -------------------------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 99))
def test_a_gram_is_the_sum_over_the_tokens(width: int, count: int, seed: int) -> None:
    X = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    gram = gram_of(X)
    assert gram.matrix.dtype == torch.float64
    assert gram.tokens == count
    assert torch.equal(gram.matrix, gram.matrix.T)
    # Float32 products of float32 inputs over `count` tokens: well within count * 2^-24 of the largest entry.
    assert relative(gram.matrix, X.double().T @ X.double()) <= count * 2.0**-24 + 1e-7


def test_many_tokens_do_not_lose_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50_000, 8, generator=generator) + 5  # a mean far from zero: all products have one sign
    exact = X.double().T @ X.double()
    error = relative(gram_of(*X.split(5000)).matrix, exact)
    one_float32_sum = torch.zeros(8, 8)
    for token in X.split(1):
        one_float32_sum += token.T @ token
    assert error < 1e-6
    assert error < relative(one_float32_sum.double(), exact) / 20


@pytest.mark.parametrize("sizes", [[3000], [1, 2999], [2048, 952], [1000, 1000, 1000], [7] * 428 + [4]])
def test_the_batch_split_does_not_matter(sizes: list[int]) -> None:
    X = torch.randn(3000, 12, generator=torch.Generator().manual_seed(1))
    gram = gram_of(*X.split(sizes))
    assert gram.tokens == 3000
    assert relative(gram.matrix, gram_of(X).matrix) < 1e-6
    shaped = gram_of(X.view(3, 10, 100, 12))
    assert torch.equal(shaped.matrix, gram_of(X).matrix)
    assert shaped.tokens == 3000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    X = torch.randn(100, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert relative(gram_of(X).matrix, X.double().T @ X.double()) < 1e-6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_does_not_coarsen_the_products(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    X = torch.randn(500, 9, generator=torch.Generator().manual_seed(2)).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        gram = gram_of(X)
    assert gram.matrix.device.type == device
    assert relative(gram.matrix, X.double().T @ X.double()) < 1e-6


def test_inputs_that_need_gradients_leave_no_graph() -> None:
    gram = gram_of(torch.ones(3, 2, requires_grad=True))
    assert not gram.matrix.requires_grad


def test_the_whitening_is_a_factor_of_the_gram_and_made_once() -> None:
    gram = gram_of(torch.randn(50, 6, generator=torch.Generator().manual_seed(3)))
    factor = gram.whitening.factor
    assert torch.allclose(factor.T @ factor, gram.matrix, rtol=1e-10, atol=1e-10)
    assert gram.whitening is gram.whitening


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("place", [(0, 0), (2, 4), (1, 5)])
def test_inputs_that_are_not_finite_name_the_site(value: float, place: tuple[int, int]) -> None:
    X = torch.ones(3, 6)
    X[place] = value  # 1e30 is finite, its square in float32 is not
    accumulator = GramAccumulator()
    accumulator.add(torch.ones(2, 6))
    accumulator.add(X)
    with pytest.raises(LexigramError, match=r"inputs of model\.layers\.3\.q_proj are not finite"):
        accumulator.result("model.layers.3.q_proj")


def test_a_site_without_input_is_an_error() -> None:
    used, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    with collecting({"used": used, "unused": unused}) as accumulators:
        used(torch.ones(2, 3))
    assert accumulators["used"].result("used").tokens == 2
    with pytest.raises(LexigramError, match="unused received no input"):
        accumulators["unused"].result("unused")


def test_collecting_stops_with_its_context() -> None:
    module = nn.Linear(3, 3)
    with collecting({"m": module}) as accumulators:
        module(torch.ones(2, 3))
    module(torch.ones(2, 3))
    assert accumulators["m"].result("m").tokens == 2
    with pytest.raises(RuntimeError, match="broken"), collecting({"m": module}):
        raise RuntimeError("broken")
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_grams_of_a_model_layer_by_layer(name: str, dtype: torch.dtype) -> None:
    """The way `compress` goes, against the inputs of one ordinary forward pass."""
    model = build_toy(name)
    ids = tokens(5, 20)
    sites = {target.site: target.layer for target in find_targets(model)}
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}
    hooks = [
        model.get_submodule(site).register_forward_pre_hook(lambda _m, args, site=site: seen[site].append(args[0]))
        for site in sites
    ]
    model.to(dtype)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    model.float()
    runner = LayerRunner(model, decoder_layers(model), ids, batch_tokens=40, compute_dtype=dtype)
    for index in range(2):
        here = {site: model.get_submodule(site) for site, layer in sites.items() if layer == index}
        with collecting(here) as accumulators:
            runner.run(index)
        for site in here:
            X = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[site]]).double()
            gram = accumulators[site].result(site)
            assert gram.tokens == 100
            # The batch split alone changes the inputs in their last bfloat16 place.
            assert relative(gram.matrix, X.T @ X) < (1e-5 if dtype == torch.float32 else 5e-3), site


def test_recording_stops_before_lm_head() -> None:
    """Its logits over the whole vocabulary would be computed and thrown away."""
    model = build_toy("llama")
    calls: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda *_args: calls.append(1))
    runner = LayerRunner(model, decoder_layers(model), tokens(3, 8))
    runner.run(0)
    assert not calls
