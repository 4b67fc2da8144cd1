"""The steps of one simulated stage: accumulate until the coordinator's own rule closes one, average, apply.

Who averages with whom and how much each reduces is up to `averaging.plan` and `averaging.shares`; how long it
takes follows from the members' links. A member that dies meanwhile takes what it had accumulated with it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from averaging.network import PeerId
from averaging.plan import Pass, Plan, Report, decide, has_quorum, make_plan
from averaging.shares import shares
from swarm.history import REMEMBERED_STEPS
from swarm.messages import Route
from swarm.update import step_rules
from trainers import events as ev

if TYPE_CHECKING:
    from trainers.simulation.world import World

OPTIMIZER_S = 0.1
Sum = dict[PeerId, list[bytes]]  # trainer -> its microbatches


class StageSteps:
    """Of the living peers of one stage."""

    def __init__(self, stage: int, world: World) -> None:
        self._stage, self._world = stage, world
        self._rules = step_rules(world.config)
        self._pass = Pass(world.values[stage])
        self.version = self.lost = 0
        self.holds = False  # nobody computes: updates are not delayed
        self._sums: dict[PeerId, Sum] = {}  # of every peer that serves
        self._tokens = 0.0
        self._frozen: dict[PeerId, Sum] = {}
        self._averages = self._waits = False
        self._reached_s = 0.0
        self._history: deque[tuple[int, dict[PeerId, frozenset[bytes]]]] = deque(maxlen=REMEMBERED_STEPS)

    # who is there, and what they have

    def join(self, peer: PeerId) -> None:
        self._sums[peer] = defaultdict(list)

    def lose(self, peer: PeerId) -> Sum:
        """It serves no more. Returns what it had accumulated and put into no plan."""
        held = self._sums.pop(peer)
        self._tokens -= self._weight(held)
        self._frozen.pop(peer, None)
        if not self._sums:
            self._fall_back()
        return held

    def _fall_back(self) -> None:
        """Nobody is left: whoever comes next gets the state that the archive has."""
        every = self._world.config.archive.every_steps
        archived = self.version - self.version % every if every else 0
        self.lost += self.version - archived
        self.version = archived
        while self._history and self._history[-1][0] > archived:
            self._history.pop()

    def take_over(self, peer: PeerId, held: Sum) -> None:
        """A leaver's sum goes on in that of a stage mate."""
        for trainer, ids in held.items():
            self._sums[peer][trainer] += ids
        self._tokens += self._weight(held)

    def accumulate(self, peer: PeerId, route: Route) -> int:
        """Returns the step that it counts for."""
        self._sums[peer][route.trainer].append(route.microbatch)
        self._tokens += self._world.microbatch_tokens
        self._consider()
        return self.version + self._averages

    def _weight(self, held: Sum) -> float:
        return float(self._world.microbatch_tokens * sum(map(len, held.values())))

    def _counted(self, held: Sum) -> float:
        return min(self._rules.max_weight, self._weight(held))

    # closing

    def _consider(self) -> None:
        if self._averages or self._waits or self._tokens < self._rules.target:
            return
        self._waits, self._reached_s = True, self._world.events.now_s
        self._world.events.after(2 * self._world.latency_s, self._decide)

    def _decide(self) -> None:
        self._waits = False
        now_s = self._world.events.now_s
        reports = {
            peer: Report(self._counted(held), b"", (self._pass,), self._world.uplink)
            for peer, held in self._sums.items()
        }
        if not reports:
            return
        missing = self._world.recently_dead(self._stage)
        decision = decide(
            reports,
            target=self._rules.target,
            expected=[*reports, *missing],
            waited_s=now_s - self._reached_s,
            grace_s=self._rules.grace_s,
        )
        if decision.close:
            return self._average(reports)
        if self._tokens >= self._rules.target:
            self._waits = True
            self._world.events.after(self._rules.grace_s, self._decide)

    def _average(self, reports: dict[PeerId, Report]) -> None:
        plan = make_plan(
            step=self.version,
            coordinator=min(reports),
            reports=reports,
            nonce=self._world.rng.randbytes(16),
            rules=self._rules,
        )
        self._averages, self._frozen = True, self._sums
        self._sums, self._tokens = {peer: defaultdict(list) for peer in self._frozen}, 0.0
        self.holds = not self._world.config.training.delayed_updates
        self._world.events.after(self._seconds(plan) + OPTIMIZER_S, lambda: self._apply(plan))

    def _seconds(self, plan: Plan) -> float:
        """Until the slowest member of every group has sent and received its part, dimension by dimension."""
        total_s, size = 0.0, self._world.averaging_bytes(self._stage)
        for dimension in range(plan.grid.dimensions):
            slowest_s = 0.0
            for group in plan.grid.groups(dimension):
                members = [plan.by_peer[peer] for peer in group.members]
                if len(members) < 2:
                    continue
                reduced = shares([m.bandwidth for m in members], [m.mode for m in members])
                for member, share in zip(members, reduced, strict=True):
                    moved = size * (1 - share + share * (len(members) - 1))
                    self._world.links.sent[member.peer] += int(moved)
                    slowest_s = max(slowest_s, moved / self._world.uplink)
            total_s += slowest_s + 2 * self._world.latency_s
        return total_s

    def _apply(self, plan: Plan) -> None:
        inside = {peer: held for peer, held in self._frozen.items() if peer in self._sums}
        self._averages, self._frozen, self.holds = False, {}, False
        weight = sum(self._weight(held) for held in inside.values())
        if weight >= self._rules.target and has_quorum(inside, plan.bringers):
            self.version += 1
            self._announce(inside)
        else:
            for peer, held in inside.items():
                self.take_over(peer, held)
        self._world.wake(self._stage)
        self._consider()

    def _announce(self, inside: dict[PeerId, Sum]) -> None:
        ids: defaultdict[PeerId, list[bytes]] = defaultdict(list)
        for held in inside.values():
            for trainer, each in held.items():
                ids[trainer] += each
        frozen = {trainer: frozenset(each) for trainer, each in ids.items()}
        self._history.append((self.version, frozen))
        for peer in self._sums:  # who came meanwhile has replayed this step
            for trainer in self._world.trainers:
                event = ev.SteppedEvent(self._stage, peer, self.version, frozen.get(trainer, frozenset()))
                self._world.tell(trainer, event)

    def told_history(self, peer: PeerId, trainer: PeerId) -> Iterator[ev.SteppedEvent]:
        """What a newcomer says of the steps that are in its state."""
        for version, inside in self._history:
            yield ev.SteppedEvent(self._stage, peer, version, inside.get(trainer, frozenset()))
