"""How many microbatches are kept under way: simulated peers tell their queues, the throttle answers."""

from trainers.throttle import Throttle


def rounds(throttle, queues, count=30):
    """`count` rounds of completions; in each, one heartbeat per entry of `queues[peer]`, in turn."""
    for _ in range(count):
        for beat in range(4):
            for peer, depths in queues.items():
                throttle.heard(peer, depths[beat % len(depths)])
        for _ in range(int(throttle.limit) + 1):
            throttle.completed()


def test_it_grows_to_the_bound_while_queues_are_short():
    throttle = Throttle(most=24, stages=3)
    rounds(throttle, {"a": [0], "b": [1, 2]})
    assert throttle.limit == 24


def test_a_queue_that_is_long_for_a_moment_costs_nothing():
    throttle = Throttle(most=6, stages=3)
    rounds(throttle, {"a": [0, 5, 1, 4], "b": [6, 0]})
    assert throttle.limit == 6


def test_a_standing_queue_is_cut_down_to_what_keeps_every_stage_busy():
    throttle = Throttle(most=24, stages=3)
    rounds(throttle, {"a": [0], "slow": [4, 9, 5]})
    assert throttle.limit == 4


def test_it_grows_again_when_the_slow_peer_is_gone():
    throttle = Throttle(most=24, stages=3)
    rounds(throttle, {"a": [0], "slow": [9]})
    throttle.gone("slow")
    rounds(throttle, {"a": [0]})
    assert throttle.limit == 24


def test_without_heartbeats_nothing_is_concluded():
    throttle = Throttle(most=24, stages=3)
    throttle.heard("slow", 9)
    for _ in range(100):
        throttle.completed()
    assert throttle.limit > 6


def test_it_grows_in_one_round_by_as_much_as_a_stage_has_grown():
    for pool, grown in ((2, 2.0), (11, 1.1)):
        throttle = Throttle(most=400, stages=3)
        throttle.limit = 100.0
        throttle.refused()
        before = throttle.limit
        throttle.came(pool)
        for _ in range(int(before)):
            throttle.completed()
        assert before * grown * 0.85 < throttle.limit < before * grown * 1.05


def test_what_is_stuck_makes_room_for_others_up_to_a_bound():
    throttle = Throttle(most=24, stages=3)
    assert throttle.limit == 6
    assert throttle.admits(5) and not throttle.admits(6)
    assert throttle.admits(8, stuck=3) and not throttle.admits(9, stuck=3)
    assert throttle.admits(17, stuck=60) and not throttle.admits(18, stuck=60)


def test_a_large_swarm_is_filled_in_a_few_rounds():
    throttle = Throttle(most=1000, stages=4)
    rounds(throttle, {"a": [0], "b": [1]}, count=16)
    assert throttle.limit == 1000


def test_after_a_standing_queue_it_grows_slowly_again():
    throttle = Throttle(most=1000, stages=4)
    rounds(throttle, {"a": [0]}, count=8)
    rounds(throttle, {"a": [4]}, count=6)
    cut = throttle.limit
    rounds(throttle, {"a": [0]}, count=2)
    assert cut <= throttle.limit <= cut + 7
    rounds(throttle, {"a": [0]}, count=16)
    assert throttle.limit == 1000


def test_a_peer_without_room_cuts_at_once_and_once_a_round():
    throttle = Throttle(most=1000, stages=4)
    rounds(throttle, {"a": [0]}, count=16)
    for _ in range(50):
        throttle.refused()
    assert throttle.limit == 750
    rounds(throttle, {"a": [0]}, count=1)
    throttle.refused()
    assert throttle.limit < 600
