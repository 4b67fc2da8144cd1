"""What a volunteer sees while a state is loaded."""

import io
import logging

from rich.console import Console

from swarm.donors import Loading
from swarm.loading import LoadingLines, loading_bar

MB = 1_000_000


def test_a_log_gets_a_line_every_few_seconds_with_rate_and_time_left(caplog):
    now_s = 0.0
    lines = LoadingLines(lambda: now_s)
    with caplog.at_level(logging.INFO, "swarm.loading"):
        for now_s in range(12):
            lines.show(Loading("version 7", now_s * 2 * MB, 40 * MB, donors=2))
        lines.show(Loading("step 7", MB, 2 * MB, donors=1))
    assert caplog.messages == [
        "loading version 7 from 2 donors: 10.0 of 40.0 MB, 2.0 MB/s, 15 s left",
        "loading version 7 from 2 donors: 20.0 of 40.0 MB, 2.0 MB/s, 10 s left",
    ]


def test_what_was_here_before_does_not_count_as_speed(caplog):
    now_s = 0.0
    lines = LoadingLines(lambda: now_s)
    with caplog.at_level(logging.INFO, "swarm.loading"):
        for now_s in (0, 6):
            lines.show(Loading("version 7", 30 * MB + now_s * MB, 60 * MB, donors=1))
    assert caplog.messages == ["loading version 7 from 1 donor: 36.0 of 60.0 MB, 1.0 MB/s, 24 s left"]


def test_a_terminal_gets_a_bar_with_log_lines_above_it():
    screen = io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(screen)
    root.addHandler(handler)
    try:
        with loading_bar(Console(file=screen, force_terminal=True, width=100)) as show:
            show(Loading("version 7", 10 * MB, 40 * MB, donors=2))
            assert handler.stream is not screen
            show(Loading("version 7", 40 * MB, 40 * MB, donors=2))
        assert handler.stream is screen
    finally:
        root.removeHandler(handler)
    assert "version 7 from 2 donors" in screen.getvalue() and "40.0/40.0 MB" in screen.getvalue()
