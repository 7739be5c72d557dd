"""The ``s`` largest entries of every row, exactly: the one step of hard thresholding that is not a matrix product."""

import torch
from torch import Tensor


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Boolean mask ``(n, k)`` with exactly ``count`` True in every row, at the largest values of that row.

    Equal values at the border are resolved for the lowest index, so the mask is a function of the values alone.
    """
    n, k = values.shape
    if not 0 <= count <= k:
        raise ValueError(f"cannot keep {count} of {k} entries a row; choose a count between 0 and {k}")
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count == k:
        return torch.ones_like(values, dtype=torch.bool)
    border = values.kthvalue(k - count + 1, dim=1, keepdim=True).values
    mask = values > border
    equal = values == border
    wanted = count - mask.sum(1, keepdim=True)
    return mask | (equal & (equal.cumsum(1) <= wanted))
