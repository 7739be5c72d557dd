"""What tests of the numbers draw: weights, inputs as layers have them, Grams. The same seed gives the same."""

import torch
from torch import Tensor

from lexigram.calibration.gram import GramAccumulator
from lexigram.gram import Gram

SINGULAR = ["few tokens", "dead channels", "duplicate channels", "nothing"]
"""What leaves a Gram without full rank."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def correlated(tokens: int = 400, width: int = 32, seed: int = 1, decades: float = 2.0) -> Tensor:
    """Inputs with strong and weak directions over so many orders of magnitude, in no direction of the channels."""
    mixing = torch.linalg.qr(normal(width, width, seed=seed)).Q
    return normal(tokens, width, seed=seed + 1) * torch.logspace(0, -decades, width) @ mixing


def gram_of(*batches: Tensor) -> Gram:
    accumulator = GramAccumulator()
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result("test")


def singular_gram(kind: str, width: int = 24) -> Tensor:
    """One of `SINGULAR`, float64."""
    X = normal(100, width, dtype=torch.float64)
    if kind == "few tokens":
        X = X[:5]
    elif kind == "dead channels":
        X[:, 3:7] = 0
    elif kind == "duplicate channels":
        X[:, 3:7] = X[:, :1]
    elif kind == "nothing":
        X[:] = 0
    return X.T @ X
