"""From a trace to a result: what a run's peers computed over time, against the best assignment of them."""

import functools
import gc
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from swarm.config import RunConfig
from swarm.donors import DONORS
from swarm.model import stage_costs, stage_values
from trainers.simulation.events import Events
from trainers.simulation.fleet import Fleet, Machine, Timing
from trainers.simulation.links import Link
from trainers.simulation.optimum import best_assignment
from trainers.simulation.trace import Trace
from trainers.simulation.world import World


@dataclass(frozen=True, slots=True)
class Moment:
    """From `at_s` on, until the next one."""

    at_s: float
    peers: int  # alive
    capacity: float  # of the weakest stage
    optimum: float


@dataclass(slots=True)
class Result:
    """A simulated run."""

    moments: list[Moment] = field(default_factory=list)
    end_s: float = 0.0
    moves: int = 0
    redirected: int = 0
    tokens: list[tuple[float, int]] = field(default_factory=list)  # (time, completed until then)
    sent_bytes: int = 0  # by all peers, for hops and averaging
    peer_hours: float = 0.0
    steps: list[int] = field(default_factory=list)  # of every stage
    lost_steps: int = 0  # of stages that lost all their peers, since they were archived last
    counters: Counter[str] = field(default_factory=Counter)  # of the trainers' ledgers
    recovery_s: list[float] = field(default_factory=list)
    in_flight_bound: bool = False  # the trainers would keep more under way if they might

    def kept(self, begin_s: float = 0.0, end_s: float = float("inf")) -> float:
        """The part of the optimum that was there, from `begin_s` to `end_s`; 1 if there was none."""
        capacity = optimum = 0.0
        last = Moment(min(end_s, self.end_s), 0, 0.0, 0.0)
        for moment, following in pairwise([*self.moments, last]):
            seconds = min(following.at_s, end_s) - max(moment.at_s, begin_s)
            if seconds > 0:
                capacity += seconds * moment.capacity
                optimum += seconds * moment.optimum
        return capacity / optimum if optimum else 1.0

    @property
    def optimal_tokens(self) -> float:
        """What the best assignment of the peers would have computed until the end."""
        times = [*(moment.at_s for moment in self.moments), self.end_s]
        return sum(m.optimum * (b - a) for m, (a, b) in zip(self.moments, pairwise(times), strict=True))

    @property
    def first_s(self) -> float:
        """When there were enough peers for all stages."""
        return next((moment.at_s for moment in self.moments if moment.optimum > 0), 0.0)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a simulated run meets."""

    per_instance: int = 1  # peers of every machine of the trace
    speeds: Sequence[float] = (1.0,)  # drawn from, for every peer
    state_s: float | None = None  # to load a stage's state; default: what the links take
    costs: Sequence[float] = ()  # of a token in every stage; default: the model's
    trainers: int = 0  # none: who serves what, without microbatches
    link: Link = field(default_factory=lambda: Link(12.5e6, 12.5e6))
    latency_s: float = 0.05
    jitter: float = 0.2  # a job takes up to so much longer, or less long
    seed: int = 0


START_S = 2.0  # machines of one moment begin within so many seconds
STATE_BYTES = 12  # of every parameter
SAMPLES = 400  # of the tokens, over the whole time


class Simulation:
    """One run under way."""

    def __init__(self, config: RunConfig, trace: Trace, around: Surroundings) -> None:
        self._config, self._trace, self._around = config, trace, around
        self._rng, self.events = random.Random(around.seed), Events()
        self._tokens: list[tuple[float, int]] = []
        self._costs = around.costs or stage_costs(config.model)
        self._values = stage_values(config.model)
        self.world: World | None = None
        if around.trainers:
            self.world = World(
                events=self.events,
                config=config,
                costs=self._costs,
                values=self._values,
                link=around.link,
                latency_s=around.latency_s,
                trainers=around.trainers,
                jitter=around.jitter,
                rng=random.Random(self._rng.random()),
            )
        self._noted: list[tuple[float, int, float, frozenset[tuple[float, int]]]] = []
        self.fleet = Fleet(
            events=self.events,
            config=config,
            costs=self._costs,
            timing=Timing(state_s=self._state_s, start_s=START_S),
            rng=self._rng,
            on_change=self._note,
            on_serve=self.world.serve if self.world else lambda machine: None,
            on_gone=self.world.end if self.world else lambda machine, left: None,
            queue_of=self._queue_of,
        )
        for at_s, number in trace.changes():
            self.events.at(at_s, functools.partial(self._change, number))

    def run(self, on_progress: Callable[[float], None] = lambda part: None) -> Result:
        """Until the trace ends; `on_progress` hears what part is done."""
        end_s = self._trace.end_s
        thresholds = gc.get_threshold()
        gc.set_threshold(1_000_000, *thresholds[1:])  # nothing here is a cycle; looking for them is a third
        try:
            for sample in range(1, SAMPLES + 1):
                self.events.run_until(end_s * sample / SAMPLES)
                on_progress(sample / SAMPLES)
                if self.world is not None:
                    self._tokens.append((self.events.now_s, self.world.tokens))
        finally:
            gc.set_threshold(*thresholds)
        return self.result()

    def result(self) -> Result:
        """Of the time so far."""
        end_s, moments, world = self.events.now_s, self._moments(), self.world
        times = [*(moment.at_s for moment in moments), end_s]
        spans = zip(moments, pairwise(times), strict=True)
        result = Result(
            moments=moments,
            end_s=end_s,
            moves=self.fleet.moves,
            redirected=self.fleet.redirected,
            peer_hours=sum(moment.peers * (b - a) for moment, (a, b) in spans) / 3600,
        )
        if world is not None:
            result.tokens = self._tokens
            result.sent_bytes = world.links.sent.total()
            result.steps = [steps.version for steps in world.steps]
            result.lost_steps = sum(steps.lost for steps in world.steps)
            result.counters = world.counters()
            result.in_flight_bound = all(
                int(trainer.throttle.limit) >= self._config.pipeline.in_flight
                for trainer in world.trainers.values()
            )
            for trainer in world.trainers.values():
                result.recovery_s += trainer.recovery_s
        return result

    def _state_s(self, stage: int, machine: Machine) -> float:
        """Parameters and two moments of the optimizer, from the uploads that so many donors give.

        Who is there from the beginning draws the initial values itself.
        """
        if self._around.state_s is not None:
            return self._around.state_s
        if self.events.now_s <= self._noted[0][0] + 2 * START_S:
            return 0.0
        link, donors = self._around.link, max(1, min(DONORS, self.fleet.serving[stage]))
        rate = min(link.down_bytes_s, donors * link.up_bytes_s * self._config.network.upload_share)
        return STATE_BYTES * self._values[stage] / rate

    def _queue_of(self, machine: Machine) -> int:
        server = self.world.servers.get(machine.name) if self.world else None
        return server.queue if server else 0

    def _moments(self) -> list[Moment]:
        @functools.cache
        def optimum(speeds: frozenset[tuple[float, int]]) -> float:
            return best_assignment((speed for speed, count in speeds for _ in range(count)), self._costs)[0]

        return [Moment(at_s, peers, has, optimum(speeds)) for at_s, peers, has, speeds in self._noted]

    def _note(self) -> None:
        noted, fleet = self._noted, self.fleet
        if noted and noted[-1][0] == self.events.now_s:
            noted.pop()
        capacity = max(0.0, min(fleet.capacities))
        noted.append((self.events.now_s, len(fleet.machines), capacity, frozenset((+fleet.speeds).items())))

    def _change(self, instances: int) -> None:
        """So many machines more, or fewer."""
        peers = instances * self._around.per_instance
        for _ in range(peers):
            self.fleet.come(self._rng.choice(self._around.speeds))
        for name in self._rng.sample(sorted(self.fleet.machines), max(0, -peers)):
            self.fleet.kill(self.fleet.machines[name])


def simulate(config: RunConfig, trace: Trace, around: Surroundings) -> Result:
    """Let the peers of `trace` come and go."""
    return Simulation(config, trace, around).run()
