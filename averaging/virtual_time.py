"""An asyncio event loop whose clock jumps: tests and simulations run in virtual time.

When no task is ready the clock advances at once to the next timer, so an hour of timeouts takes
milliseconds and the order of events depends on nothing but the program and its seeds: timers of one time
fire as they were set. There are no threads and no sockets on such a loop. When neither a task nor a timer
is left the program waits for something that cannot come: `DeadlockError`.
"""

import asyncio
import contextvars
import gc
import heapq
import itertools
import logging
import sys
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, cast

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
log = logging.getLogger(__name__)


class DeadlockError(RuntimeError):
    """Every task waits and no timer is set: nothing can ever happen again."""


class _Task(asyncio.Task[Any]):
    """Hashed by a number instead of its address: sets of tasks, asyncio's own included, keep one order."""

    def __init__(self, *arguments: Any, number: int, **options: Any) -> None:
        self._number = number  # before the base class puts this task into a set
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._number


class _Handle:
    """Something to call, unless it is cancelled before."""

    __slots__ = ("_at_s", "arguments", "callback", "context")

    def __init__(
        self,
        callback: Callable[..., object],
        arguments: tuple[Any, ...],
        context: contextvars.Context | None,
        at_s: float,
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.arguments, self._at_s = arguments, at_s
        self.context = contextvars.copy_context() if context is None else context

    def cancel(self) -> None:
        self.callback, self.arguments = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self._at_s


class VirtualTimeLoop(asyncio.AbstractEventLoop):
    """Its `time()` starts at 0 and moves only while every task waits."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._timer_numbers, self._task_numbers = itertools.count(), itertools.count()
        self._on_jump: Callable[[], None] = lambda: None
        self._running = self._stopping = self._closed = False
        self._on_error: Callable[[Any, dict[str, Any]], object] | None = None
        self._generators: weakref.WeakSet[AsyncGenerator[Any, Any]] = weakref.WeakSet()

    def time(self) -> float:
        return self._now_s

    def before_each_jump(self, look: Callable[[], None]) -> None:
        """Call `look` whenever all that happens at one moment has happened; what it raises ends the loop."""
        self._on_jump = look

    # what is to be done

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, context, self._now_s)
        self._ready.append(handle)
        return cast(asyncio.Handle, handle)

    call_soon_threadsafe = call_soon  # a future of another kind of executor is set on this thread, too

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = _Handle(callback, args, context, when)
        heapq.heappush(self._timers, (when, next(self._timer_numbers), handle))
        return cast(asyncio.TimerHandle, handle)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> Any:
        return _Task(coro, loop=self, number=next(self._task_numbers), **options)

    # running

    def run_forever(self) -> None:
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._generators.add, finalizer=self._finalize)
        asyncio._set_running_loop(self)
        self._running, self._stopping = True, False
        try:
            while not self._stopping:
                self._run_once()
        finally:
            self._running = False
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _run_once(self) -> None:
        """All that is ready, and what that makes ready the next time."""
        ready, timers = self._ready, self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise DeadlockError("all tasks wait and no timer is set")
            if timers[0][0] > self._now_s:
                self._on_jump()
                self._now_s = timers[0][0]
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.callback is None:
                continue
            try:
                handle.context.run(handle.callback, *handle.arguments)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # one callback's, as on every loop
                self.call_exception_handler({"message": f"{handle.callback} failed", "exception": error})

    def run_until_complete(self, future: Any) -> Any:
        task = asyncio.ensure_future(future, loop=self)
        task.add_done_callback(self._stop_after)
        try:
            self.run_forever()
        finally:
            task.remove_done_callback(self._stop_after)
        return task.result()

    def _stop_after(self, done: asyncio.Future[Any]) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping = True

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """There is nothing more to see."""

    # what asyncio's runner asks at the end

    def _finalize(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators.discard(generator)
        if not self._closed:
            self.call_soon(lambda: self.create_task(generator.aclose()))

    async def shutdown_asyncgens(self) -> None:
        left = list(self._generators)
        self._generators.clear()
        await asyncio.gather(*(generator.aclose() for generator in left), return_exceptions=True)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none."""

    # errors

    def set_exception_handler(self, handler: Callable[[Any, dict[str, Any]], object] | None) -> None:
        self._on_error = handler

    def get_exception_handler(self) -> Callable[[Any, dict[str, Any]], object] | None:
        return self._on_error

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        log.error("%s", context.get("message"), exc_info=context.get("exception"))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._on_error is None:
            self.default_exception_handler(context)
        else:
            self._on_error(self, context)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in virtual time, cancel what it left behind, and return its result."""
    # Collecting a forgotten coroutine runs its `finally`: at a moment of its own, or in the next run's loop.
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main)
    finally:
        gc.enable()
        gc.collect()
