"""A peer without weights or device that only reduces for one stage: `swarm-peer --aggregate-only`.

It sits in the stage's plans as an auxiliary, which lets machines with good links and no accelerator carry
most of what averaging moves.

I/O: everything on one event loop. Source: DeDLOC, arXiv:2106.10207, section 3.2.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from averaging.allreduce import ButterflyAllReduce
from averaging.bandwidth import UplinkMeter
from averaging.errors import BehindError
from averaging.moshpit import Contribution
from averaging.network import Network
from averaging.participant import Participant
from averaging.plan import Pass
from averaging.shares import Mode
from swarm.config import RunConfig
from swarm.directory import Directory
from swarm.membership import Membership
from swarm.records import MAX_ADDRESSES, PeerRecord
from swarm.scope import at_stage
from swarm.update import step_rules

PAUSE_S = 0.2
log = logging.getLogger(__name__)


class Auxiliary:
    """Reduces for one stage of one run; satisfies `averaging.participant.Contributor`, with nothing."""

    weight, state_hash = 0.0, bytes(8)
    passes: tuple[Pass, ...] = ()

    def __init__(
        self,
        *,
        network: Network,
        directory: Directory,
        config: RunConfig,
        run: str,
        stage: int,
        name: str = "",
        addresses: tuple[str, ...] = (),
        uplink: UplinkMeter | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._stage, self._name = stage, name
        self.version, self.changed = 0, asyncio.Event()
        self.counters: Counter[str] = Counter()
        self._uplink = uplink or UplinkMeter()
        addresses = addresses[:MAX_ADDRESSES]
        record = PeerRecord(
            peer=network.peer_id, stage=stage, addresses=addresses, name=name, aggregates_only=True
        )
        self.membership = Membership(
            directory, record, progress=lambda: (self.version, 0.0, 0), period_s=config.network.announce_s
        )
        rules = step_rules(config)
        self._participant = Participant(
            network=(mates := at_stage(network, stage)),
            all_reduce=ButterflyAllReduce(mates, rules=rules, uplink=self._uplink),
            rules=rules,
            name=f"{run}/{stage}",
            roster=self.membership.others.keys,
            refresh_roster=self.membership.read,
            version=lambda: self.version,
            rng=rng or random.SystemRandom(),
            mode=Mode.AUXILIARY,
            auxiliaries=self.membership.auxiliaries,
        )

    async def join(self) -> None:
        """Announce: plans may come from now on."""
        await self._participant.start()
        await self.membership.enter()
        log.info("reducing for stage %d", self._stage)

    async def run(self) -> None:
        """Take part in every step until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.membership.keep())
            tasks.create_task(self._assist())

    async def _assist(self) -> None:
        while True:
            try:
                mean = await self._participant.close_step(self)
                self.version += 1
                self.counters["averaging_bytes"] += mean.sent_bytes
                self.counters["assisted_steps"] += 1
            except BehindError as error:
                told = self.version if error.version is None else error.version
                known, self.version = self.version, told
                if told <= known:
                    await asyncio.sleep(PAUSE_S)  # the others may disagree for a moment
            self._participant.coordinator.step_closed(self.version)

    async def leave(self) -> None:
        """Withdraw; a plan under way is repaired, or in strict mode closed anew."""
        steps, sent_bytes = self.counters["assisted_steps"], self.counters["averaging_bytes"]
        log.info("leaving: reduced in %d steps, sent %.1f MB", steps, sent_bytes / 1e6)
        await self.membership.withdraw()
        self._participant.close()

    def metrics(self) -> Mapping[str, Any]:
        """Cumulative counters and the present state, by metric name."""
        return {
            "stage": self._stage,
            "version": self.version,
            "queue": 0,
            "retained_bytes": 0,
            "tokens_per_s": 0.0,
            "name": self._name,
            "uplink_bytes_per_s": round(self._uplink.reported),
            **self.counters,
        }

    # what the participant asks

    async def prepare(self) -> None:
        """Nothing to do."""

    async def freeze(self) -> Contribution:
        """Nothing to bring."""
        return Contribution(torch.empty(0), 0.0)

    def abandoned(self, *, duplicate: bool) -> None:
        """Nothing is lost."""
