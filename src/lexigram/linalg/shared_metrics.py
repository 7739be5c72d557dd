"""Several metrics over one input space, in the coordinates where they are as simple as they can be at once.

Members of a group share a dictionary ``D (k, in)`` of the original space; member ``l`` sees its atoms as ``D L_l^T``.
In coordinates that whiten the mean Gram, ``Z = D Lbar^T``, the metrics average to the identity: no member's factor is
ill-conditioned on its own, and the norm of a row is its root mean square over the members. Two such metrics sum to
twice the identity, so one rotation makes both of them diagonal (the generalised SVD of the two factors).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A direction that a member sees this much more weakly than the mean, squared, is not brought back from that member.
_INVISIBLE = 1e-12


@dataclass(frozen=True)
class SharedMetrics:
    """Common coordinates for a group of metrics; made by `shared_metrics`, good for every problem under these metrics.

    A dictionary enters by ``Z = D entry^T`` and leaves by ``D = Z exit^T``, signals enter by ``Y_l frame_l`` (an
    isometry). Member ``l`` then sees the atoms ``Z M_l^T``; ``grams`` are the ``M_l^T M_l``, whose mean is the identity.
    For one or two members ``maps`` and ``grams`` are diagonal and stored as vectors ``(in,)``, else as ``(in, in)``.
    """

    entry: Tensor
    exit: Tensor
    frames: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]
    grams: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def size(self) -> int:
        """Width of the input space."""
        return self.entry.shape[1]

    def to(self, dtype: torch.dtype) -> "SharedMetrics":
        """The same with maps and Grams, which the iterations use, in another precision."""
        maps, grams = (tuple(each.to(dtype) for each in some) for some in (self.maps, self.grams))
        return replace(self, maps=maps, grams=grams)

    def entered(self, signals: Sequence[Tensor]) -> list[Tensor]:
        """Every member's signals ``(n_l, in)`` in its frame; norms and errors stay what they are."""
        return [_product(rows, frame) for rows, frame in zip(signals, self.frames, strict=True)]

    def enter(self, dictionary: Tensor) -> Tensor:
        """A dictionary ``(k, in)`` of the original space in the common coordinates."""
        return _product(dictionary, self.entry.T)

    def leave(self, dictionary: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return _product(dictionary, self.exit.T)

    def seen(self, dictionary: Tensor) -> list[Tensor]:
        """The dictionary ``(k, in)``, in common coordinates, as every member sees it."""
        return [dictionary * each if each.ndim == 1 else dictionary @ each.T for each in self.maps]

    def correlated(self, member: int, rows: Tensor) -> Tensor:
        """The adjoint of `seen`: a member's rows ``(n, in)`` times its map."""
        return rows * self.maps[member] if self.maps[member].ndim == 1 else rows @ self.maps[member]

    def weighted(self, member: int, rows: Tensor) -> Tensor:
        """Rows ``(n, in)`` in common coordinates times a member's Gram."""
        return rows * self.grams[member] if self.grams[member].ndim == 1 else rows @ self.grams[member]

    def brought_back(self, member: int, rows: Tensor) -> Tensor:
        """The rows of common coordinates that a member sees as the given ones, by least squares in float64."""
        seen_by = self.maps[member].to(torch.float64)
        if seen_by.ndim == 1:
            return (rows * seen_by / (seen_by.square() + _INVISIBLE)).to(rows.dtype)
        # Not the stored Gram: rounded to float32 it has lost its weakest directions, which a squared map has not.
        gram = seen_by.T @ seen_by
        gram.diagonal().add_(_INVISIBLE)
        return torch.linalg.solve(gram, (rows.to(torch.float64) @ seen_by).T).T.to(rows.dtype)


def shared_metrics(factors: Sequence[Tensor]) -> SharedMetrics:
    """`SharedMetrics` of factors ``L_l (in, in)`` with ``L_l^T L_l = G_l``, as `whiten` gives them; in float64.

    Matrices under the same metric are one member with their rows stacked, not several.
    """
    size = _checked(factors)
    members = len(factors)
    # QR of the stacked factors: the factor of the mean Gram without squaring, and every L_l Lbar^-1 beside it.
    frame, triangle = torch.linalg.qr(torch.cat([factor.detach().to(torch.float64) for factor in factors]))
    smallest, largest = triangle.diagonal().abs().aminmax()
    if not smallest > size * torch.finfo(torch.float64).eps * largest:
        raise ValueError("the factors leave a direction of the inputs without weight; damp the Grams (whiten does)")
    entry = triangle / members**0.5
    identity = torch.eye(size, dtype=entry.dtype, device=entry.device)
    leaving = torch.linalg.solve_triangular(entry, identity, upper=True)
    maps = (frame * members**0.5).split(size)
    if members > 2:
        return SharedMetrics(entry, leaving, (identity,) * members, maps, tuple(each.T @ each for each in maps))
    rotation = identity if members == 1 else torch.linalg.eigh(maps[0].T @ maps[0]).eigenvectors
    frames, diagonals = zip(*(_diagonalised(each @ rotation) for each in maps), strict=True)
    return SharedMetrics(
        rotation.T @ entry, leaving @ rotation, frames, diagonals, tuple(each.square() for each in diagonals)
    )


def _diagonalised(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthogonal matrix and lengths, for orthogonal columns ``(in, in)`` some of which may vanish."""
    # The longest first: a short column is known only to the rounding error of the long ones.
    order = columns.norm(dim=0).argsort(descending=True, stable=True)
    frame, triangle = torch.linalg.qr(columns[:, order])
    back = order.argsort()
    lengths = triangle.diagonal()[back]
    return torch.where(lengths < 0, -frame[:, back], frame[:, back]), lengths.abs()


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    return (rows.to(matrix.dtype) @ matrix).to(rows.dtype)


def _checked(factors: Sequence[Tensor]) -> int:
    if not factors:
        raise ValueError("a group has at least one member; pass one factor for each")
    size = factors[0].shape[-1]
    for number, factor in enumerate(factors):
        if factor.shape != (size, size):
            raise ValueError(
                f"the factors of a group are square and of one size, but number {number} has the shape "
                f"{tuple(factor.shape)} beside {(size, size)}; group layers of equal input width"
            )
        if not torch.isfinite(factor).all():
            raise ValueError(f"factor {number} has entries that are not finite; take it from whiten")
    return size
