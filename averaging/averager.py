"""Average a vector with a known set of peers, again and again: the package's front door.

    averager = Averager(network, peers=lambda: ids, target=4.0)
    await averager.start()
    mean = await averager.average(vector, weight=1.0)    # with whoever is there, until `target` is reached

I/O: one event loop.
"""

import asyncio
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from averaging.allreduce import ButterflyAllReduce
from averaging.bandwidth import BYTES_PER_MEGABIT, UplinkMeter
from averaging.codecs import CODECS
from averaging.errors import BehindError
from averaging.lowrank import LowRank
from averaging.moshpit import Contribution
from averaging.network import Network, PeerId
from averaging.participant import Mean, Participant
from averaging.plan import Pass, StepRules
from averaging.shares import Mode

NO_STATE = bytes(8)


class Averager:
    """One member; every `average` closes one step with the others."""

    def __init__(
        self,
        network: Network,
        *,
        peers: Callable[[], Collection[PeerId]],
        target: float,
        codec: str = "int8",
        group_size: int = 16,
        name: str = "averager",
        bandwidth: float = 0.0,
        mode: Mode = Mode.MEMBER,
        rank: int = 0,
        shapes: Sequence[Sequence[int]] = (),
        auxiliaries: Callable[[], Collection[PeerId]] = tuple,
        rng: random.Random | None = None,
    ) -> None:
        """`peers` are the others that may take part; a step closes when the weights add up to `target`.

        Args:
            bandwidth: of the uplink, in Mbit/s, until it has been measured; 0 if unknown.
            mode: a client cannot be dialled; an auxiliary only reduces, for others.
            rank: if not 0, matrices travel as so many columns and rows (`averaging.lowrank`).
            shapes: of the tensors that lie in the vector, one after the other; `rank` needs them.
            auxiliaries: those of the others that only reduce; a step never waits for them.

        Raises ValueError for a mistake in the arguments.
        """
        if codec not in CODECS:
            raise ValueError(f"unknown codec {codec!r}: one of {', '.join(CODECS)}")
        if group_size < 2 or target <= 0:
            raise ValueError(f"group_size {group_size} is below 2, or target {target} not above 0")
        if not 0 <= bandwidth < math.inf:
            raise ValueError(f"bandwidth {bandwidth} Mbit/s is negative or not finite")
        if rank < 0 or (rank and (not shapes or CODECS[codec].lossy)):
            raise ValueError(f"rank {rank} needs shapes, and codec float16, bfloat16 or float32, not {codec}")
        self.step = 0
        self._low_rank = LowRank(shapes, rank) if rank else None
        self._rules = rules = StepRules(target=target, max_weight=target, group_size=group_size, codec=codec)
        uplink = UplinkMeter(bandwidth * BYTES_PER_MEGABIT)
        self._participant = Participant(
            network=network,
            all_reduce=ButterflyAllReduce(network, rules=rules, uplink=uplink),
            rules=rules,
            name=name,
            roster=peers,
            refresh_roster=_nothing_to_read,
            version=lambda: self.step,
            rng=rng or random.SystemRandom(),
            mode=mode,
            auxiliaries=auxiliaries,
        )

    async def start(self) -> None:
        """Answer the other members from now on."""
        await self._participant.start()

    async def average(self, vector: torch.Tensor, *, weight: float = 1.0) -> Mean:
        """The mean of [values] float32 vectors by weight, bit-identical on all members. Not for auxiliaries.

        Raises BehindError if the others have closed this step without this member: the next call takes part
        in theirs, for a model that is as far as theirs. Raises ValueError for a weight that is negative or
        above the target.
        """
        if not 0 <= weight <= self._rules.target:
            raise ValueError(f"weight {weight} is not between 0 and the target {self._rules.target}")
        if (low_rank := self._low_rank) is None:
            return await self._close_step(_Given(vector, weight))
        if low_rank.values != vector.numel():
            raise ValueError(f"{vector.numel()} values, but the shapes have {low_rank.values}")
        mean = await self._close_step(_Factored(vector, weight, low_rank))
        counted = self._participant.is_in(mean)
        return replace(mean, vector=low_rank.result(mean.vector, counted=counted))

    async def assist(self) -> None:
        """Reduce for the others in one step, as an auxiliary. Raises BehindError."""
        await self._close_step(_Given(torch.empty(0), 0.0))

    async def _close_step(self, given: "_Given") -> Mean:
        try:
            mean = await self._participant.close_step(given)
        except BehindError as error:
            if error.version is not None:
                self.step = error.version
            raise
        self.step += 1
        self._participant.coordinator.step_closed(self.step)
        return mean

    def close(self) -> None:
        """Take no part any more."""
        self._participant.close()


class _Given:
    """A contribution that does not change."""

    state_hash = NO_STATE

    def __init__(self, vector: torch.Tensor, weight: float) -> None:
        self.weight, self._vector, self.changed = weight, vector, asyncio.Event()
        self.passes: tuple[Pass, ...] = (Pass(vector.numel()),) if vector.numel() else ()

    async def prepare(self) -> None:
        pass

    async def freeze(self) -> Contribution:
        return Contribution(self._vector, self.weight)

    def abandoned(self, *, duplicate: bool) -> None:
        pass


class _Factored(_Given):
    """A contribution of matrices that travel as products."""

    def __init__(self, vector: torch.Tensor, weight: float, low_rank: LowRank) -> None:
        super().__init__(vector, weight)
        self.passes, self._low_rank = low_rank.passes, low_rank

    async def freeze(self) -> Contribution:
        return Contribution(self._low_rank.first(self._vector, self.weight), self.weight, then=self._second)

    async def _second(self, mean: torch.Tensor) -> torch.Tensor:
        return self._low_rank.second(mean)


async def _nothing_to_read() -> None:
    pass
