"""Shows a volunteer how far the loading of a state is: a bar in a terminal, else a line now and then.

I/O: stderr.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from swarm.donors import Loading

LINE_S = 5.0  # between two lines
log = logging.getLogger(__name__)


class LoadingLines:
    """For logs: a line every few seconds of a transfer that takes longer."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what, self._before_bytes = "", 0
        self._began_s, self._said_s = 0.0, 0.0

    def show(self, loading: Loading) -> None:
        now_s = self._clock()
        if loading.what != self._what:
            self._what, self._began_s, self._said_s = loading.what, now_s, now_s
            self._before_bytes = loading.received_bytes
        if now_s - self._said_s >= LINE_S:
            self._said_s = now_s
            new_bytes = loading.received_bytes - self._before_bytes
            log.info("%s", line_of(loading, new_bytes, now_s - self._began_s))


def line_of(loading: Loading, new_bytes: int, took_s: float) -> str:
    """How far it is, how fast, and how long it will take."""
    rate = new_bytes / took_s
    left = loading.size_bytes - loading.received_bytes
    ends = f", {left / rate:.0f} s left" if rate > 0 else ""
    done = f"{loading.received_bytes / 1e6:.1f} of {loading.size_bytes / 1e6:.1f} MB"
    return f"loading {_what(loading)}: {done}, {rate / 1e6:.1f} MB/s{ends}"


def _what(loading: Loading) -> str:
    return f"{loading.what} from {loading.donors} donor{'s' * (loading.donors != 1)}"


@contextlib.contextmanager
def loading_bar(console: Console) -> Iterator[Callable[[Loading], None]]:
    """For terminals; gone at the end. What is logged meanwhile stands above it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress,
        _logging_to_present_stderr(),
    ):
        task = progress.add_task("", visible=False)
        shown = ""

        def show(loading: Loading) -> None:
            nonlocal shown
            if loading.what != shown:
                shown = loading.what
                progress.reset(task, total=loading.size_bytes, visible=True)
            progress.update(task, completed=loading.received_bytes, description=_what(loading))

        yield show


@contextlib.contextmanager
def shown_loading() -> Iterator[Callable[[Loading], None]]:
    """What to call with every `Loading`; the bar is there until the context ends, lines come also later."""
    console, lines = Console(stderr=True), LoadingLines()
    show: Callable[[Loading], None] = lines.show
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            show = stack.enter_context(loading_bar(console))
        yield lambda loading: show(loading)
    show = lines.show


@contextlib.contextmanager
def _logging_to_present_stderr() -> Iterator[None]:
    """Handlers keep the stderr that they were made with; a bar puts one of its own in its place."""
    handlers = [h for h in logging.getLogger().handlers if type(h) is logging.StreamHandler]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
