"""A simulated peer's side of hops: it queues them, computes, keeps what it sent, and says what it did.

    forward    compute, tell the trainer, send on; the last stage goes back at once
    backward   compute, accumulate into the stage's step, tell the trainer, send back

What the real one refuses, this one refuses: with its queue full it is busy, and what it never had it does not
know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from averaging.bounded import forget_oldest
from swarm import swarm_pb2 as pb
from swarm.messages import Route
from trainers import events as ev
from trainers.simulation.fleet import Machine

if TYPE_CHECKING:
    from trainers.simulation.world import World

EVERY_ATTEMPT = 1 << 62
REMEMBERED = 4096  # microbatches that are not to come again
FORWARD_PART = 1 / 3  # of a hop's work; the gradients of inputs and of weights are the rest


@dataclass(slots=True)
class Held:
    """One microbatch at one peer."""

    route: Route
    has_input: bool = False
    forwarded: bool = False
    has_gradient: bool = False
    sent_back: bool = False
    accumulated: bool = False
    step: int = 0
    dropped: bool = False


class Server:
    """Of one machine, for as long as it serves one stage."""

    def __init__(self, machine: Machine, world: World) -> None:
        assert machine.stage is not None
        self.machine, self._world, self.stage = machine, world, machine.stage
        self.name = machine.name
        self._held: dict[bytes, Held] = {}
        self._withdrawn: dict[bytes, int] = {}  # the newest attempt that was cancelled
        self._forwards: deque[Held] = deque()
        self._backwards: deque[Held] = deque()  # before forwards, as in `swarm.compute`
        self._busy = False
        self.closed = False
        self.known = False  # to the trainers
        self.hop_s = world.microbatch_tokens * world.costs[self.stage] / machine.speed
        self._is_last = self.stage == len(world.costs) - 1

    @property
    def queue(self) -> int:
        """Jobs that wait."""
        return len(self._forwards) + len(self._backwards)

    # what others ask

    def push(self, route: Route, *, backward: bool) -> int:
        """A tensor has arrived. Returns the status to answer."""
        held = self._held.get(route.microbatch)
        if route.attempt <= self._withdrawn.get(route.microbatch, -1):
            return pb.STALE
        if held is None:
            if self.queue >= self._world.config.pipeline.queue:
                return pb.BUSY
            held = self._held[route.microbatch] = Held(route)
        if route.attempt > held.route.attempt:
            held.route = route
        return self._gradient(held) if backward else self._input(held)

    def _input(self, held: Held) -> int:
        if held.has_input:
            if held.forwarded and not self._is_last:
                self._send(held, backward=False)
            return pb.DUPLICATE
        held.has_input = True
        self._enqueue(held, False)
        return pb.ACCEPTED

    def _gradient(self, held: Held) -> int:
        if held.has_gradient:
            if held.sent_back:
                self._send(held, backward=True)
            return pb.DUPLICATE
        held.has_gradient = True
        if held.forwarded:  # else its input is on its way, too
            self._enqueue(held, True)
        return pb.ACCEPTED

    def resend(self, route: Route, *, backward: bool) -> int:
        held = self._held.get(route.microbatch)
        if held is None:
            return pb.UNKNOWN
        if route.attempt >= held.route.attempt:
            held.route = route
        if held.sent_back if backward else held.forwarded:
            self._send(held, backward=backward)
        return pb.ACCEPTED

    def cancel(self, microbatches: Iterable[tuple[bytes, int]]) -> tuple[tuple[bytes, int, float], ...]:
        """Withdraw them. Returns (id, step, loss) of those that are accumulated."""
        stands = []
        for microbatch, attempt in microbatches:
            held = self._held.get(microbatch)
            if held is not None and held.accumulated:
                stands.append((microbatch, held.step, 0.0))
                continue
            self._withdrawn[microbatch] = attempt
            if held is not None:
                held.dropped = True
                del self._held[microbatch]
        return tuple(stands)

    def release(self, microbatches: Iterable[bytes]) -> None:
        for microbatch in microbatches:
            self._withdrawn[microbatch] = EVERY_ATTEMPT
            held = self._held.pop(microbatch, None)
            if held is not None:
                held.dropped = True

        forget_oldest(self._withdrawn, REMEMBERED)

    def close(self) -> None:
        self.closed = True

    # computing

    def _enqueue(self, held: Held, backward: bool) -> None:
        (self._backwards if backward else self._forwards).append(held)
        if not self._busy:
            self.next()

    def next(self) -> None:
        """Begin what waits longest, unless something is under way."""
        self._busy = False
        while self.queue and not self.closed and not self._world.steps[self.stage].holds:
            backward = bool(self._backwards)
            held = (self._backwards or self._forwards).popleft()
            if not held.dropped:
                self._busy = True
                part = 1.0 if self._is_last else 1 - FORWARD_PART if backward else FORWARD_PART
                part *= 1 + self._world.jitter * self._world.rng.uniform(-1, 1)
                self._world.events.after(part * self.hop_s, partial(self._done, held, backward))
                return

    def _done(self, held: Held, backward: bool) -> None:
        if self.closed:
            return
        if not held.dropped:
            if not backward:
                held.forwarded = True
                self._say(held, pb.FORWARDED)
                if held.has_gradient:
                    self._enqueue(held, True)
            if backward or self._is_last:
                self._accumulate(held)
                held.sent_back = True
                if self.stage > 0:
                    self._send(held, backward=True)
            else:
                self._send(held, backward=False)
        self.next()

    def _accumulate(self, held: Held) -> None:
        if held.accumulated or self.stage in held.route.accumulated:
            return
        held.accumulated = True
        held.step = self._world.steps[self.stage].accumulate(self.name, held.route)
        self._say(held, pb.BACKWARDED)

    # saying and sending

    def _say(self, held: Held, kind: int, **more: object) -> None:
        details = {"attempt": held.route.attempt, "step": held.step} | more
        event = ev.HopEvent(self.name, kind, held.route.microbatch, **details)  # type: ignore[arg-type]
        self._world.tell(held.route.trainer, event)

    def _send(self, held: Held, *, backward: bool) -> None:
        """To the neighbour, if the route says that it waits for this."""
        route = held.route
        stage = self.stage - 1 if backward else self.stage + 1
        if (backward and stage < route.backward_until) or (not backward and stage > route.forward_until):
            return
        target = route.peers[stage]

        def answer(status: int) -> None:
            if status not in (pb.ACCEPTED, pb.DUPLICATE) and not self.closed:
                failed = {"target": target, "status": status, "backward": backward}
                self._say(held, pb.PUSH_FAILED, attempt=route.attempt, **failed)

        self._world.push(self.name, target, route, stage, backward=backward, answer=answer)
