"""A whole swarm in one process and in virtual time: the real peers and the real pipeline on the in-memory
network, with a tiny model and a schedule of faults. Tests and schedules build on it.
"""

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

import torch

from averaging.memory_network import Link, MemoryHub
from averaging.network import Network, PeerId
from swarm.archive import Archive
from swarm.auxiliary import Auxiliary
from swarm.checkpoint import Checkpoint
from swarm.compute import Compute, Priority, VirtualCompute
from swarm.config import RunConfig, parse_run
from swarm.directory import MemoryDirectory
from swarm.last_state import LastState
from swarm.messages import pack_tokens
from swarm.peer import Peer
from swarm.stage import Accumulator
from swarm.update import AppliedStep
from swarm.volunteer import Volunteer
from trainers import events as ev
from trainers.pipeline import Pipeline

TINY = """
name: tiny
model: {width: 8, layers: 3, heads: 2, feed_forward: 8, vocabulary: 16, stages: 3}
training:
  sequence_tokens: 4
  microbatch_sequences: 1
  target_batch_tokens: 32
  steps: 1000000
pipeline: {codec: float32, in_flight: 8, queue: 8, hop_deadline_s: 20, retain_until: step}
averaging: {codec: float32, progress_deadline_s: 3, grace_s: 0.5}
network: {announce_s: 1, expire_s: 6, heartbeat_s: 0.5, lease_s: 4}
"""


def tiny_run(*overrides: str) -> RunConfig:
    return parse_run(TINY, source="tiny", overrides=list(overrides))


Node = tuple[int, int, bytes]  # (stage, version, state hash)


@dataclass(slots=True)
class SimPeer:
    id: PeerId
    stage: int
    peer: Peer
    task: "asyncio.Task[None]"
    compute: VirtualCompute


@dataclass(slots=True)
class SimVolunteer:
    """As a `SimPeer`, of whichever stage it serves at the moment."""

    id: PeerId
    volunteer: Volunteer
    task: "asyncio.Task[None]"
    compute: VirtualCompute

    @property
    def stage(self) -> int:
        return self.volunteer.stage

    @property
    def peer(self) -> Peer:
        return self.volunteer.peer


