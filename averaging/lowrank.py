"""PowerSGD: matrices travel as products of a few columns and rows, in two passes over the grid.

    first pass     the mean of P = M Q, for every matrix M [rows, columns], with the Q of the last step
    second pass    the mean of Q = M' P, with P's columns made orthonormal; and what is too small to gain
    result         M is P Q' on average; what a member's own M lacks of that stays for its next step

Members may come to the first pass with different Q, as newcomers do: the mean only shows the directions that
count. What all must agree on follows, bit by bit, from delivered means: P is rounded so coarsely that no
processor's order of summing shows, and P Q' is summed column by column.

Torch, no I/O. Source: Vogels et al. 2019, arXiv:1905.13727; residuals by weight are ours, see
`averaging.feedback`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from averaging.feedback import LEAST
from averaging.plan import Pass

DEPENDENT = 1e-6  # a column of which no more is left depends on those before it


@dataclass(frozen=True, slots=True)
class _Matrix:
    start: int  # its first value in the vector
    rows: int
    columns: int

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """[rows, columns], in the vector's memory."""
        return vector[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


class LowRank:
    """What one member sends of its vectors, and what it keeps from step to step."""

    def __init__(self, shapes: Sequence[Sequence[int]], rank: int) -> None:
        """`shapes` are those of the tensors that lie in the vector, one after the other."""
        sizes = [math.prod(shape) for shape in shapes]
        starts = list(accumulate(sizes, initial=0))
        self._rank, self.values = rank, starts[-1]
        self._matrices: list[_Matrix] = []
        self._rest: list[slice] = []
        for shape, (start, stop) in zip(shapes, pairwise(starts), strict=True):
            rows = shape[0] if len(shape) > 1 else 1
            columns = (stop - start) // max(1, rows)
            if 2 * rank * (rows + columns) <= rows * columns:
                self._matrices.append(_Matrix(start, rows, columns))
            else:
                self._rest.append(slice(start, stop))
        generator = torch.Generator().manual_seed(0)  # all begin with the same
        drawn = [torch.randn(m.columns, rank, generator=generator) for m in self._matrices]
        self._q = [_orthonormal(each) for each in drawn]
        self._p: list[torch.Tensor] = []
        self._own_q: list[torch.Tensor] = []
        self._wanted, self._weight = torch.empty(0), 0.0
        self._left = torch.zeros(self.values)  # times the weight of what it is missing from
        self._first = [m.rows * rank for m in self._matrices]  # values of every P
        rest = [part.stop - part.start for part in self._rest]
        self._second = [*(m.columns * rank for m in self._matrices), *rest]  # of every Q, and as they are
        each = [self._first, self._second] if self._matrices else [self._second]
        self.passes = tuple(Pass(sum(sizes)) for sizes in each)

    def first(self, vector: torch.Tensor, weight: float) -> torch.Tensor:
        """What to average of `vector` ([values] float32) in the first pass, or in the only one."""
        known = weight >= LEAST
        self._wanted = torch.add(vector, self._left, alpha=1 / weight) if known else vector
        self._weight = weight if known else 0.0
        if not self._matrices:
            return self._wanted
        return torch.cat([(m.of(self._wanted) @ q).view(-1) for m, q in self._by_matrix(self._q)])

    def second(self, mean: torch.Tensor) -> torch.Tensor:
        """What to average in the second pass, from the mean of the first."""
        self._p = [_orthonormal(each.view(-1, self._rank)) for each in mean.split(self._first)]
        self._own_q = [m.of(self._wanted).T @ p for m, p in self._by_matrix(self._p)]
        rest = [self._wanted[part] for part in self._rest]
        return torch.cat([*(q.reshape(-1) for q in self._own_q), *rest])

    def result(self, mean: torch.Tensor, *, counted: bool) -> torch.Tensor:
        """The mean vector ([values] float32) from that of the last pass; `counted` if the own is in it."""
        if not self._matrices:
            return mean
        count, parts = len(self._matrices), mean.split(self._second)
        means_q = [each.view(-1, self._rank) for each in parts[:count]]
        if counted and self._weight:
            left = self._wanted
            for part in self._rest:
                left[part] = 0
            for (m, p), q in zip(self._by_matrix(self._p), self._own_q, strict=True):
                m.of(left).sub_(p @ q.T)
            if bool(torch.isfinite(left.mul_(self._weight).sum())):
                self._left = left
        self._wanted = torch.empty(0)
        vector = torch.zeros(self.values)
        for (m, p), q in zip(self._by_matrix(self._p), means_q, strict=True):
            for column in range(self._rank):  # not a matrix product: processors sum in different orders
                m.of(vector).add_(p[:, column, None] * q[:, column])
        for part, values in zip(self._rest, parts[count:], strict=True):
            vector[part] = values
        self._q = [_restarted(q) for q in means_q]
        return vector

    def follow(self, mean: torch.Tensor) -> None:
        """Learn the directions of a mean vector that was averaged whole."""
        for index, matrix in enumerate(self._matrices):
            whole = matrix.of(mean)
            self._q[index] = _restarted(whole.T @ _orthonormal(whole @ self._q[index]))

    def _by_matrix(self, factors: Sequence[torch.Tensor]) -> list[tuple[_Matrix, torch.Tensor]]:
        return list(zip(self._matrices, factors, strict=True))


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt in float64, rounded to float16: zeros for columns that depend on those before.

    Args:
        columns: [values, rank] float32.
    """
    found = columns.double()
    for index in range(found.shape[1]):
        column = found[:, index]
        before = column.norm()
        for other in found[:, :index].unbind(1):
            column -= (other @ column) * other
        after = column.norm()
        column *= 1 / after if after > DEPENDENT * before else 0.0
    return found.half().float()


def _restarted(q: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns to begin the next step with; new directions where there is nothing."""
    kept = _orthonormal(q)
    dead = kept.abs().amax(0) == 0
    if bool(dead.any()):
        fresh = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)) / math.sqrt(len(q))
        kept[:, dead] = fresh[:, dead]
    return kept
