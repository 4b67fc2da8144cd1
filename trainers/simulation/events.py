"""The clock of a simulation: a heap of what is to happen, in order of time."""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(order=True, slots=True)
class Event:
    """Something to happen; `cancelled` ones do not."""

    at_s: float
    number: int
    action: Callable[[], None] = field(compare=False)
    cancelled: bool = field(default=False, compare=False)


class Events:
    """Runs actions in order of time; equal times in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, action: Callable[[], None]) -> Event:
        return self.at(self.now_s + seconds, action)

    def at(self, at_s: float, action: Callable[[], None]) -> Event:
        event = Event(at_s, next(self._numbers), action)
        heapq.heappush(self._heap, (event.at_s, event.number, event))
        return event

    def run_until(self, end_s: float) -> None:
        """Let everything before `end_s` happen."""
        heap = self._heap
        while heap and heap[0][0] < end_s:
            at_s, _, event = heapq.heappop(heap)
            if not event.cancelled:
                self.now_s = at_s
                event.action()
        self.now_s = max(self.now_s, end_s)
