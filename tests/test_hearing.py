"""What a trainer hears of its peers, alone."""

from trainers.hearing import Hearing


def make_hearing():
    hearing = Hearing(heartbeat_s=0.5, expire_s=10.0)
    hearing.beat(0, "a", 5, 0.0)
    hearing.beat(0, "b", 5, 0.0)
    hearing.beat(1, "c", 9, 0.0)
    return hearing


def test_a_peer_is_behind_once_its_stage_is_two_steps_further():
    hearing = make_hearing()
    hearing.beat(0, "a", 6, 0.5)
    assert not hearing.is_behind("b"), "a step has just closed"
    hearing.beat(0, "a", 7, 1.0)
    assert hearing.is_behind("b") and not hearing.is_behind("a") and not hearing.is_behind("c")
    hearing.beat(0, "b", 7, 1.5)
    assert not hearing.is_behind("b")


def test_nobody_is_behind_because_one_of_several_says_so():
    hearing = make_hearing()
    hearing.beat(0, "d", 5, 0.0)
    hearing.beat(0, "a", 1000, 0.5)
    assert not hearing.is_behind("b") and not hearing.is_behind("d")
    hearing.beat(0, "d", 1000, 0.5)
    assert hearing.is_behind("b")


def test_nobody_is_behind_one_that_is_not_heard_any_more():
    hearing = make_hearing()
    hearing.beat(0, "a", 9, 0.5)
    assert hearing.is_behind("b")
    hearing.missed("a", 2.4)
    assert hearing.is_behind("b"), "it has been silent for less than four heartbeats"
    hearing.missed("a", 2.5)
    assert not hearing.is_behind("b") and hearing.newest(0) == 5
    hearing.beat(0, "a", 9, 3.0)
    assert hearing.is_behind("b")
    hearing.gone("a", 4.0, left=True)
    assert not hearing.is_behind("b")


def test_mates_are_told_of_the_silent_for_as_long_as_anybody_may_have_them_on_a_roster():
    hearing = make_hearing()
    hearing.missed("a", 2.0)
    assert hearing.silent_mates("b", 3.0) == ["a"] and hearing.silent_mates("c", 3.0) == []
    hearing.gone("a", 3.0, left=False)
    assert hearing.silent_mates("b", 21.9) == ["a"], "watched no more"
    assert hearing.silent_mates("b", 22.1) == []


def test_mates_are_told_of_one_that_refuses_a_dial_but_not_of_one_that_said_goodbye():
    hearing = make_hearing()
    hearing.gone("a", 1.0, left=False)
    assert hearing.silent_mates("b", 1.0) == ["a"] and hearing.newest(0) == 5
    hearing.beat(0, "a", 6, 2.0)
    assert hearing.silent_mates("b", 2.0) == [], "it is there again"
    hearing.gone("a", 3.0, left=True)
    assert hearing.silent_mates("b", 3.0) == []
