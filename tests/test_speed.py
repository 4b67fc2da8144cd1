import random

import pytest

from swarm.speed import ENOUGH_S, WINDOW_S, SpeedMeter


def test_the_speed_is_that_of_computing_and_counts_once_enough_is_known():
    meter = SpeedMeter(cost=100.0)
    meter.observe(10, ENOUGH_S / 2)
    assert meter.announced == 0
    meter.observe(10, ENOUGH_S / 2)  # it had nothing to do
    assert meter.announced == 0
    meter.observe(40, 2 * ENOUGH_S)
    assert meter.announced == pytest.approx(20 / ENOUGH_S * 100, rel=0.02)


def test_noise_is_not_announced_and_a_real_change_is():
    rng, meter, tokens, busy_s = random.Random(0), SpeedMeter(cost=1.0), 0.0, 0.0
    announced = set()
    for second in range(1000):
        tokens, busy_s = tokens + rng.uniform(5, 15) * (1 if second < 500 else 3), busy_s + 1
        meter.observe(tokens, busy_s)
        if second in (499, 999):
            announced.add(round(meter.announced / 10))
        if second == 100:
            early = meter.announced
        if second == 499:
            assert meter.announced == early
    assert announced == {1, 3} or announced == {1, 2, 3}


def test_old_times_are_forgotten():
    meter = SpeedMeter(cost=1.0)
    meter.observe(1000, 100)
    meter.observe(1000 + 40 * 5 * WINDOW_S, 100 + 5 * WINDOW_S)
    assert meter.announced == pytest.approx(40, rel=0.01)
