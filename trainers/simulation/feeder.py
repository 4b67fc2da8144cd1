"""A simulated trainer: the product's ledger, wiring and throttle, with modelled messages around them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from averaging.network import PeerId
from swarm.messages import Route
from swarm.wiring import StageWiring
from trainers import events as ev
from trainers.ledger import Ledger, batched_releases
from trainers.throttle import Throttle

if TYPE_CHECKING:
    from trainers.simulation.world import World

TICK_S = 0.5


class Feeder:
    """Keeps its own microbatches moving."""

    def __init__(self, name: PeerId, world: World, rng: random.Random) -> None:
        config, stages = world.config, len(world.costs)
        self.name, self._world = name, world
        prior_s = config.pipeline.wiring_prior_s / world.microbatch_tokens
        self._wirings = [StageWiring(stage=s, rng=rng, prior_cost_s=prior_s) for s in range(stages)]
        self.ledger = Ledger(
            trainer=name,
            session=name.encode()[:8].ljust(8),
            wirings=self._wirings,
            hop_deadline_s=config.pipeline.hop_deadline_s,
            retain_until_step=config.retains_until_step,
            verdict_s=4 * config.averaging.progress_deadline_s,
        )
        self.throttle = Throttle(most=config.pipeline.in_flight, stages=stages)
        self.tokens = self._issued = 0
        self.recovery_s: list[float] = []
        self._blank = bytes(4 * (world.microbatch_tokens + 1))
        world.events.after(rng.uniform(0, TICK_S), self._tick)

    def feed(self, event: ev.LedgerEvent) -> None:
        """Give the ledger an event, do what it says, and issue what the throttle admits."""
        refusals = self.ledger.counters["no_room"]
        self._execute(self.ledger.handle(event, self._world.events.now_s))
        if self.ledger.counters["no_room"] > refusals:
            self.throttle.refused()
        while self.throttle.admits(self.ledger.in_flight) and all(map(len, self._wirings)):
            self._issue()

    def suspect(self, stage: int, peer: PeerId) -> None:
        """It has been silent for a while."""
        if peer in self._wirings[stage]:
            self._wirings[stage].suspend(peer, True)

    def gone(self, event: ev.PeerGone) -> None:
        self.throttle.gone(event.peer)
        self.feed(event)

    def _tick(self) -> None:
        self.feed(ev.Tick())
        self._world.events.after(TICK_S, self._tick)

    def _issue(self) -> None:
        self._issued += 1
        microbatch = self.name.encode()[:8].ljust(8) + self._issued.to_bytes(8, "big")
        now_s = self._world.events.now_s
        commands = self.ledger.issue(
            microbatch, self._blank, sequences=1, evaluate=False, step=0, now_s=now_s
        )
        self._execute(commands)

    def _execute(self, commands: Iterable[ev.Command]) -> None:
        world = self._world
        for command in batched_releases(commands):
            match command:
                case ev.PushTokens(route):
                    answer = partial(self._answered, route.peers[0], route, True)
                    world.push(self.name, route.peers[0], route, 0, backward=False, answer=answer)
                case ev.Resend(peer, route, backward):
                    world.resend(
                        peer, route, backward=backward, answer=partial(self._answered, peer, route, False)
                    )
                case ev.Cancel(peer, microbatches):
                    world.cancel(peer, microbatches, partial(self._cancelled, peer, microbatches))
                case ev.Release(peer, microbatches):
                    world.release(peer, microbatches)
                case ev.Completed():
                    self.throttle.completed()
                    self.tokens += command.tokens
                    world.completed(command.tokens)
                case ev.Recovered():
                    self.recovery_s.append(command.recovered_s - command.noticed_s)
                case ev.Abandoned():
                    pass  # the ledger has counted it

    def _answered(self, peer: PeerId, route: Route, push: bool, status: int) -> None:
        self.feed(ev.Answered(peer, route.microbatch, route.attempt, status, push=push))

    def _cancelled(
        self,
        peer: PeerId,
        microbatches: tuple[tuple[bytes, int], ...],
        stands: tuple[tuple[bytes, int, float], ...],
    ) -> None:
        self.feed(ev.CancelAnswered(peer, microbatches, stands))
