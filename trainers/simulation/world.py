"""All simulated processes of a run and what they say to each other."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from averaging.codecs import CODECS
from averaging.network import PeerId
from swarm import swarm_pb2 as pb
from swarm.config import RunConfig
from swarm.messages import Route
from swarm.watch import QUIET_BEATS
from trainers import events as ev
from trainers.simulation.events import Events
from trainers.simulation.feeder import Feeder
from trainers.simulation.fleet import Machine
from trainers.simulation.links import Link, Links
from trainers.simulation.server import Server
from trainers.simulation.steps import StageSteps

FOUND_S = 0.3  # until a trainer watches a peer that has begun to serve
BEAT_S = 1.0  # between heartbeats; real ones come more often, and would be half the work of a simulation
T = TypeVar("T")
Answer = Callable[[int], None]


class World:
    """The data path of a run, around the machines of a fleet."""

    def __init__(
        self,
        *,
        events: Events,
        config: RunConfig,
        costs: Sequence[float],
        values: Sequence[int],
        link: Link,
        latency_s: float,
        trainers: int,
        jitter: float,
        rng: random.Random,
    ) -> None:
        """`values`: parameters of every stage; `jitter`: by what part a job may take longer, or less long."""
        self.events, self.config, self.costs, self.values, self.rng = events, config, costs, values, rng
        self.latency_s, self._link, self.jitter = latency_s, link, jitter
        self.links = Links(events, latency_s, lambda name: None if name in self.trainers else link)
        self.servers: dict[PeerId, Server] = {}
        self.microbatch_tokens = config.training.microbatch_tokens
        self._dead: list[tuple[float, int, PeerId]] = []  # (since, stage, who), as long as somebody may wait
        codec = CODECS[config.pipeline.codec]
        self._tensor_bytes = codec.size_bytes(self.microbatch_tokens * config.model.width)
        self.steps = [StageSteps(stage, self) for stage in range(len(costs))]
        self.trainers: dict[PeerId, Feeder] = {}
        for number in range(trainers):
            name = f"feed{number:04d}"
            self.trainers[name] = Feeder(name, self, random.Random(rng.random()))
        events.after(BEAT_S, self._beat)

    # who is there

    def serve(self, machine: Machine) -> None:
        assert machine.stage is not None
        server = self.servers[machine.name] = Server(machine, self)
        steps = self.steps[server.stage]
        steps.join(machine.name)
        for trainer in self.trainers.values():
            self.events.after(FOUND_S, partial(self._found, trainer, server))

    def _found(self, trainer: Feeder, server: Server) -> None:
        if server.closed:
            return
        steps = self.steps[server.stage]
        for told in steps.told_history(server.name, trainer.name):
            trainer.feed(told)
        trainer.feed(ev.PeerReady(server.stage, server.name, steps.version))
        server.known = True

    def end(self, machine: Machine, left: bool) -> None:
        """It serves no more: with a goodbye, or silent from now on."""
        server = self.servers.pop(machine.name)
        server.close()
        self.links.forget(machine.name)
        held = self.steps[server.stage].lose(machine.name)
        network = self.config.network
        if left:
            self._hand_over(server, held)
        else:
            self._dead.append((self.events.now_s, server.stage, server.name))
        for trainer in self.trainers.values():
            if left:
                self.events.after(self.latency_s, partial(trainer.gone, ev.PeerGone(server.name, left=True)))
                continue
            quiet_s = QUIET_BEATS * network.heartbeat_s
            self.events.after(quiet_s, partial(trainer.suspect, server.stage, server.name))
            gone = ev.PeerGone(server.name, silent=True)
            self.events.after(network.lease_s, partial(trainer.gone, gone))

    def _hand_over(self, server: Server, held: dict[PeerId, list[bytes]]) -> None:
        mates = sorted(m for m, other in self.servers.items() if other.stage == server.stage and other.known)
        if not mates or not held:
            return
        mate, steps = self.rng.choice(mates), self.steps[server.stage]
        steps.take_over(mate, held)
        for trainer, ids in held.items():
            for microbatch in ids:
                event = ev.HopEvent(server.name, pb.HANDED_OVER, microbatch, step=steps.version, target=mate)
                self.tell(trainer, event)

    def recently_dead(self, stage: int) -> list[PeerId]:
        """Who has died so lately that its stage mates may still wait for its report."""
        found_s = self.events.now_s - self.config.averaging.progress_deadline_s
        self._dead = [each for each in self._dead if each[0] > found_s]
        return [name for _, where, name in self._dead if where == stage]

    @property
    def uplink(self) -> float:
        """Bytes per second, of every peer."""
        return self._link.up_bytes_s

    @property
    def tokens(self) -> int:
        """Of completed microbatches."""
        return sum(trainer.tokens for trainer in self.trainers.values())

    def averaging_bytes(self, stage: int) -> int:
        """Of one peer's vector."""
        return CODECS[self.config.averaging.codec].size_bytes(self.values[stage])

    def wake(self, stage: int) -> None:
        """Hops may go on there."""
        for server in self.servers.values():
            if server.stage == stage and not self.config.training.delayed_updates:
                server.next()

    def _beat(self) -> None:
        for server in self.servers.values():
            queue = server.queue
            for trainer in self.trainers.values():
                trainer.throttle.heard(server.name, queue)
        self.events.after(BEAT_S, self._beat)

    # what they say

    def tell(self, trainer: PeerId, event: ev.LedgerEvent) -> None:
        self.events.after(self.latency_s, partial(self.trainers[trainer].feed, event))

    def push(
        self, source: PeerId, target: PeerId, route: Route, stage: int, *, backward: bool, answer: Answer
    ) -> None:
        """Send a tensor to the peer of a stage; its answer comes back, or none in time."""
        size = self._tensor_bytes if source in self.servers else 4 * self.microbatch_tokens

        def arrive() -> None:
            server = self.servers.get(target)
            if server is None:
                self.events.after(self.config.averaging.progress_deadline_s, partial(answer, pb.LINK))
            elif server.stage != stage:
                self.events.after(self.latency_s, partial(answer, pb.STALE))
            else:
                self.events.after(self.latency_s, partial(answer, server.push(route, backward=backward)))

        self.links.carry(source, target, size, arrive)

    def resend(self, peer: PeerId, route: Route, *, backward: bool, answer: Answer) -> None:
        self._reach(peer, lambda server: server.resend(route, backward=backward), answer)

    def cancel(
        self,
        peer: PeerId,
        microbatches: Iterable[tuple[bytes, int]],
        answer: Callable[[tuple[tuple[bytes, int, float], ...]], None],
    ) -> None:
        self._reach(peer, lambda server: server.cancel(microbatches), answer)

    def release(self, peer: PeerId, microbatches: Iterable[bytes]) -> None:
        self._reach(peer, lambda server: server.release(microbatches))

    def _reach(
        self, peer: PeerId, ask: Callable[[Server], T], answer: Callable[[T], None] | None = None
    ) -> None:
        """Ask a peer something; the dead do not answer."""

        def arrive() -> None:
            server = self.servers.get(peer)
            if server is not None:
                answered = ask(server)
                if answer is not None:
                    self.events.after(self.latency_s, partial(answer, answered))

        self.events.after(self.latency_s, arrive)

    def counters(self) -> Counter[str]:
        """Of all trainers."""
        total = Counter[str]()
        for trainer in self.trainers.values():
            total += trainer.ledger.counters
        return total
