"""One peer: joins a stage, serves its hops, takes part in its steps, leaves.

    build the stage from the run's seed
    load the state of a living peer of the stage, if there is one
    announce; from now on, side by side:
        serve hops, watch streams, state and averaging     (handlers on the network)
        close one step after the other                     (`Updater.run`)
        announce again, read the roster                    (`Membership.keep`)
    leave: withdraw the record, refuse new hops, say goodbye to the trainers

I/O: everything on one event loop but torch, which the compute thread owns. The same class runs in virtual
time on the in-memory twins.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from averaging.bandwidth import UplinkMeter
from averaging.errors import LinkError
from averaging.network import Network
from swarm.compute import Compute, Priority
from swarm.config import RunConfig
from swarm.directory import Directory
from swarm.membership import Membership
from swarm.model import build_stage
from swarm.records import MAX_ADDRESSES, PeerRecord
from swarm.server import HopServer
from swarm.stage import Stage
from swarm.state import StateServer, fetch_state
from swarm.update import AppliedStep, Updater

REFETCH_PAUSE_S = 0.2
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
        addresses: tuple[str, ...] = (),
        uplink: UplinkMeter | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        on_step: Callable[[AppliedStep], None] = lambda done: None,
    ) -> None:
        self._network, self._compute, self.config = network, compute, config
        self._run, self._stage_number, self._device, self._name = run, stage, device, name
        self._clock, self._on_step = clock, on_step
        self._uplink = uplink or UplinkMeter()
        self._rng = rng or random.SystemRandom()
        addresses = addresses[:MAX_ADDRESSES]
        record = PeerRecord(peer=network.peer_id, stage=stage, addresses=addresses, name=name)
        self.membership = Membership(
            directory, record, progress=self._progress, period_s=config.network.announce_s
        )
        self._tokens_seen, self._tokens_at_s = 0.0, clock()
        self._tokens_per_s = 0.0

    async def join(self) -> None:
        """Build the stage, load its state, and announce it: hops may come from now on."""
        self.stage: Stage = await asyncio.wrap_future(self._compute.submit(Priority.STEP, self._build))
        self.server = HopServer(
            network=self._network,
            stage=self.stage,
            compute=self._compute,
            config=self.config,
            clock=self._clock,
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
            rng=self._rng,
            uplink=self._uplink,
            on_step=self._on_step,
        )
        self._state = StateServer(self._network, self.stage, self._compute)
        await self._state.start()
        while not await self._has_state():
            log.info("trying again to get a state of stage %d", self._stage_number)
        self.server.announced_version = self.stage.version
        await self.server.start()
        await self.updater.start()
        self._state.available = True
        await self.membership.enter()

    async def _has_state(self) -> bool:
        """Load a living peer's state; where nobody has any, the seed's is everybody's.

        A peer that cannot be asked now may have one: starting anew beside it would split the stage.
        """
        try:
            await self.membership.read()
            if not await self._fetch():
                log.info("nobody has a state of stage %d yet: starting from the seed", self._stage_number)
        except LinkError as error:
            log.warning("waiting for the state of stage %d: %s", self._stage_number, error)
            await asyncio.sleep(REFETCH_PAUSE_S)
            return False
        return True

    async def run(self) -> None:
        """Take part until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.updater.run())
            tasks.create_task(self.membership.keep())

    async def leave(self) -> None:
        """Withdraw, refuse new hops, let trainers and stage mates know."""
        self.server.draining = True
        await self.membership.withdraw()
        await self.server.say_goodbye()
        self.close()

    def close(self) -> None:
        """Stop at once."""
        self.server.close()
        self.updater.close()
        self._compute.close()

    def metrics(self) -> Mapping[str, Any]:
        """Cumulative counters and the present state, by metric name."""
        counters = self.server.counters + self.updater.counters
        return {
            "stage": self._stage_number,
            "version": self.server.announced_version,
            "queue": self._compute.queued,
            "held": len(self.server.mailbox),
            "retained_bytes": self.server.mailbox.retained_bytes,
            "tokens_per_s": round(self._tokens_per_s, 1),
            "name": self._name,
            "hash": self.updater.state_hash.hex(),
            "uplink_bytes_per_s": round(self._uplink.reported),
            **counters,
        }

    def _build(self) -> Stage:
        module = build_stage(self.config.model, self._stage_number, seed=self.config.training.seed)
        return Stage(
            module,
            self.config.training,
            stage=self._stage_number,
            stages=self.config.model.stages,
            device=self._device,
        )

    def _progress(self) -> tuple[int, float]:
        """The version, and tokens per second since the last call, smoothed."""
        now_s, tokens = self._clock(), float(self.server.counters["tokens"])
        rate = (tokens - self._tokens_seen) / max(1e-6, now_s - self._tokens_at_s)
        self._tokens_per_s += 0.3 * (rate - self._tokens_per_s)
        self._tokens_seen, self._tokens_at_s = tokens, now_s
        return self.stage.version, self._tokens_per_s

    async def _refetch(self) -> bool:
        """The stage has gone on without this peer: load what it has become."""
        try:
            await self.membership.read()
            if await self._fetch():
                return True
        except LinkError as error:
            log.info("no state of stage %d for now: %s", self._stage_number, error)
        await asyncio.sleep(REFETCH_PAUSE_S)
        return False

    async def _fetch(self) -> bool:
        """Load the newest state that somebody gives. Raises LinkError if one cannot be asked."""
        able = [record for record in self.membership.others.values() if not record.aggregates_only]
        donors = sorted(able, key=lambda record: -record.version)
        return await fetch_state(
            self._network,
            self.stage,
            self._compute,
            [record.peer for record in donors],
            at_least=self.stage.version,
        )
