"""A peer's steps: accumulate -> average -> optimizer step, over and over.

    what is accumulated is this peer's contribution to the step that closes (`averaging.participant`)
    on the plan it is frozen; gradients go on into a new sum behind it
    on the mean: one optimizer step; trainers are told which microbatches are in it
    after an abandoned plan the frozen sum stays, and what was lost with a member is computed again
    if the stage has gone on without this peer: replay its steps, or load a donor's state

With delayed updates hops go on all the while; otherwise they wait from the freeze to the step, unless that
takes much longer than the step before: then somebody has probably stopped, and this step is a delayed one.

I/O: one event loop; torch in `Compute`. Design section 6.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass

import torch

from averaging.allreduce import ButterflyAllReduce
from averaging.bandwidth import UplinkMeter
from averaging.errors import BehindError, RoundAbandonedError
from averaging.lowrank import LowRank
from averaging.moshpit import Contribution
from averaging.network import Network, PeerId
from averaging.participant import Mean, Participant
from averaging.plan import Pass, StepRules
from averaging.witnesses import NO_WITNESSES, Witnesses
from swarm import swarm_pb2 as pb
from swarm.compute import Compute, between_hops
from swarm.config import RunConfig
from swarm.history import REMEMBERED_STEPS
from swarm.server import HopServer
from swarm.stage import Accumulator, Stage

WHOLE_WARMUPS = 4  # gradients travel whole for so many times the learning rate's warm-up
CATCH_UPS = 3  # before a peer is said to serve
PATIENCE = 2.0  # times the averaging of the step before
MOST_TARGETS = 4.0  # nobody's gradient weighs more than this many steps, whatever it claims
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AppliedStep:
    """One applied step."""

    version: int
    members: tuple[PeerId, ...]
    tokens: float
    averaging_s: float
    sent_bytes: int
    state_hash: bytes
    hash_before: bytes


def step_rules(config: RunConfig) -> StepRules:
    """What all peers of a run agree on."""
    target = float(config.training.target_batch_tokens)
    return StepRules(
        target=target,
        max_weight=MOST_TARGETS * target,
        group_size=config.averaging.group_size,
        progress_s=config.averaging.progress_deadline_s,
        round_s=config.averaging.round_deadline_s,
        grace_s=config.averaging.grace_s,
        expire_s=config.network.expire_s,
        strict=config.training.strict,
        codec=config.averaging.codec,
        mean_codec=config.averaging.mean_codec or "",
    )


class Updater:
    """Takes part in every step of this peer's stage; satisfies `averaging.participant.Contributor`."""

    def __init__(
        self,
        *,
        network: Network,
        stage: Stage,
        compute: Compute,
        server: HopServer,
        config: RunConfig,
        run: str,
        roster: Callable[[], Collection[PeerId]],
        refresh_roster: Callable[[], Awaitable[None]],
        refetch: Callable[[BehindError | None], Awaitable[bool]],
        auxiliaries: Callable[[], Collection[PeerId]] = tuple,
        newcomers: Callable[[], Collection[PeerId]] = tuple,
        witnesses: Witnesses = NO_WITNESSES,
        rng: random.Random,
        uplink: UplinkMeter | None = None,
        keep: Callable[[int, torch.Tensor, Collection[bytes]], None] = lambda step, mean, ids: None,
        on_step: Callable[[AppliedStep], None] = lambda done: None,
    ) -> None:
        """`roster` are the live peers of the stage without this one, as of the last `refresh_roster`;
        `auxiliaries` those of them that only reduce, `newcomers` those not all may know; `witnesses` see
        which mates have stopped, and how far they are; `refetch` brings the stage to where the others are, if
        somebody can help; `keep` is shown the mean gradient [values] of every step, for newcomers."""
        self._stage, self._compute, self._server = stage, compute, server
        self._config, self._refetch, self._keep, self._on_step = config, refetch, keep, on_step
        self._frozen_ids: tuple[bytes, ...] = ()  # microbatches in what was frozen last
        self._contributed: dict[int, tuple[bytes, ...]] = {}  # step -> microbatches this peer put into it
        self._rules = rules = step_rules(config)
        rank, rank_from = config.averaging.rank, config.averaging.rank_from
        self._low_rank = LowRank(stage.shapes, rank) if rank else None
        whole_steps = WHOLE_WARMUPS * config.training.optimizer.warmup_steps
        self._rank_from = whole_steps if rank_from is None else rank_from
        self.state_hash = b""
        self.changed = asyncio.Event()
        self._free = asyncio.Event()  # no plan holds what is accumulated here
        self._free.set()
        self._averaging_s = 0.0  # that the last step took
        self._holding: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter()
        self.participant = Participant(
            network=network,
            all_reduce=ButterflyAllReduce(network, rules=rules, uplink=uplink),
            rules=rules,
            name=f"{run}/{stage.stage}",
            roster=roster,
            refresh_roster=refresh_roster,
            version=lambda: stage.version,
            rng=rng,
            auxiliaries=auxiliaries,
            newcomers=newcomers,
            witnesses=witnesses,
        )
        server.on_progress = self.changed.set

    async def start(self) -> None:
        """Answer reports, queries and rounds of averaging from now on."""
        await self.participant.start()

    def close(self) -> None:
        self.participant.close()

    async def run(self) -> None:
        """Close one step after the other, for ever."""
        self.state_hash = await between_hops(self._compute, self._stage.hash)
        for _ in range(CATCH_UPS):  # what closed while the state came, closed without this peer
            if not await self.participant.is_behind():
                break
            await self._catch_up(None)
        log.info("serving stage %d at version %d", self._stage.stage, self._stage.version)
        while True:
            try:
                await self._apply(await self.participant.close_step(self))
            except BehindError as error:
                log.info("step %d: %s", self._stage.version, error)
                self._free.clear()  # what was frozen may be in the step that the others have taken
                await self._catch_up(error)
                self._free.set()

    async def between_plans(self) -> None:
        """Wait until no plan holds what is accumulated here; it is so until the event loop goes on."""
        while not self._free.is_set():
            await self._free.wait()

    # one step

    @property
    def weight(self) -> float:
        """Tokens this peer has for the step that closes."""
        return min(self._rules.max_weight, float(sum(held.tokens for held in self._stage.sums)))

    @property
    def passes(self) -> tuple[Pass, ...]:
        return (self._stage.gradient,) if self._factors is None else self._factors.passes

    @property
    def _factors(self) -> LowRank | None:
        """What gradients of this step travel as. Whole at first: what is late then costs most."""
        return self._low_rank if self._stage.version >= self._rank_from else None

    async def prepare(self) -> None:
        """Throw away sums with gradients that other peers have been given, or that are in a step already.

        A sum cannot be taken apart, so all of it goes, and the trainers that are still here are told.
        """
        for held in [s for s in self._stage.sums if not self._server.may_count(s)]:
            await self._give_up(held)

    async def freeze(self) -> Contribution:
        self._free.clear()
        if not self._config.training.delayed_updates:
            self._hold_hops()
        frozen = await between_hops(self._compute, self._stage.freeze)
        self._frozen_ids = tuple(frozen.microbatches)
        if not self._server.may_count(frozen):
            raise RoundAbandonedError("gradients in it are with other peers or in a step")
        vector, weight = (
            await between_hops(self._compute, lambda: self._stage.mean(frozen)),
            float(frozen.tokens),
        )
        if (factors := self._factors) is None:
            return Contribution(vector, weight, self._frozen_ids)

        async def second(mean: torch.Tensor) -> torch.Tensor:
            return await between_hops(self._compute, lambda: factors.second(mean))

        sketches = await between_hops(self._compute, lambda: factors.first(vector, weight))
        return Contribution(sketches, weight, self._frozen_ids, then=second)

    def _hold_hops(self) -> None:
        self._compute.hold(True)
        if not self._config.training.strict:  # there all would wait for the step anyway
            patience_s = max(self._rules.overdue_s, PATIENCE * self._averaging_s)
            self._holding = asyncio.get_running_loop().call_later(patience_s, self._release_hops)

    def _release_hops(self) -> None:
        if self._holding is not None:
            self._holding.cancel()
        self._compute.hold(False)

    def abandoned(self, *, duplicate: bool) -> None:
        self._free.set()
        self._release_hops()
        self.counters["abandoned_plans"] += 1
        if duplicate:
            self._server.orphans.update(self._frozen_ids)

    async def _apply(self, mean: Mean) -> None:
        step, hash_before = mean.plan.step, self.state_hash
        self._averaging_s = mean.averaging_s
        counted = self.participant.is_in(mean)
        self._contributed[step] = self._frozen_ids if counted else ()
        self._contributed.pop(step - REMEMBERED_STEPS, None)

        def apply_and_hash() -> tuple[bytes, torch.Tensor]:
            factors, vector = self._factors, mean.vector
            if factors is not None:
                vector = factors.result(vector, counted=counted)
            elif self._low_rank is not None:
                self._low_rank.follow(vector)
            self._stage.apply(vector, mean.ids)
            return self._stage.hash(), vector

        try:
            self.state_hash, vector = await between_hops(self._compute, apply_and_hash)
        finally:
            self._release_hops()
            self._free.set()
        self._keep(step, vector, mean.ids)
        self.counters["averaging_bytes"] += mean.sent_bytes
        self.participant.coordinator.step_closed(self._stage.version)
        if not counted:
            self._server.lost_gradients(self._frozen_ids)
        self._say_steps([pb.Stepped(version=self._stage.version, microbatches=mean.ids)])
        self._server.announced_version = self._stage.version
        self._server.forget_released(mean.ids)
        self._server.resume_held()
        log.debug("applied step %d with %d members, state %s", step, len(mean.members), self.state_hash.hex())
        self._on_step(
            AppliedStep(
                version=self._stage.version,
                members=mean.members,
                tokens=sum(mean.plan.by_peer[member].weight for member in mean.members),
                averaging_s=mean.averaging_s,
                sent_bytes=mean.sent_bytes,
                state_hash=self.state_hash,
                hash_before=hash_before,
            )
        )

    def replay(self, mean: torch.Tensor, microbatches: Collection[bytes]) -> None:
        """Take a step that the others have taken, with its mean gradient [values]; for the compute thread."""
        if self._low_rank is not None:
            self._low_rank.follow(mean)
        self._stage.replay(mean, microbatches)

    async def _catch_up(self, error: BehindError | None) -> None:
        """Come to where the others are; gradients for earlier versions stay, unless too old or in it."""
        before = self._stage.version
        if not await self._refetch(error):
            return
        stale = self._stage.version - before > self._config.training.max_staleness
        for held in self._stage.sums:
            if stale or not self._server.may_count(held):
                self.counters["too_stale"] += stale * len(held.microbatches)
                await self._give_up(held)
        await between_hops(self._compute, self._stage.thaw)
        self._server.moved_to_step(self._stage.accumulator)
        self._server.forget_released(self._stage.history)
        self.state_hash = await between_hops(self._compute, self._stage.hash)
        self.participant.coordinator.step_closed(self._stage.version)
        self._server.announced_version = self._stage.version
        self._say_steps(self._server.told_history())
        self._server.lost_gradients(self._overwritten())  # until it heard that, a trainer thought them held
        self._server.resume_held()

    def _overwritten(self) -> list[bytes]:
        """Microbatches that this peer has put into steps which the state it loaded never took."""
        history = self._stage.history
        oldest = min(history.steps, default=0)
        recent = [m for step, inside in self._contributed.items() if step >= oldest for m in inside]
        self._contributed.clear()
        return [microbatch for microbatch in recent if microbatch not in history]

    def _say_steps(self, told: Iterable[pb.Stepped]) -> None:
        for stepped in told:
            self._server.watchers.say_all(pb.WatchFrame(stepped=stepped).SerializeToString())

    async def _give_up(self, held: Accumulator) -> None:
        self.counters["orphaned"] += len(held.microbatches)
        await between_hops(self._compute, lambda: self._stage.discard(held))
        self._server.lost_gradients(held.microbatches)
        self._server.orphans.difference_update(held.microbatches)
