import random
from collections import Counter
from itertools import pairwise

import pytest

from swarm.errors import NoPeersError
from swarm.wiring import StageWiring


def make_wiring(seed: int = 0, smoothing: float = 1.0, **cost_s: float) -> StageWiring:
    """A pool whose peers have each answered once, taking `cost_s` seconds per token."""
    wiring = StageWiring(stage=1, rng=random.Random(seed), prior_cost_s=1.0, smoothing=smoothing)
    for peer, cost in cost_s.items():
        wiring.add(peer)
        wiring.observe(peer, tokens=1, elapsed_s=cost)
    return wiring


def test_peers_serve_in_proportion_to_their_speed():
    wiring = make_wiring(fast=1.0, slow=3.0)
    served = Counter(wiring.choose(8) for _ in range(400))
    assert served["fast"] == pytest.approx(300, abs=1)


def test_big_microbatches_count_as_more_work():
    wiring = make_wiring(a=1.0, b=1.0)
    first = wiring.choose(10)
    assert all(wiring.choose(1) != first for _ in range(9))


def test_slow_peer_is_interleaved_not_starved():
    wiring = make_wiring(fast=1.0, slow=3.0)
    order = [wiring.choose(1) for _ in range(400)]
    turns = [i for i, peer in enumerate(order) if peer == "slow"]
    assert max(b - a for a, b in pairwise(turns)) <= 7


def test_newcomer_gets_no_burst():
    wiring = make_wiring(old=1.0)
    for _ in range(1000):
        wiring.choose(1)
    wiring.add("new")
    served = Counter(wiring.choose(1) for _ in range(100))
    assert served["new"] == pytest.approx(50, abs=1)


def test_known_peer_keeps_its_measured_cost_when_it_announces_again():
    wiring = make_wiring(a=1.0, b=3.0)
    wiring.add("b")
    served = Counter(wiring.choose(1) for _ in range(400))
    assert served["a"] == pytest.approx(300, abs=1)


def test_removed_peer_is_never_chosen():
    wiring = make_wiring(a=1.0, b=1.0)
    wiring.remove("a")
    assert {wiring.choose(1) for _ in range(20)} == {"b"}


def test_empty_pool_raises_no_peers():
    with pytest.raises(NoPeersError, match="stage 1"):
        make_wiring().choose(1)


def test_trainers_that_start_together_open_with_different_peers():
    first = Counter(make_wiring(seed, a=1.0, b=1.0).choose(1) for seed in range(200))
    assert min(first["a"], first["b"]) > 60


def test_observed_slowdown_shifts_load_away():
    wiring = make_wiring(smoothing=0.2, a=1.0, b=1.0)
    for _ in range(50):
        wiring.observe("a", tokens=4, elapsed_s=12.0)
    served = Counter(wiring.choose(1) for _ in range(400))
    assert served["b"] == pytest.approx(300, abs=2)


def test_late_reply_of_a_removed_peer_is_ignored():
    wiring = make_wiring(a=1.0, b=1.0)
    wiring.remove("a")
    wiring.observe("a", tokens=1, elapsed_s=1.0)
    assert wiring.choose(1) == "b"


def test_ban_doubles_with_every_failure_and_ends():
    wiring = make_wiring(a=1.0, b=1.0)
    lengths = []
    for _ in range(4):
        wiring.add("a")
        wiring.ban("a", now_s=100.0)
        assert "a" not in wiring
        lengths.append(next(t for t in range(1, 1000) if not wiring.is_banned("a", 100.0 + t)))
    assert lengths == [1, 2, 4, 8]


def test_success_clears_the_record_of_failures():
    wiring = make_wiring(a=1.0, b=1.0)
    for _ in range(5):
        wiring.add("a")
        wiring.ban("a", now_s=0.0)
    wiring.add("a")
    wiring.observe("a", tokens=1, elapsed_s=1.0)
    wiring.ban("a", now_s=0.0)
    assert not wiring.is_banned("a", now_s=1.0)


def test_bad_link_bans_the_pair_not_the_peer():
    wiring = make_wiring(a=1.0, b=1.0)
    wiring.ban_link("x", "a", now_s=0.0)
    assert {wiring.choose(1, now_s=1.0, source="x") for _ in range(20)} == {"b"}
    assert {wiring.choose(1, now_s=1.0, source="y") for _ in range(40)} == {"a", "b"}


def test_avoided_and_suspended_peers_are_taken_only_when_nobody_else_is_left():
    wiring = make_wiring(a=1.0, b=1.0)
    wiring.suspend("a", True)
    assert {wiring.choose(1) for _ in range(20)} == {"b"}
    assert {wiring.choose(1, avoid={"b"}) for _ in range(20)} == {"b"}  # silent is worse than avoided
    wiring.remove("b")
    assert wiring.choose(1, avoid={"a"}) == "a"


def test_a_newcomer_is_taken_for_as_fast_as_the_others():
    wiring = make_wiring(a=4.0, b=4.0, c=4.0)
    wiring.add("new")
    served = Counter(wiring.choose(1) for _ in range(400))
    assert served["new"] == pytest.approx(100, abs=1)


def test_bad_links_are_forgotten_when_their_ban_ends():
    wiring = make_wiring(a=1.0, b=1.0)
    for at_s in range(1000):
        wiring.ban_link(f"source{at_s}", "a", float(at_s))
    assert len(wiring._bad_links) < 20
