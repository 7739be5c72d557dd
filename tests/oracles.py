"""What tests of several methods expect, computed from the definition."""

import torch
from torch import Tensor

from lexigram.factors import Factor


def output_error(weight: Tensor, factors: Factor, X: Tensor) -> float:
    """``||X W^T - X W^^T|| / ||X W^T||`` from the inputs, in float64."""
    wanted = X.double() @ weight.double().T
    return float((wanted - X.double() @ factors.to_dense(torch.float64).T).norm() / wanted.norm())


def whole_groups(cols: int, wanted: int) -> int:
    """The largest divisor of a row that is not above `wanted`."""
    return max(size for size in range(1, min(cols, wanted) + 1) if cols % size == 0)
