"""Seats on a d-dimensional grid, and the groups that its lines form.

    sides   as equal as possible, as few as keep a group near `group_size`; their product is at most N
    seats   members ordered by a hash with the plan's key, so they differ every step; member i sits in cell
            i, and those beyond the last cell double up, spread over the grid
    round r the members of each line along dimension r average

Who sits in one cell has been in the same groups ever since, so from the second round on they hold the same
mean, and one of them speaks for all. With that the mean is exact after d rounds for any N, not only on a
full grid. Lines name their members in the order of cells: sums over equal values in equal order have equal
bits, so all members of the grid end bit-identical if the codec has no memory.

Pure. Source: Moshpit SGD, arXiv:2103.03239, section 3.1; doubled cells in place of holes are ours.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from averaging.network import PeerId

SOFT_EXCESS = 1  # members that a group may have beyond `group_size` before another dimension pays


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one line, in the order of its cells, and those whose values go into the mean."""

    line: int  # its number among all lines of the grid
    dimension: int
    members: tuple[PeerId, ...]
    speakers: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Who sits where."""

    sides: tuple[int, ...]
    cells: tuple[tuple[PeerId, ...], ...]  # who sits in each, the last dimension counting fastest
    seats: dict[PeerId, int]  # the cell of each

    @property
    def dimensions(self) -> int:
        return len(self.sides)

    def group_of(self, peer: PeerId, dimension: int) -> Group:
        """The line of `peer` along `dimension`."""
        return self._line(self.seats[peer], dimension)

    def groups(self, dimension: int) -> tuple[Group, ...]:
        """All lines along `dimension`; every member is in exactly one."""
        stride, side = self._stride(dimension), self.sides[dimension]
        firsts = (cell for cell in range(len(self.cells)) if cell // stride % side == 0)
        return tuple(self._line(cell, dimension) for cell in firsts)

    def _stride(self, dimension: int) -> int:
        return math.prod(self.sides[dimension + 1 :])

    def _line(self, cell: int, dimension: int) -> Group:
        stride, side = self._stride(dimension), self.sides[dimension]
        first = cell - cell // stride % side * stride
        line = [self.cells[first + i * stride] for i in range(side)]
        members = tuple(peer for inside in line for peer in inside)
        if dimension == 0:  # nothing has been averaged yet: everybody brings a value of its own
            return Group(first, dimension, members, members)
        number = dimension * len(self.cells) + first
        return Group(number, dimension, members, tuple(inside[0] for inside in line))


def grid_sides(members: int, group_size: int) -> tuple[int, ...]:
    """Lengths of the fewest dimensions whose lines have about `group_size` members or fewer."""
    dimensions = 1
    while True:
        sides = [max(1, int(members ** (1 / dimensions) + 1e-9))] * dimensions
        growing = 0
        while growing < dimensions and math.prod(sides) // sides[growing] * (sides[growing] + 1) <= members:
            sides[growing] += 1
            growing += 1
        largest = max(math.ceil(members * side / math.prod(sides)) for side in sides)
        if largest <= group_size + SOFT_EXCESS or max(sides) <= 2:
            return tuple(sides)
        dimensions += 1


def seat(peers: Sequence[PeerId], *, group_size: int, key: bytes, helpers: Sequence[PeerId] = ()) -> Grid:
    """Seat `peers`, in any order, on a grid of groups of about `group_size`; `key` decides who sits where.

    `helpers` have no value of their own: they sit beside others, and never speak for a cell.
    """
    sides = grid_sides(len(peers), group_size)
    numbers = range(math.prod(sides))

    def by_hash(peer: PeerId) -> bytes:
        return hashlib.sha256(key + peer.encode()).digest()

    ordered = sorted(peers, key=by_hash)
    spread = sorted(numbers, key=lambda cell: _diagonal(cell, sides))
    cells = [[peer] for peer in ordered[: len(numbers)]]
    extra = [*ordered[len(numbers) :], *sorted(helpers, key=by_hash)]
    for peer, cell in zip(extra, cycle(spread), strict=False):
        cells[cell].append(peer)
    seats = {peer: number for number, inside in enumerate(cells) for peer in inside}
    return Grid(sides, tuple(tuple(inside) for inside in cells), seats)


def _diagonal(cell: int, sides: Sequence[int]) -> int:
    """Cells with the same number share no line: along one, the sum changes by less than the longest side."""
    total = 0
    for side in reversed(sides):
        cell, coordinate = divmod(cell, side)
        total += coordinate
    return total % max(sides)
