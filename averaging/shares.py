"""Which groupmate reduces which slice of the vector, and how big the slices are.

A member uploads its own parts of the others' slices, and the means of its slice to the others; it downloads
as much. So member i of N, that reduces the share w_i, moves 1 + (N-2) w_i times the vector each way, a
client (w = 0) moves it once, and an auxiliary, which has no vector of its own, N w_i times. The slowest is
done after x = max of that over its bandwidth b_i. The smallest x at which the shares can add up to 1:

    member       w_i(x) = clip((x b_i - 1) / (N-2), 0, 1),   x >= 1 / b_i
    auxiliary    w_i(x) = clip(x b_i / N, 0, 1)

If the slowest member alone decides, the shares at that x add up to more than 1: they are scaled down.

Pure; deterministic, so that every member computes the same cut. Source: DeDLOC, arXiv:2106.10207, section
3.2 and appendix B.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise

SMALLEST_PIECE = 32  # in units of `align`: smaller messages would only cost more


class Mode(Enum):
    """What a groupmate can do for others."""

    MEMBER = "member"
    CLIENT = "client"  # cannot be dialled: sends and receives, reduces nothing
    AUXILIARY = "auxiliary"  # has no vector of its own: only reduces


@dataclass(frozen=True, slots=True)
class Slice:
    """Values [start, stop) of the flat vector."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def shares(bandwidths: Sequence[float], modes: Sequence[Mode] | None = None) -> list[float]:
    """The share of the vector that each groupmate reduces, adding up to 1.

    Args:
        bandwidths: of each, in any unit, the smaller of up and down.
        modes: what each can do; all members by default.

    Raises:
        ValueError: nobody may reduce, or a bandwidth is not positive.
    """
    modes = modes or [Mode.MEMBER] * len(bandwidths)
    senders = sum(mode is not Mode.AUXILIARY for mode in modes)
    if any(not 0 < b < math.inf for b in bandwidths):
        raise ValueError("a bandwidth is not positive")
    if all(mode is Mode.CLIENT for mode in modes):
        raise ValueError("nobody in the group can reduce")
    if senders == 1 and Mode.MEMBER in modes:  # it has the mean already
        return [float(mode is Mode.MEMBER) for mode in modes]

    def at(x: float) -> list[float]:
        return [_share(x * b, mode, senders) for b, mode in zip(bandwidths, modes, strict=True)]

    x = max([1 / b for b, mode in zip(bandwidths, modes, strict=True) if mode is not Mode.AUXILIARY] or [0.0])
    if sum(at(x)) < 1:
        x = _where_the_sum_is_one(at, _corners(bandwidths, modes, senders, x))
    found = at(x)
    return [share / sum(found) for share in found]


def _share(moved: float, mode: Mode, senders: int) -> float:
    """What one reduces that moves `moved` times the vector."""
    if mode is Mode.CLIENT:
        return 0.0
    if mode is Mode.AUXILIARY:
        return min(1.0, moved / max(1, senders))
    if senders <= 2:  # reducing costs a member nothing then: it moves the vector once, whatever its share
        return 1.0 if moved >= 1 - 1e-12 else 0.0
    return min(1.0, max(0.0, (moved - 1) / (senders - 2)))


def _corners(bandwidths: Sequence[float], modes: Sequence[Mode], senders: int, least: float) -> list[float]:
    """Every x from `least` at which some share begins or stops to grow, in order."""
    corners = {least}
    for b, mode in zip(bandwidths, modes, strict=True):
        if mode is not Mode.CLIENT:
            corners |= {1 / b, (senders if mode is Mode.AUXILIARY else senders - 1) / b}
    return sorted(x for x in corners if x >= least)


def _where_the_sum_is_one(at: Callable[[float], list[float]], corners: Sequence[float]) -> float:
    """The shares' sum grows linearly between corners, and is below 1 at the first, above it at the last."""
    for low, high in pairwise(corners):
        below, above = sum(at(low)), sum(at(high))
        if above >= 1:
            return low + (high - low) * (1 - below) / (above - below)
    raise AssertionError("at the last corner somebody reduces everything")


def cut(values: int, reducing: Sequence[float], align: int) -> list[Slice]:
    """Cut `values` into slices by shares, each a multiple of `align` but the last non-empty one."""
    blocks = -(-values // align)
    total = sum(reducing)
    edges = [min(values, round(blocks * edge / total) * align) for edge in accumulate(reducing, initial=0.0)]
    return [Slice(a, b) for a, b in pairwise(edges)]


def pieces(part: Slice, piece_values: int, align: int) -> list[Slice]:
    """Cut one slice into pieces that travel and are reduced one by one, at multiples of `align`.

    The last ones are smaller and smaller: when a reducer has the last part, only little is left to be sent.
    """
    found: list[Slice] = []
    start = part.start
    while start < part.stop:
        left = part.stop - start
        size = piece_values
        if left <= 2 * piece_values:
            size = min(piece_values, max(-(-left // (2 * align)) * align, SMALLEST_PIECE * align))
        found.append(Slice(start, min(part.stop, start + size)))
        start = found[-1].stop
    return found