class Sim:
    """One in-memory swarm: peers come and go, one trainer, a log of who accumulated what."""

    def __init__(self, config: RunConfig, seed: int, *, compute_s: float = 0.02, latency_s: float = 0.005):
        self.config, self.rng = config, random.Random(seed)
        self.clock = asyncio.get_running_loop().time
        self.hub = MemoryHub(rng=random.Random(seed + 1))
        self.directory = MemoryDirectory(self.clock, config.network.expire_s)
        self.compute_s, self.latency_s = compute_s, latency_s
        self.hub.link = lambda a, b: Link(latency_s=self.latency_s)
        self.peers: dict[PeerId, SimPeer | SimVolunteer] = {}
        self.auxiliaries: dict[PeerId, asyncio.Task[None]] = {}
        self.archives: dict[PeerId, asyncio.Task[None]] = {}
        self.names = itertools.count()
        # (peer, stage) -> step -> microbatches
        self.contributed: dict[tuple[PeerId, int], dict[int, list[bytes]]] = {}
        self.parent: dict[Node, Node] = {}  # state -> the state it was stepped from
        self.contents: dict[Node, set[tuple[bytes, PeerId]]] = {}  # what that step added, from whom
        self.hashes: dict[tuple[int, int], set[bytes]] = {}  # (stage, version) -> state hashes seen
        self.steps: list[tuple[PeerId, int, AppliedStep]] = []  # (peer, stage, what)
        self.completed: Counter[bytes] = Counter()
        self.abandoned: list[ev.Abandoned] = []
        self.recovered: list[ev.Recovered] = []
        self.losses: dict[bytes, float] = {}
        self.errors: list[str] = []
        self.has_volunteers = False
        self.on_log = lambda what: None
        self.on_stepped = lambda node: None
        self.on_freeze = lambda peer: None  # it is about to average
        asyncio.get_running_loop().set_exception_handler(self._on_error)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        if "was destroyed but it is pending" in context.get("message", ""):
            return  # of a killed peer
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def start_peer(self, stage: int, last_state: LastState | None = None) -> PeerId:
        peer_id = f"peer{next(self.names):02d}-of-stage{stage}"
        compute = self._compute_of(peer_id)
        network = self.hub.network(peer_id)
        peer = self._make_peer(network, compute, stage, fixed=True, last_state=last_state)

        async def live() -> None:
            await peer.join()
            await peer.run()

        task = self._start(peer_id, live())
        self.peers[peer_id] = SimPeer(peer_id, stage, peer, task, compute)
        return peer_id

    async def start_volunteer(self) -> PeerId:
        """A peer that chooses its stage, and moves."""
        self.has_volunteers = True
        peer_id = f"volunteer{next(self.names):02d}"
        network, compute = self.hub.network(peer_id), self._compute_of(peer_id)
        volunteer = Volunteer(
            me=peer_id,
            directory=self.directory,
            config=self.config,
            make_peer=lambda stage: self._make_peer(network, compute, stage, fixed=False),
            rng=random.Random(peer_id),
        )

        async def live() -> None:
            await volunteer.join()
            await volunteer.run()

        task = self._start(peer_id, live())
        await self.until(lambda: hasattr(volunteer, "peer"))
        self.peers[peer_id] = SimVolunteer(peer_id, volunteer, task, compute)
        return peer_id

    def _start(self, peer_id: PeerId, life: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(life, name=peer_id)
        task.add_done_callback(self._peer_ended)
        return task

    def _compute_of(self, peer_id: PeerId) -> VirtualCompute:
        def seconds(priority: Priority) -> float:
            # The last stage has one job per microbatch, the others two: where speeds matter, all take alike.
            known = self.peers.get(peer_id) if self.has_volunteers else None
            jobs = 2 if known is not None and known.stage == 2 else 1
            return jobs * self.compute_s * self.rng.uniform(0.5, 1.5) if priority else 0.001

        return VirtualCompute(seconds, stopped=lambda: peer_id in self.hub.hung)

    def _make_peer(
        self,
        network: Network,
        compute: Compute,
        stage: int,
        *,
        fixed: bool,
        last_state: LastState | None = None,
    ) -> Peer:
        peer_id = network.peer_id
        contributed = self.contributed.setdefault((peer_id, stage), {})
        peer = Peer(
            network=network,
            directory=self.directory,
            compute=compute,
            config=self.config,
            run="run",
            stage=stage,
            fixed=fixed,
            last_state=last_state,
            clock=self.clock,
            rng=random.Random(peer_id),
            on_step=lambda done: self._stepped(peer_id, stage, done),
        )
        prepare = peer.prepare

        async def prepare_and_log(**how: int) -> None:
            await prepare(**how)
            mean = peer.stage.mean

            def logged(frozen: Accumulator) -> torch.Tensor:
                contributed[frozen.step] = list(frozen.microbatches)
                if len(set(frozen.microbatches)) < len(frozen.microbatches):
                    self.errors.append(f"{peer_id} has a gradient twice in step {frozen.step}")
                self.on_freeze(peer_id)
                return mean(frozen)

            peer.stage.mean = logged

        peer.prepare = prepare_and_log
        return peer

    async def start_auxiliary(self, stage: int) -> Auxiliary:
        """A peer that only reduces; ends with the test, or when the hub kills it."""
        peer_id = f"auxiliary{next(self.names):02d}-of-stage{stage}"
        auxiliary = Auxiliary(
            network=self.hub.network(peer_id),
            directory=self.directory,
            config=self.config,
            run="run",
            stage=stage,
            rng=random.Random(peer_id),
        )

        async def live() -> None:
            await auxiliary.join()
            await auxiliary.run()

        task = asyncio.create_task(live(), name=peer_id)
        task.add_done_callback(self._peer_ended)
        self.auxiliaries[peer_id] = task
        return auxiliary

    def _stepped(self, peer_id: PeerId, stage: int, done: AppliedStep) -> None:
        """Log what went into an applied step: the microbatches that every member contributed to it."""
        self.steps.append((peer_id, stage, done))
        node = (stage, done.version, done.state_hash)
        self.parent[node] = (stage, done.version - 1, done.hash_before)
        contents = self.contents.setdefault(node, set())
        self.on_log(f"{peer_id} applied step {done.version - 1} with {[m[:6] for m in done.members]}")
        self.hashes.setdefault((stage, done.version), set()).add(done.state_hash)
        for member in done.members:
            for microbatch in self.contributed.get((member, stage), {}).get(done.version - 1, ()):
                contents.add((microbatch, member))
        self.on_stepped(node)

    def lineage(self, stage: int) -> list[tuple[bytes, PeerId]]:
        """(microbatch, peer) of every gradient in the state that the living peers of a stage hold.

        What only dead peers had applied is not in it: it had to be computed again.
        """
        nodes = self.steps_to(self.newest(stage))
        return [gradient for node in nodes for gradient in sorted(self.contents[node])]

    def newest(self, stage: int) -> Node:
        """The state of the living peer of a stage that is furthest."""
        living = [p.peer for p in self.peers.values() if p.stage == stage and hasattr(p.peer, "updater")]
        newest = max(living, key=lambda peer: peer.stage.version)
        return (stage, newest.stage.version, newest.stage.hash())

    def steps_to(self, node: Node) -> list[Node]:
        """The states on the way to this one, itself first, without the initial one."""
        steps = []
        while node in self.parent:
            steps.append(node)
            node = self.parent[node]
        assert node[1] == 0, f"the history of stage {node[0]} breaks off at {node}"
        return steps

    def _peer_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(f"{task.get_name()} failed: {error!r}")

    def all_acquainted(self) -> bool:
        """Does every peer have all others of its stage on its roster?"""
        return all(
            hasattr(p.peer, "updater")
            and {q.id for q in self.peers.values() if q.stage == p.stage} <= {*p.peer.membership.others, p.id}
            for p in self.peers.values()
        )

    def kill(self, peer_id: PeerId) -> None:
        """SIGKILL: nothing is cleaned up, everything stops."""
        sim_peer = self.peers.pop(peer_id)
        self.hub.kill(peer_id)
        sim_peer.task.cancel()
        sim_peer.compute.close()
        sim_peer.peer.close()

    async def terminate(self, peer_id: PeerId) -> None:
        """SIGTERM: it leaves in its own way, and ends."""
        leaving = self.peers.pop(peer_id)
        await (leaving.volunteer if isinstance(leaving, SimVolunteer) else leaving.peer).leave()
        leaving.task.cancel()
        leaving.compute.close()
        self.hub.kill(peer_id)

    async def start_archive(self, folder: Path, newest: Checkpoint | None = None) -> Archive:
        """In a process of its own; ends with the test, or when the hub kills it."""

        async def at_once(work):  # the event loop's time is not that of a disk
            return work()

        name = f"archive{next(self.names):02d}"
        archive = Archive(
            network=self.hub.network(name),
            directory=self.directory,
            config=self.config,
            folder=folder,
            newest=newest,
            in_thread=at_once,
            rng=random.Random(name),
        )
        await archive.start()
        task = asyncio.create_task(archive.run(), name=name)
        task.add_done_callback(self._peer_ended)
        self.archives[name] = task
        return archive

    async def start_trainer(self, name: PeerId = "trainer") -> Pipeline:
        self.pipeline = Pipeline(
            network=self.hub.network(name),
            directory=self.directory,
            config=self.config,
            rng=random.Random(self.rng.random()),
            clock=self.clock,
            on_completed=self._completed,
            on_abandoned=self.abandoned.append,
            on_recovered=self.recovered.append,
        )
        self.pipeline_task = asyncio.create_task(self.pipeline.run(), name="trainer")
        self.pipeline_task.add_done_callback(self._peer_ended)
        return self.pipeline

    def _completed(self, done: ev.Completed) -> None:
        self.completed[done.microbatch] += 1
        self.losses[done.microbatch] = done.loss / done.tokens

    def tokens(self, number: int) -> torch.Tensor:
        """The token ids [B, T + 1] of a microbatch."""
        training = self.config.training
        generator = torch.Generator().manual_seed(number)
        shape = (training.microbatch_sequences, training.sequence_tokens + 1)
        return torch.randint(0, self.config.model.vocabulary, shape, generator=generator)

    def issue(self, number: int, *, evaluate: bool = False, step: int = 0) -> bytes:
        tokens = self.tokens(number)
        microbatch = number.to_bytes(16, "big")
        self.pipeline.issue(
            microbatch, pack_tokens(tokens), sequences=len(tokens), evaluate=evaluate, step=step
        )
        return microbatch

    async def until(self, condition, limit_s: float = 300.0) -> None:
        """Wait in virtual time. Raises TimeoutError."""
        end_s = self.clock() + limit_s
        while not condition():
            if self.clock() > end_s:
                raise TimeoutError
            await asyncio.sleep(0.05)

    def retained_bytes(self, below: int | None = None) -> int:
        """Bytes that the living peers retain, of all microbatches or of those with smaller numbers."""
        return sum(
            hop.retained_bytes()
            for p in self.peers.values()
            if hasattr(p.peer, "server")
            for hop in p.peer.server.mailbox
            if below is None or int.from_bytes(hop.route.microbatch, "big") < below
        )


torch.set_num_threads(1)  # the same bits, and so the same schedule, on every machine
PACKAGES = ("averaging", "swarm", "trainers")
for package in PACKAGES:
    logging.getLogger(package).setLevel(logging.ERROR)  # faults are what these tests are about
__all__ = ["PACKAGES", "Priority", "Sim", "SimPeer", "tiny_run"]
