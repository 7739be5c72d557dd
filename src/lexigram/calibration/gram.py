"""Grams added up from the inputs that layers see in forward passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from lexigram.errors import LexigramError
from lexigram.gram import Gram

_CHUNK_TOKENS = 2048  # float32 inside a chunk, float64 across chunks
_BLOCKS = 3


class GramAccumulator:
    """Adds up a Gram from batches of inputs.

    Products are float32 over at most 2048 tokens and these partial sums are added in float64: the rounding error stays that
    of a short float32 sum while the cost is that of float32 products.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs (..., in)."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for chunk in rows.split(_CHUNK_TOKENS):
            self._sum += _upper_self_product(chunk)
        self._tokens += rows.shape[0]

    def result(self, name: str) -> Gram:
        """The Gram.

        Raises:
            LexigramError: naming `name`, where no input or a non-finite one was seen.
        """
        if self._sum is None:
            raise LexigramError(f"{name} received no input from the calibration text; exclude it or give more text")
        if not bool(torch.isfinite(self._sum).all()):
            raise LexigramError(
                f"the inputs of {name} are not finite on the calibration text; compute in float32 "
                "(--compute-dtype float32) or look for broken weights before it"
            )
        upper = self._sum.triu()
        return Gram(upper + upper.triu(1).T, self._tokens)


class CrossAccumulator:
    """Adds up ``X0^T X`` from two streams of inputs to the same tokens, as `GramAccumulator` does ``X^T X``."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, original: Tensor, inputs: Tensor) -> None:
        """Add two times inputs (..., in)."""
        width = inputs.shape[-1]
        if self._sum is None:
            self._sum = torch.zeros(width, width, dtype=torch.float64, device=inputs.device)
        both = (original.detach().reshape(-1, width), inputs.detach().reshape(-1, width))
        with torch.autocast(inputs.device.type, enabled=False), _fast_where_exact(inputs.dtype):
            for first, second in zip(*(rows.split(_CHUNK_TOKENS) for rows in both), strict=True):
                self._sum += first.float().T @ second.float()

    @property
    def total(self) -> Tensor:
        """The sum so far, (in, in) float64."""
        assert self._sum is not None
        return self._sum


def _upper_self_product(rows: Tensor) -> Tensor:
    """``rows^T rows`` in float32; blocks below the diagonal are left at zero, which saves a third of the work."""
    width = rows.shape[1]
    work = rows.float()
    product = work.new_zeros(width, width)
    edges = [width * block // _BLOCKS for block in range(_BLOCKS + 1)]
    # Inputs arrive in the middle of a forward pass; its autocast would round these products to bfloat16.
    with torch.autocast(rows.device.type, enabled=False), _fast_where_exact(rows.dtype):
        for first, last in pairwise(edges):
            torch.mm(work[:, first:last].T, work[:, first:], out=product[first:last, first:])
    return product


@contextmanager
def _fast_where_exact(dtype: torch.dtype) -> Iterator[None]:
    """Let the device round the factors of float32 products to bfloat16 where they come from there: it changes nothing.

    Sums are float32 all the same. On a CPU with bfloat16 instructions this is half as fast again.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def watching(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While open, the latest input of every module stands under its name."""
    seen: dict[str, Tensor] = {}
    with _inputs_to(modules, seen.__setitem__):
        yield seen


@contextmanager
def collecting(modules: dict[str, nn.Module]) -> Iterator[dict[str, GramAccumulator]]:
    """While open, the inputs of every module are added to the accumulator of its name."""
    accumulators = {name: GramAccumulator() for name in modules}
    with _inputs_to(modules, lambda name, inputs: accumulators[name].add(inputs)):
        yield accumulators


@contextmanager
def _inputs_to(modules: dict[str, nn.Module], receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook_for(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            receive(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    hooks = [module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
