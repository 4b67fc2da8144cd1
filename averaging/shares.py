"""Which groupmate reduces which slice of the vector.

Pure. Equal shares, cut at block boundaries so that no quantization block straddles two slices; shares
by bandwidth and mode replace `equal_slices` behind the same result.
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slice:
    """Values [start, stop) of the flat vector."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def equal_slices(values: int, members: int, align: int) -> list[Slice]:
    """Cut `values` into one slice per member, each a multiple of `align` but the last non-empty one."""
    blocks = -(-values // align)
    edges = [min(values, blocks * i // members * align) for i in range(members + 1)]
    return [Slice(a, b) for a, b in pairwise(edges)]


def pieces(part: Slice, piece_values: int) -> list[Slice]:
    """Cut one slice into pieces that travel and are reduced one by one."""
    return [
        Slice(start, min(part.stop, start + piece_values))
        for start in range(part.start, part.stop, piece_values)
    ]
