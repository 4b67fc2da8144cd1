"""One peer: joins a stage, serves its hops, takes part in its steps, leaves.

    build the stage from the run's seed
    announce that it comes, so that trainers watch it already
    load the state of living peers of the stage, if there are any, and replay what closed meanwhile
    announce that it serves; from now on, side by side:
        serve hops, watch streams, state and averaging     (handlers on the network)
        close one step after the other                     (`Updater.run`)
        announce again, read the roster                    (`Membership.keep`)
    leave: refuse new hops, finish those under way, hand the gradients to a stage mate,
        withdraw the record, say goodbye to the trainers

I/O: everything on one event loop but torch, which the compute thread owns. The same class runs in virtual
time on the in-memory twins.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from averaging.bandwidth import UplinkMeter
from averaging.codecs import CODECS
from averaging.errors import AveragingError, BehindError
from averaging.network import Network, PeerId
from swarm import swarm_pb2 as pb
from swarm.compute import Compute, between_hops
from swarm.config import RunConfig
from swarm.directory import Directory
from swarm.donor import Donor
from swarm.donors import Loading, NoDonorError
from swarm.handover import Heir, hand_over
from swarm.holdings import StageHoldings
from swarm.jobs import is_out_of_memory
from swarm.last_state import LastState
from swarm.membership import Membership
from swarm.messages import Handover
from swarm.model import build_stage, stage_costs
from swarm.records import MAX_ADDRESSES, PeerRecord
from swarm.scope import at_stage
from swarm.server import HopServer
from swarm.speed import SpeedMeter
from swarm.stage import Accumulator, Stage
from swarm.state import StateLoader
from swarm.update import AppliedStep, Updater
from swarm.watch import lease_clock

REFETCH_PAUSE_S = 0.2
NEWER_S, FEW_STEPS = 60.0, 8  # wait so long for a newer state than one that is so far behind
SMOOTHING = 0.3  # of rates, per announcement
log = logging.getLogger(__name__)


class Peer:
    """Serves one stage of one run."""

    def __init__(
        self,
        *,
        network: Network,
        directory: Directory,
        compute: Compute,
        config: RunConfig,
        run: str,
        stage: int,
        device: str = "cpu",
        name: str = "",
        fixed: bool = False,
        archivist: PeerId | None = None,
        last_state: LastState | None = None,
        addresses: tuple[str, ...] = (),
        uplink: UplinkMeter | None = None,
        clock: Callable[[], float] = lease_clock,
        rng: random.Random | None = None,
        on_step: Callable[[AppliedStep], None] = lambda done: None,
        on_loading: Callable[[Loading], None] = lambda loading: None,
    ) -> None:
        """`fixed`: it stays in its stage, whatever happens; `archivist`: whose archive to believe;
        `last_state`: where it keeps its state for a restart."""
        self._everybody, self._network = network, at_stage(network, stage)
        self._compute, self.config = compute, config
        self._run, self._stage_number, self._device, self._name = run, stage, device, name
        self._clock, self._on_step, self._on_loading = clock, on_step, on_loading
        self._uplink, self._last_state = uplink or UplinkMeter(), last_state
        self._rng = rng or random.SystemRandom()
        addresses = addresses[:MAX_ADDRESSES]
        peer = network.peer_id
        record = PeerRecord(peer=peer, stage=stage, addresses=addresses, name=name, fixed=fixed)
        self.membership = Membership(
            directory,
            record,
            progress=self._progress,
            period_s=config.network.announce_s,
            archivist=archivist,
        )
        self._seen, self._tokens_per_s = (0.0, clock()), 0.0
        self._speed = SpeedMeter(stage_costs(config.model)[stage])
        self._busy_before_s = compute.busy_s
        self._stepping: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._join_s = 0.0  # from asking for the state to the first microbatch that counted here

    async def join(self) -> None:
        """Build the stage, load its state, and announce it: hops may come from now on."""
        self.membership.loading = True
        announcing = asyncio.create_task(self._announce())
        try:
            await self.prepare()
        finally:
            announcing.cancel()
        await self.serve()

    async def _announce(self) -> None:
        """That this peer comes."""
        await self.membership.enter()
        if hasattr(self, "_loader"):
            await self._loader.say_coming()
        await self.membership.keep()

    async def prepare(self, *, tries: int | None = None) -> None:
        """Build the stage and load its state; nobody notices yet.

        Raises NoDonorError after so many `tries`; without a number it goes on trying.
        """
        self.stage: Stage = await between_hops(self._compute, self._build)
        if self._last_state is not None:
            await self._last_state.restore(self.stage, self._compute)
            self.membership.kept = self.stage.version
        self.server = HopServer(
            network=self._everybody,
            stage=self.stage,
            compute=self._compute,
            config=self.config,
            clock=self._clock,
        )
        self._holdings = StageHoldings(self.stage, self._compute)
        self._donor = Donor(
            self._network,
            self._holdings,
            upload_share=self.config.network.upload_share,
            uplink=self._uplink,
            on_coming=self._say_coming,
        )
        self.updater = Updater(
            network=self._network,
            stage=self.stage,
            compute=self._compute,
            server=self.server,
            config=self.config,
            run=self._run,
            roster=self.membership.others.keys,
            refresh_roster=self.membership.read,
            refetch=self._refetch,
            auxiliaries=self.membership.auxiliaries,
            newcomers=self.membership.newcomers,
            witnesses=self.server.watchers,
            rng=self._rng,
            uplink=self._uplink,
            keep=self._keep,
            on_step=self._stepped,
        )
        self._loader = StateLoader(
            self._network,
            self.stage,
            self._compute,
            replay=self.updater.replay,
            warm_up=self._warm_up,
            on_loading=self._on_loading,
        )
        self._heir = Heir(
            self._network,
            self.stage,
            self._compute,
            self.server,
            self.config,
            mates=self.membership.others.keys,
        )
        self.server.on_progress = self._progressed
        await self.server.be_watched()
        self._asked_s = self._clock()
        while not await self._has_state():
            tries = None if tries is None else tries - 1
            if tries == 0:
                raise NoDonorError(f"no state of stage {self._stage_number} can be had")
            log.info("trying again to get a state of stage %d", self._stage_number)

    async def serve(self) -> None:
        """Answer others, and be found: hops may come from now on."""
        self._busy_before_s = self._compute.busy_s
        await self._loader.follow()
        while self._loader.outrun and not await self._has_state():
            log.info("trying again to come to where stage %d is", self._stage_number)
        self.server.announced_version = self.stage.version
        await self.updater.start()
        await self._heir.start()
        await self._donor.start()
        self._donor.available = True
        await self.server.start()
        self.membership.loading = False
        await self.membership.enter()
        await self._loader.say_coming()

    async def _has_state(self) -> bool:
        """Load a living peer's state, or else an archived one; without any, the seed's is everybody's.

        A peer that cannot be asked now may have one: starting anew beside it would split the stage.
        """
        try:
            await self.membership.read()
            own, archives = self.stage.version, self.membership.archives
            found = await self._loader.load(self._donors())
            if not (found or await self._loader.load(archives, at_least=own, outlasting=True)):
                return await self._may_begin()
        except AveragingError as error:
            log.warning("waiting for the state of stage %d: %s", self._stage_number, error)
            await asyncio.sleep(REFETCH_PAUSE_S)
            return False
        if self._loader.outrun:
            log.warning("stage %d takes steps faster than they come here: trying again", self._stage_number)
        return not self._loader.outrun

    async def _may_begin(self) -> bool:
        """Nobody has a state, or a newer one than this peer. Raises LinkError."""
        number = self._stage_number
        if self.stage.version:
            return await self._may_go_on()
        if self.membership.archives or not await self.membership.furthest(self.config.model.stages):
            log.info("nobody has a state of stage %d yet: starting from the seed", number)
        else:
            log.warning(
                "stage %d has lost its state, and no archive is there: waiting for the organizer "
                "(swarm run ... --resume)",
                number,
            )
            await asyncio.sleep(self.config.network.announce_s)
            return False
        return True

    async def _may_go_on(self) -> bool:
        """From its own disk, as nobody serves the stage: who has the newest state does, the others load it.

        If that is far behind the other stages, somebody may come who has more. Raises LinkError.
        """
        number, own, waited_s = self._stage_number, self.stage.version, self._clock() - self._asked_s
        announce_s = self.config.network.announce_s
        newer = max(self.membership.coming.values(), default=0)
        behind = await self.membership.furthest(self.config.model.stages) - own
        is_old = behind > FEW_STEPS and not self.membership.archives
        if waited_s < announce_s or ((newer > own or is_old) and waited_s < NEWER_S):
            await self.membership.enter()  # let others see what this one has
            await asyncio.sleep(announce_s)
            return False
        log.info("nobody else has a state of stage %d: going on at version %d", number, own)
        return True

    async def run(self) -> None:
        """Take part until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._stepping = tasks.create_task(self.updater.run())
            self._renewing = tasks.create_task(self.membership.keep())

    async def leave(self) -> None:
        """Finish, hand over what is accumulated, let all know; while `run` goes on, which takes no more steps
        then. Bounded by `leave_s` and a goodbye; once, however often it is called."""
        self._leaving = self._leaving or asyncio.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        if not hasattr(self, "server"):  # it never came to that
            return await self.membership.withdraw()
        self.server.draining = True
        self.updater.participant.leave_soon()
        leave_s = self.config.network.leave_s
        try:
            if self._stepping is not None and not self._stepping.done():
                async with asyncio.timeout(leave_s):
                    await self._finish(self._stepping, leave_s)
        except TimeoutError:
            log.warning("not all could be finished within %.0f s", leave_s)
        if self._renewing is not None:
            self._renewing.cancel()
        await self.membership.withdraw()
        await self.server.say_goodbye()
        self.close()

    async def _finish(self, stepping: "asyncio.Task[None]", leave_s: float) -> None:
        time_s = asyncio.get_running_loop().time
        end_s = time_s() + leave_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(leave_s / 4):
                await self.server.idle()
                await self._heir.stop()
        undecided = True  # is what was frozen in a step?
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(end_s - leave_s / 4 - time_s()):  # the rest is for handing over
                await self.updater.between_plans()
                undecided = False
        stepping.cancel()
        await asyncio.wait([stepping])
        held = await between_hops(self._compute, lambda: self.stage.part_with(frozen=not undecided))
        if held.microbatches and self.server.may_count(held):
            await self._hand_over(held)
        if self._last_state is not None:
            await self._last_state.save(self.stage, self._compute)

    async def _hand_over(self, held: Accumulator) -> None:
        routes = self.server.routes_of(held)
        codec = CODECS[self.config.averaging.codec]
        if codec.lossy:  # what is lost now is never made good: no coarser than this
            codec = CODECS["int8"]
        offered = Handover(held.step, held.tokens, codec, tuple(routes))
        vector = await between_hops(self._compute, lambda: self.stage.vector(held))
        mates = [mate for mate in self._donors() if self.membership.others[mate].heading is None]
        given = await hand_over(self._network, offered, vector, mates, stage=self._stage_number)
        if given is None:
            return log.info("nobody is there to take the gradients of %d microbatch(es) over", len(routes))
        mate, step = given
        log.info("handed the gradients of %d microbatch(es) over to %s", len(routes), mate[-8:])
        self.server.handed_over(routes, mate, step)

    def close(self) -> None:
        """Stop at once; the compute thread is its owner's."""
        if hasattr(self, "_loader"):
            self._loader.release()
            self._donor.close()
            self._heir.close()
            self._holdings.close()
            self.server.close()
            self.updater.close()

    def metrics(self) -> Mapping[str, Any]:
        """Cumulative counters and the present state, by metric name."""
        return {
            "stage": self._stage_number,
            "version": self.server.announced_version,
            "queue": self._compute.queued,
            "held": len(self.server.mailbox),
            "retained_bytes": self.server.mailbox.retained_bytes,
            "tokens_per_s": round(self._tokens_per_s, 1),
            "speed": self._speed.announced,
            "join_s": round(self._join_s, 2),
            "name": self._name,
            "hash": self.updater.state_hash.hex(),
            "uplink_bytes_per_s": round(self._uplink.reported),
            **self.counters,
        }

    @property
    def counters(self) -> Counter[str]:
        """What this peer has done so far."""
        return self.server.counters + self.updater.counters

    async def stays(self, mate: PeerId) -> bool:
        """Does a stage mate live, and mean to stay?"""
        return await self.updater.participant.stays(mate)

    def _warm_up(self) -> None:
        training, width = self.config.training, self.config.model.width
        shape = (training.microbatch_sequences, training.sequence_tokens)
        first = self.stage.is_first
        x = torch.zeros(shape, dtype=torch.int64) if first else torch.zeros(*shape, width)
        try:
            self.stage.warm_up(x)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("a microbatch does not fit beside the state")  # fewer wait here once it happens

    def _build(self) -> Stage:
        module = build_stage(self.config.model, self._stage_number, seed=self.config.training.seed)
        return Stage(
            module,
            self.config.training,
            stage=self._stage_number,
            stages=self.config.model.stages,
            device=self._device,
        )

    def _progress(self) -> tuple[int, float, int]:
        """The version, multiply-adds per second while this peer computes, and how many jobs wait."""
        tokens, now_s = float(self.server.counters["tokens"]), self._clock()
        (tokens_before, before_s), self._seen = self._seen, (tokens, now_s)
        rate = (tokens - tokens_before) / max(1e-6, now_s - before_s)
        self._tokens_per_s += SMOOTHING * (rate - self._tokens_per_s)
        self._speed.observe(tokens, self._compute.busy_s - self._busy_before_s)
        return self.stage.version, self._speed.announced, self._compute.queued

    async def _refetch(self, error: BehindError | None) -> bool:
        """The stage has gone on without this peer: replay its steps, or load what it has become."""
        drifted = error is not None and error.version is None
        try:
            if not drifted and await self._loader.follow():
                return self._caught_up()
            if not self._living():  # else not now: reading takes long while peers have stopped
                await self.membership.read()
            if await self._loader.load(self._living(), at_least=self.stage.version):
                return self._caught_up()
            await self.membership.read()
            log.info("nobody gives a state of stage %d for now", self._stage_number)
        except AveragingError as trouble:
            log.info("no state of stage %d for now: %s", self._stage_number, trouble)
        await asyncio.sleep(REFETCH_PAUSE_S)
        return False

    def _caught_up(self) -> bool:
        self._holdings.reached()
        self.membership.come_back()
        return True

    def _donors(self) -> Sequence[PeerId]:
        """Who may have a state, the newest first, the rest in no order: not all newcomers ask the same."""
        able = [record for record in self.membership.others.values() if record.serves]
        self._rng.shuffle(able)
        return [record.peer for record in sorted(able, key=lambda record: -record.version)]

    def _living(self) -> Sequence[PeerId]:
        """Donors, and who else has answered lately."""
        heard = (peer for peer in self.updater.participant.mates.voters() if peer != self._network.peer_id)
        return [*dict.fromkeys([*self._donors(), *heard])]

    def _progressed(self) -> None:
        if not self._join_s:
            self._join_s = self._clock() - self._asked_s
            log.info("first microbatch counted, %.2f s after asking for the state", self._join_s)
        self.updater.changed.set()

    def _say_coming(self) -> None:
        """A newcomer that this peer gives its state to stands on the roster, or will in a moment."""
        self.server.watchers.say_all(pb.WatchFrame(coming=True).SerializeToString())

    def _keep(self, step: int, mean: torch.Tensor, microbatches: Collection[bytes]) -> None:
        """The mean gradient [values] of a step that has closed, for newcomers."""
        if self._donor.is_held:
            self._holdings.keep(step, mean, microbatches)
        self._holdings.reached()

    def _stepped(self, done: AppliedStep) -> None:
        self._loader.release()  # whoever takes steps with the others has what it needs
        if self._last_state is not None:
            self._last_state.stepped(self.stage, self._compute)
        self._on_step(done)
