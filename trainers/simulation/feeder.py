"""A simulated trainer: the product's ledger, wiring and throttle, with modelled messages around them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from averaging.network import PeerId
from swarm.messages import Route
from trainers import events as ev
from trainers.assembly import ledger_of, take, throttle_of, wirings_of
from trainers.ledger import batched_releases

if TYPE_CHECKING:
    from trainers.simulation.world import World

TICK_S = 0.5


class Feeder:
    """Keeps its own microbatches moving."""

    def __init__(self, name: PeerId, world: World, rng: random.Random) -> None:
        self.name, self._world = name, world
        self._session = name.encode()[:8].ljust(8)
        self._wirings = wirings_of(world.config, rng)
        self.ledger = ledger_of(  # what is issued here is not issued step by step
            world.config, self._wirings, trainer=name, session=self._session, strict=False
        )
        self.throttle = throttle_of(world.config)
        self.tokens = self._issued = 0
        self.recovery_s: list[float] = []
        self._blank = bytes(4 * (world.microbatch_tokens + 1))
        world.events.after(rng.uniform(0, TICK_S), self._tick)

    def feed(self, event: ev.LedgerEvent) -> None:
        """Give the ledger an event, do what it says, and issue what the throttle admits."""
        self._execute(take(self.ledger, self.throttle, event, self._world.events.now_s))
        while self.throttle.admits(self.ledger.in_flight, self.ledger.stuck) and all(map(len, self._wirings)):
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
        microbatch = self._session + self._issued.to_bytes(8, "big")
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
