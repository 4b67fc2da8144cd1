"""An asyncio event loop whose clock jumps: tests and simulations run in virtual time.

When no task is ready the clock advances at once to the next timer, so an hour of timeouts takes
milliseconds and the order of events depends on nothing but the program and its seeds. Threads and
sockets must not be used on such a loop. When neither a task nor a timer is left the program waits for
something that cannot come: `DeadlockError`.
"""

import asyncio
import gc
import itertools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(RuntimeError):
    """Every task waits and no timer is set: nothing can ever happen again."""


class _JumpingSelector(selectors.SelectSelector):
    """Advances the owner's clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.on_jump: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise DeadlockError("all tasks wait and no timer is set")
        if timeout > 0:
            self.on_jump()
            self.now_s += timeout
        return []


class _Task(asyncio.Task[Any]):
    """Hashed by a number instead of its address: sets of tasks, asyncio's own included, keep one order."""

    def __init__(self, *arguments: Any, number: int, **options: Any) -> None:
        self._number = number  # before the base class puts this task into a set
        super().__init__(*arguments, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its `time()` starts at 0 and moves only while every task waits."""

    def __init__(self) -> None:
        self._jumping, self._numbers = _JumpingSelector(), itertools.count()
        super().__init__(self._jumping)
        self.set_task_factory(self._numbered)

    def _numbered(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> _Task:
        return _Task(work, loop=loop, number=next(self._numbers), **options)

    def time(self) -> float:
        return self._jumping.now_s

    def before_each_jump(self, look: Callable[[], None]) -> None:
        """Call `look` whenever all that happens at one moment has happened; what it raises ends the loop."""
        self._jumping.on_jump = look


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
