"""What the organizer makes of the metrics it is sent."""

import pytest

from swarm.model import stage_costs
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


def test_the_prediction_is_what_the_weakest_stage_computes(tmp_path):
    monitor = Monitor(config := tiny_run(), tmp_path)
    costs = stage_costs(config.model)

    def push(peer, stage, speed, state="aa"):
        values = {"kind": "peer", "name": peer, "stage": stage, "version": 1, "hash": state, "speed": speed}
        monitor.take(peer, values)

    assert monitor.predicted_tokens_s() == 0
    push("one", 0, 10 * costs[0])
    push("helper", 1, 0.0, state="")
    assert monitor.predicted_tokens_s() == 0, "nobody serves the other stages"
    push("two", 1, 6 * costs[1])
    push("three", 2, 9 * costs[2])
    assert monitor.predicted_tokens_s() == pytest.approx(6)
    push("new", 1, 0.0)
    usual = sorted([10 * costs[0], 6 * costs[1], 9 * costs[2]])[1]
    assert monitor.predicted_tokens_s() == pytest.approx(min(9, 10, 6 + usual / costs[1]))


def test_a_restarted_organizer_counts_the_speed_from_what_trainers_had_done(tmp_path, monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr("swarm.monitor.time.time", lambda: now_s[0])
    monitor = Monitor(tiny_run(), tmp_path)
    values = {"kind": "trainer", "step": 50, "evaluations": [], "recoveries": [], "finished": False}
    for tokens in (50_000, 51_000, 52_000):
        monitor.take("trainer", {**values, "counters": {}, "tokens": tokens})
        now_s[0] += 10
        assert monitor.record(0)["speed/tokens_per_s"] <= 100
    assert monitor.summary([])["tokens_per_s"] == 100
