"""A peer of whichever stage needs it most: chooses one, and moves when another needs it more.

    choose      the weakest stage, unless the user has chosen
    look        at all rosters, every now and then; everybody decides by the same rule (`swarm.rebalance`)
    move        say so; load the state of the new stage while the old one is still served;
                while others still serve the old stage, serve the new one and leave it

I/O: the directory; one event loop.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from averaging.errors import AveragingError, LinkError
from averaging.network import PeerId
from swarm.assignment import choose_stage, look_s, rebalancing_of
from swarm.config import RunConfig
from swarm.directory import Directory, all_rosters, read_rosters
from swarm.jobs import is_out_of_memory
from swarm.model import stage_costs
from swarm.peer import Peer
from swarm.records import PeerRecord

TRIES = 3  # to get the state of another stage, before a move is given up
ASKED = 8  # stage mates, whether they live
log = logging.getLogger(__name__)


class Volunteer:
    """One peer after the other, of one process."""

    def __init__(
        self,
        *,
        me: PeerId,
        directory: Directory,
        config: RunConfig,
        make_peer: Callable[[int], Peer],
        stage: int | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`stage`: serve this one and no other; None: the one that needs it most."""
        self._me, self._directory, self._config, self._make_peer = me, directory, config, make_peer
        self._fixed, self._rng = stage, rng or random.SystemRandom()
        self._costs = stage_costs(config.model)
        self._said = ""
        self._preparing: asyncio.Task[tuple[Peer, int]] | None = None  # the next move
        self._next: Peer | None = None  # while it takes over
        self._leaves = False  # the run, not only a stage
        self._done = Counter[str]()  # by the peers before the present one
        self.moves = 0

    async def join(self) -> None:
        """Choose a stage, load its state and serve it. Raises UserError when no stage can be chosen."""
        stage = self._fixed
        if stage is None:
            stage, reason = choose_stage(await all_rosters(self._directory, len(self._costs)), self._costs)
            log.info("stage %d: %s", stage, reason)
        while stage is not None:
            self.stage, self.peer = stage, self._make_peer(stage)
            stage = await self._joined_or_redirected()

    async def _joined_or_redirected(self) -> int | None:
        """Join, unless another stage comes to need a newcomer more while the state loads: that stage."""
        joining = asyncio.create_task(self.peer.join())
        looking = asyncio.create_task(self._look())
        try:
            await asyncio.wait([joining, looking], return_when=asyncio.FIRST_COMPLETED)
            if joining.done() or not self.peer.membership.loading:
                await joining
                return None
            target = looking.result()
            log.info("stage %d needs this peer more than stage %d: going there", target, self.stage)
        finally:
            for task in (joining, looking):
                task.cancel()
        await asyncio.wait([joining])
        await self.peer.leave()
        return target

    async def run(self) -> None:
        """Serve, and move when that is needed, until cancelled."""
        while True:
            async with asyncio.TaskGroup() as tasks:
                serving = tasks.create_task(self.peer.run())
                self._preparing = tasks.create_task(self._successor())
                await asyncio.wait([self._preparing])
                if self._preparing.cancelled():
                    return  # once it has left
                self._next, stage = self._preparing.result()
                await self._next.serve()  # before it leaves: in between, others would think it gone
                await self.peer.leave()
                serving.cancel()
            log.info("moved from stage %d to stage %d", self.stage, stage)
            self._done += self.peer.counters
            self.peer, self.stage, self.moves, self._next = self._next, stage, self.moves + 1, None

    async def leave(self) -> None:
        """Leave the run, while `run` goes on; no-op before a stage was chosen."""
        self._leaves = True
        if self._preparing is not None:
            self._preparing.cancel()  # it would load, and replay, for nothing
        for peer in (self.peer, self._next) if hasattr(self, "peer") else ():
            if peer is not None:
                await peer.leave()

    def metrics(self) -> Mapping[str, Any]:
        """Of the present peer; counters go on when it moves."""
        return {**self.peer.metrics(), **(self._done + self.peer.counters), "moves": self.moves}

    async def _successor(self) -> tuple[Peer, int]:
        """The peer to be, and its stage, once it is needed and ready to serve."""
        while True:
            target = await self._look()
            try:
                if (successor := await self._prepared(target)) is not None:
                    return successor, target
            except AveragingError as error:
                log.info("staying in stage %d: %s", self.stage, error)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("staying in stage %d for good: no memory for a second stage", self.stage)
                self.peer.membership.fixed = True  # or the others would wait for this one to move

    async def _look(self) -> int:
        """Wait until another stage needs this peer more: that stage."""
        serves_for_good = self._config.rebalancing.rule == "none" and not self.peer.membership.loading
        if self._fixed is not None or serves_for_good:
            await asyncio.get_running_loop().create_future()  # for ever
        while True:
            wait_s = look_s(self._config.rebalancing, loading=self.peer.membership.loading)
            await asyncio.sleep(wait_s * self._rng.uniform(0.75, 1.25))
            try:
                target = self._target(await read_rosters(self._directory, len(self._costs)))
                if target is not None:
                    return target
            except LinkError as error:
                log.info("cannot look at all stages: %s", error)

    def _target(self, rosters: Sequence[Sequence[PeerRecord]]) -> int | None:
        """The stage to move to, if this peer is one of those that should."""
        found = rebalancing_of(rosters, self._costs, self._config.rebalancing)
        if found.reason != self._said:
            self._said = found.reason
            log.debug("rebalancing: %s", found.reason)
        return next((move.target for move in found.moves if move.peer == self._me), None)

    async def _prepared(self, target: int) -> Peer | None:
        """A peer of the stage `target` that has its state, with nothing in the way of leaving; else None."""
        log.info("stage %d needs this peer more than stage %d: loading its state", target, self.stage)
        self.peer.membership.heading = target
        successor: Peer | None = None
        try:
            await self.peer.membership.enter()
            successor = self._make_peer(target)
            await successor.prepare(tries=TRIES)
            if await self._others_stay() and not self._leaves:
                found, successor = successor, None
                return found
            log.info("staying in stage %d: nobody else serves it any more", self.stage)
            return None
        finally:
            if successor is not None:
                successor.close()
                self.peer.membership.heading = None

    async def _others_stay(self) -> bool:
        """Does anybody else serve the present stage, live, and mean to go on? Raises LinkError."""
        staying = [other for other in await self._serving(self.stage) if other.heading is None]
        return any(await asyncio.gather(*(self.peer.stays(other.peer) for other in staying[:ASKED])))

    async def _serving(self, stage: int) -> list[PeerRecord]:
        """The others that serve a stage, by the roster. Raises LinkError."""
        others = await self._directory.roster(stage)
        return [other for other in others if other.peer != self._me and other.serves]
