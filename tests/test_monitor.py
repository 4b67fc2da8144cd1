"""What the organizer makes of the metrics it is sent."""

from swarm.monitor import Monitor
from tests.sim import tiny_run


def test_a_state_unlike_that_of_its_stage_mates_is_counted_once_and_told(tmp_path, caplog):
    monitor = Monitor(tiny_run(), tmp_path)

    def push(peer, version, state):
        monitor.take(peer, {"kind": "peer", "name": peer, "stage": 0, "version": version, "hash": state})

    for version, state in ((1, "aa"), (2, "bb")):
        for peer in ("one", "two"):
            push(peer, version, state)
    assert monitor.drift == 0
    with caplog.at_level("WARNING", logger="swarm.monitor"):
        for _ in range(3):
            push("one", 3, "cc")
            push("two", 3, "dd")
    assert monitor.drift == 1 and "version 3: one and two hold different states" in caplog.text
