"""The one thread that owns torch: jobs by priority, with hops that can be held back while a step closes.

`Compute` is the seam; `ComputeThread` is the real one, `VirtualCompute` its twin in virtual time. A job
that has not started can be cancelled; one that has started runs to its end.
"""

import asyncio
import concurrent.futures
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import torch

from swarm.threads import Worker

T = TypeVar("T")
MOST_OWED_S = 60.0  # of rest, by steps


class Priority(IntEnum):
    STEP = 0  # freeze, apply, snapshot
    BACKWARD = 1  # before forwards: it frees memory and feeds the stage before
    FORWARD = 2
    EVALUATE = 3


class Compute(Protocol):
    def submit(self, priority: Priority, work: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Queue `work`; await its future with `asyncio.wrap_future`."""
        ...

    def hold(self, held: bool) -> None:
        """While held, hops wait; steps go on."""
        ...

    @property
    def queued(self) -> int: ...

    @property
    def busy_s(self) -> float:
        """Seconds for which it has computed hops, or rested from them."""
        ...

    def close(self) -> None: ...


async def between_hops(compute: Compute, work: Callable[[], T]) -> T:
    """Do `work` on the stage before any hop that waits: freeze, apply, snapshot."""
    return await asyncio.wrap_future(compute.submit(Priority.STEP, work))


class _Queue:
    """Jobs by priority, first come first served within one."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, concurrent.futures.Future[Any], Callable[[], Any]]] = []
        self._order = itertools.count()
        self.held = False

    def push(self, priority: Priority, future: "concurrent.futures.Future[T]", work: Callable[[], T]) -> None:
        heapq.heappush(self._heap, (priority, next(self._order), future, work))

    def pop(
        self, *, resting: bool = False
    ) -> tuple[Priority, "concurrent.futures.Future[Any]", Callable[[], Any]] | None:
        """The next job that may run now and was not cancelled; it counts as started."""
        while self._heap and not ((self.held or resting) and self._heap[0][0] > Priority.STEP):
            priority, _, future, work = heapq.heappop(self._heap)
            if future.set_running_or_notify_cancel():
                return Priority(priority), future, work
        return None

    def __len__(self) -> int:
        return len(self._heap)


def _run(future: "concurrent.futures.Future[Any]", work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # belongs to whoever awaits the job
        future.set_exception(error)


def spread_over(cores: int) -> None:
    """Let what this thread computes take `cores` cores; other threads keep theirs."""
    torch.get_num_threads()  # the first use settles a thread's number: let it be before
    torch.set_num_threads(cores)


class ComputeThread:
    """Jobs run one after the other in a thread of their own, which torch spreads over `threads` cores."""

    def __init__(self, threads: int, *, device_share: float = 1.0, elsewhere: bool = False) -> None:
        """`device_share`: the part of the time for which it may compute. It rests after every hop; a step,
        for which others wait, is done at once, and rested for after later hops. `elsewhere`: on no CPU."""
        self._threads, self._elsewhere = threads, elsewhere
        self._rest_per_s = 1 / device_share - 1
        self._rested_s = self._owed_s = 0.0  # when hops may go on; what has not been rested for yet
        self.busy_s = 0.0
        self._queue, self._changed, self._closed = _Queue(), threading.Condition(), False
        Worker(self._loop, name="compute", stop=self.close)

    def submit(self, priority: Priority, work: Callable[[], T]) -> "concurrent.futures.Future[T]":
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._changed:
            self._queue.push(priority, future, work)
            self._changed.notify()
        return future

    def hold(self, held: bool) -> None:
        with self._changed:
            self._queue.held = held
            self._changed.notify()

    @property
    def queued(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        """Stop after the running job; what is queued never runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _loop(self) -> None:
        spread_over(self._threads)
        while True:
            with self._changed:
                job = None
                while job is None and not self._closed:
                    rest_s = self._rested_s - time.perf_counter()
                    job = self._queue.pop(resting=rest_s > 0)
                    if job is None:
                        self._changed.wait(rest_s if rest_s > 0 else None)
                if job is None or self._closed:
                    return
            began_s, cpu_s, priority = time.perf_counter(), time.thread_time(), job[0]
            _run(*job[1:])
            job = None  # its results must not live until the next one comes
            ended_s = time.perf_counter()
            # What other programs took of the cores meanwhile is nothing to rest from.
            used_s = ended_s - began_s if self._elsewhere else time.thread_time() - cpu_s
            owes_s = used_s * self._rest_per_s
            if priority is Priority.STEP:
                self._owed_s = min(MOST_OWED_S, self._owed_s + owes_s)
                continue
            later_s = min(self._owed_s, owes_s)  # however much steps owe: hops go on, at half of the share
            self._owed_s -= later_s
            self._rested_s = ended_s + owes_s + later_s
            self.busy_s += ended_s - began_s + owes_s + later_s


class VirtualCompute:
    """Runs jobs on the event loop, each after `seconds(priority)` of virtual time."""

    def __init__(self, seconds: Callable[[Priority], float], *, stopped: Callable[[], bool] = lambda: False):
        self._queue, self._seconds, self._stopped = _Queue(), seconds, stopped
        self.busy_s = 0.0
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._loop())

    def submit(self, priority: Priority, work: Callable[[], T]) -> "concurrent.futures.Future[T]":
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._queue.push(priority, future, work)
        self._changed.set()
        return future

    def hold(self, held: bool) -> None:
        self._queue.held = held
        self._changed.set()

    @property
    def held(self) -> bool:
        return self._queue.held

    @property
    def queued(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        self._task.cancel()

    async def _loop(self) -> None:
        while True:
            job = self._queue.pop()
            if job is None:
                self._changed.clear()
                await self._changed.wait()
                continue
            priority, future, work = job
            took_s = self._seconds(Priority.FORWARD)
            await asyncio.sleep(took_s)
            if priority is not Priority.STEP:
                self.busy_s += took_s
            while self._stopped():  # noqa: ASYNC110 - a stopped process is polled, in virtual time
                await asyncio.sleep(0.05)
            _run(future, work)
