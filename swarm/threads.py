"""Threads that have ended before the interpreter does.

The interpreter takes its daemon threads by surprise when it ends: one that is in the middle of torch then
brings the whole process down ("terminate called without an active exception"). It waits for other threads for
ever. These are asked to stop, and waited for, but not for long.
"""

import atexit
import threading
import time
import weakref
from collections.abc import Callable

LIMIT_S = 10.0  # for what is being computed when the process ends

_running: "weakref.WeakSet[Worker]" = weakref.WeakSet()


class Worker(threading.Thread):
    """Runs `work` from now on; `stop` makes it return soon, and may be called more than once."""

    def __init__(self, work: Callable[[], None], *, name: str, stop: Callable[[], None]) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.stop = stop
        _running.add(self)
        self.start()


@atexit.register
def _end() -> None:
    end_s = time.monotonic() + LIMIT_S
    workers = [worker for worker in _running if worker.is_alive()]
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.join(max(0.0, end_s - time.monotonic()))
