"""Simulated machines that join, serve, move and die, each deciding by what it reads on the rosters.

    come     choose a stage, announce, load its state; redirected meanwhile if another needs it more; serve
    look     now and then, as `swarm.volunteer` does: whom the rule names loads the other state, then moves
    kill     it serves no more at once; its record stays on the roster until that expires
    leave    it withdraws its record

Whom the rule names is computed when the rosters have changed, once for all who look at the same ones.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from averaging.network import PeerId
from swarm.assignment import choose_stage, look_s, rebalancing_of
from swarm.config import RunConfig
from swarm.records import PeerRecord
from trainers.simulation.events import Event, Events


@dataclass(slots=True)
class Machine:
    """One simulated peer."""

    name: PeerId
    speed: float
    stage: int | None = None  # that it serves, or whose state it loads; None until it has chosen
    serves: bool = False
    heading: int | None = None  # the stage whose state it loads while it serves `stage`
    alive: bool = True
    loading: Event | None = None
    look: Event | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """What the machines' surroundings take."""

    state_s: Callable[[int, Machine], float]  # to load the state of a stage
    start_s: float  # machines of one moment begin within so many seconds
    lag_s: float = 0.2  # until others find what is announced


class Fleet:
    """All machines of a run."""

    def __init__(
        self,
        *,
        events: Events,
        config: RunConfig,
        costs: Sequence[float],
        timing: Timing,
        rng: random.Random,
        on_change: Callable[[], None] = lambda: None,
        on_serve: Callable[[Machine], None] = lambda machine: None,
        on_gone: Callable[[Machine, bool], None] = lambda machine, left: None,
        queue_of: Callable[[Machine], int] = lambda machine: 0,
    ) -> None:
        """`on_change` is called when who is alive or who serves has changed; `on_serve` and `on_gone`
        (machine, whether it said goodbye) when one begins and ends to serve its stage."""
        self._events, self._config, self._costs, self._timing, self._rng = events, config, costs, timing, rng
        self._on_change, self._on_serve, self._on_gone = on_change, on_serve, on_gone
        self._queue_of = queue_of
        self.machines: dict[PeerId, Machine] = {}  # alive
        self.speeds = Counter[float]()  # of those
        self.capacities = [0.0] * len(costs)  # of those that serve
        self.serving = [0] * len(costs)  # how many those are
        self.moves = self.redirected = 0
        self._records: list[dict[PeerId, PeerRecord]] = [{} for _ in costs]
        self._rosters: list[list[PeerRecord]] | None = None
        self._movers: dict[PeerId, int] = {}  # by rosters that are at most `lag_s` old
        self._decided_s, self._outdated = float("-inf"), False
        self._considering = False
        self._named = 0

    # what happens to machines

    def come(self, speed: float) -> Machine:
        machine = Machine(f"peer{self._named:06d}", speed)
        self._named += 1
        self.machines[machine.name] = machine
        self.speeds[speed] += 1
        self._events.after(self._rng.uniform(0, self._timing.start_s), partial(self._join, machine))
        self._on_change()
        return machine

    def kill(self, machine: Machine) -> None:
        """Without warning."""
        self._stop(machine, left=False)
        network = self._config.network
        remains_s = network.expire_s - self._rng.uniform(0, network.announce_s)
        self._events.after(remains_s, partial(self._forget, machine.name))

    def leave(self, machine: Machine) -> None:
        """With a goodbye."""
        self._stop(machine, left=True)
        self._events.after(self._timing.lag_s, partial(self._forget, machine.name))

    def _stop(self, machine: Machine, *, left: bool) -> None:
        machine.alive = False
        del self.machines[machine.name]
        self.speeds[machine.speed] -= 1
        for event in (machine.loading, machine.look):
            if event is not None:
                event.cancelled = True
        self._cease(machine, left=left)
        self._on_change()

    def _serve(self, machine: Machine, stage: int) -> None:
        machine.stage, machine.serves, machine.heading = stage, True, None
        self.capacities[stage] += machine.speed / self._costs[stage]
        self.serving[stage] += 1
        self._on_serve(machine)

    def _cease(self, machine: Machine, *, left: bool) -> None:
        if machine.serves and machine.stage is not None:
            self.capacities[machine.stage] -= machine.speed / self._costs[machine.stage]
            self.serving[machine.stage] -= 1
            machine.serves = False
            self._on_gone(machine, left)

    # joining and moving

    def _join(self, machine: Machine) -> None:
        if machine.alive:
            machine.stage, _ = choose_stage(self.rosters(), self._costs)
            self._load(machine, machine.stage)

    def _load(self, machine: Machine, stage: int) -> None:
        if machine.loading is not None:
            machine.loading.cancelled = True
        state_s = self._timing.state_s(stage, machine)
        machine.loading = self._events.after(state_s, partial(self._loaded, machine, stage))
        self._announce(machine)

    def _loaded(self, machine: Machine, stage: int) -> None:
        machine.loading = None
        if machine.serves:
            if not self._others_stay(machine):
                machine.heading = None
                return self._announce(machine)
            self._cease(machine, left=True)
            self.moves += 1
        self._serve(machine, stage)
        self._announce(machine)
        self._on_change()

    def _others_stay(self, machine: Machine) -> bool:
        return any(
            other.serves and other.stage == machine.stage and other.heading is None
            for other in self.machines.values()
            if other is not machine
        )

    # who knows what

    def rosters(self) -> Sequence[Sequence[PeerRecord]]:
        """As the machines read them at this moment."""
        if self._rosters is None:
            self._rosters = [list(records.values()) for records in self._records]
        return self._rosters

    def _announce(self, machine: Machine) -> None:
        self._events.after(self._timing.lag_s, partial(self._write, machine))

    def _write(self, machine: Machine) -> None:
        if machine.alive and machine.stage is not None:
            for records in self._records:
                records.pop(machine.name, None)
            self._records[machine.stage][machine.name] = PeerRecord.model_construct(
                peer=machine.name,
                stage=machine.stage,
                speed=machine.speed if machine.serves else 0.0,  # not measured before it serves
                queue=self._queue_of(machine),
                loading=not machine.serves,
                heading=machine.heading,
                announced_s=self._events.now_s,
            )
            self._changed()

    def _forget(self, name: PeerId) -> None:
        for records in self._records:
            records.pop(name, None)
        self._changed()

    def _changed(self) -> None:
        self._rosters, self._outdated = None, True
        if not self._considering:
            self._considering = True
            self._events.after(self._timing.lag_s, self._consider)

    def _consider(self) -> None:
        """See who will find itself named, when it looks next."""
        self._considering = False
        for name in self._moves():
            machine = self.machines.get(name)
            if machine is not None and machine.look is None:
                wait_s = self._rng.uniform(0, look_s(self._config.rebalancing, loading=not machine.serves))
                machine.look = self._events.after(wait_s, partial(self._look, machine))

    def _moves(self) -> dict[PeerId, int]:
        if self._outdated and self._events.now_s >= self._decided_s + self._timing.lag_s:
            self._decided_s, self._outdated = self._events.now_s, False
            moves = rebalancing_of(self.rosters(), self._costs, self._config.rebalancing).moves
            self._movers = {move.peer: move.target for move in moves}
        return self._movers

    def _look(self, machine: Machine) -> None:
        machine.look = None
        target = self._moves().get(machine.name)
        if target is None or machine.heading is not None:
            return
        if machine.serves:
            machine.heading = target
        else:
            machine.stage = target
            self.redirected += 1
        self._load(machine, target)
