"""The ledger alone: events in, commands out."""

import random

from swarm import swarm_pb2 as pb
from swarm.messages import pack_tokens
from swarm.wiring import StageWiring
from trainers.events import (
    Answered,
    Cancel,
    CancelAnswered,
    Completed,
    HopEvent,
    PeerGone,
    PeerReady,
    PushTokens,
    Release,
    Resend,
    SteppedEvent,
    Tick,
)
from trainers.ledger import Ledger

M = b"m" * 16


def make_ledger(stages=3, pool=2, **arguments):
    wirings = [StageWiring(stage=s, rng=random.Random(s), prior_cost_s=1.0) for s in range(stages)]
    defaults = {"hop_deadline_s": 10.0, "retain_until_step": False}
    ledger = Ledger(trainer="t", session=b"s" * 8, wirings=wirings, **defaults | arguments)
    for stage in range(stages):
        for number in range(pool):
            ledger.handle(PeerReady(stage, f"{stage}{'abc'[number]}", 0), 0.0)
    return ledger


def issue(ledger):
    import torch

    tokens = pack_tokens(torch.zeros(1, 5))
    (push,) = ledger.issue(M, tokens, sequences=1, evaluate=False, step=0, now_s=0.0)
    assert isinstance(push, PushTokens)
    return push.route


def say(ledger, peer, kind, now_s=1.0, **details):
    return ledger.handle(HopEvent(peer=peer, kind=kind, microbatch=M, **details), now_s)


def carry(ledger, route, *, down_to=0):
    """Report everything of a healthy pass until stage `down_to` has accumulated."""
    commands = list(ledger.handle(Answered(route.peers[0], M, route.attempt, pb.ACCEPTED, push=True), 1.0))
    for peer in route.peers[:-1]:
        commands += say(ledger, peer, pb.FORWARDED)
    for peer in reversed(route.peers[down_to:]):
        commands += say(ledger, peer, pb.BACKWARDED, loss=5.0)
    return commands


def test_a_healthy_microbatch_is_completed_and_released_at_all_its_peers():
    ledger = make_ledger()
    route = issue(ledger)
    commands = carry(ledger, route)
    assert [c for c in commands if isinstance(c, Completed)] == [Completed(M, 4, 5.0, False)]
    assert {c.peer for c in commands if isinstance(c, Release)} == set(route.peers)
    assert ledger.in_flight == 0


def test_until_the_step_nothing_is_released_before_it_is_applied():
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    assert not [c for c in carry(ledger, route) if isinstance(c, Release)]
    released = []
    for stage in range(3):
        for peer in (f"{stage}a", f"{stage}b"):
            released += ledger.handle(SteppedEvent(int(peer[0]), peer, 1, frozenset((M,))), 2.0)
    assert {c.peer for c in released if isinstance(c, Release)} == set(route.peers)
    assert ledger.unsettled == 0


def test_duplicate_and_late_events_change_nothing():
    ledger = make_ledger()
    route = issue(ledger)
    carry(ledger, route)
    for peer in route.peers:
        for kind in (pb.FORWARDED, pb.BACKWARDED, pb.ARRIVED, pb.PUSH_FAILED):
            assert not [c for c in say(ledger, peer, kind) if not isinstance(c, Release)]
    assert ledger.counters["completed"] == 1


def test_a_dead_middle_peer_is_replaced_and_its_neighbours_send_again():
    ledger = make_ledger()
    route = issue(ledger)
    say(ledger, route.peers[0], pb.FORWARDED)
    first, dead, last = route.peers
    commands = ledger.handle(PeerGone(dead), 2.0)
    resends = [c for c in commands if isinstance(c, Resend)]
    assert [(c.peer, c.backward) for c in resends] == [(first, False), (last, True)]
    new = resends[0].route
    assert new.peers[1] not in (dead,) and new.peers[0] == first and new.peers[2] == last
    assert new.attempt == 1


def test_a_dead_first_peer_gets_the_token_ids_from_the_trainer():
    ledger = make_ledger()
    route = issue(ledger)
    (push, resend) = ledger.handle(PeerGone(route.peers[0]), 2.0)
    assert isinstance(push, PushTokens) and isinstance(resend, Resend) and resend.backward


def test_neighbours_of_two_dead_peers_in_a_row_skip_the_gap():
    ledger = make_ledger()
    route = issue(ledger)
    say(ledger, route.peers[0], pb.FORWARDED)
    ledger.handle(PeerGone(route.peers[1]), 2.0)
    commands = ledger.handle(PeerGone(route.peers[2]), 2.0)
    assert [type(c) for c in commands] == [Resend]  # the new peer of stage 1 computes and pushes on
    assert not commands[0].backward


def test_a_busy_target_costs_nobody_a_ban():
    ledger = make_ledger()
    route = issue(ledger)
    target = route.peers[1]
    (cancel,) = say(ledger, route.peers[0], pb.PUSH_FAILED, target=target, status=pb.BUSY)
    assert cancel == Cancel(target, ((M, 0),)), "asked twice, it may have room the second time"
    assert say(ledger, route.peers[0], pb.PUSH_FAILED, target=target, status=pb.BUSY) == []
    commands = ledger.handle(CancelAnswered(target, ((M, 0),), ()), 1.5)
    assert commands[0].route.peers[1] != target
    assert ledger._wirings[1].choose(1) and target in ledger._wirings[1]


def test_a_lone_busy_target_is_tried_again_later():
    ledger = make_ledger(pool=1)
    route = issue(ledger)
    target = route.peers[1]
    assert say(ledger, route.peers[0], pb.PUSH_FAILED, target=target, status=pb.BUSY) == []
    assert ledger.handle(Tick(), 1.05) == []
    (again,) = ledger.handle(Tick(), 1.2)
    assert isinstance(again, Resend) and again.peer == route.peers[0]


def test_without_an_answer_the_target_is_cancelled_before_another_gets_the_hop():
    ledger = make_ledger()
    route = issue(ledger)
    target = route.peers[1]
    commands = say(ledger, route.peers[0], pb.PUSH_FAILED, target=target, status=pb.LINK)
    assert commands == [Cancel(target, ((M, 0),))]
    commands = ledger.handle(CancelAnswered(target, ((M, 0),), ()), 2.0)
    assert any(isinstance(c, Resend) and c.route.attempt == 1 for c in commands)


def test_a_cancelled_peer_that_had_accumulated_keeps_the_hop():
    ledger = make_ledger()
    route = issue(ledger)
    carry(ledger, route, down_to=2)
    slow = route.peers[1]
    cancels = ledger.handle(Tick(), 50.0)
    assert Cancel(slow, ((M, 0),)) in cancels
    commands = ledger.handle(CancelAnswered(slow, ((M, 0),), ((M, 0, 0.0),)), 51.0)
    assert not [c for c in commands if isinstance(c, Resend)]
    assert [c for c in say(ledger, route.peers[0], pb.BACKWARDED) if isinstance(c, Completed)]


def test_a_timeout_teaches_the_wiring():
    ledger = make_ledger()
    route = issue(ledger)
    ledger.handle(Answered(route.peers[0], M, 0, pb.ACCEPTED, push=True), 1.0)
    before = ledger._wirings[0]._cost_s[route.peers[0]]
    ledger.handle(Tick(), 50.0)
    assert ledger._wirings[0]._cost_s[route.peers[0]] > before


def test_a_gradient_that_died_with_its_peer_is_lost_or_computed_again():
    for retain, expected in ((False, "lost"), (True, "rerouted_hops")):
        ledger = make_ledger(retain_until_step=retain)
        route = issue(ledger)
        carry(ledger, route)
        ledger.handle(PeerGone(route.peers[1]), 2.0)
        survivor = next(p for p in ("1a", "1b") if p != route.peers[1])
        ledger.handle(SteppedEvent(1, survivor, 1, frozenset()), 3.0)
        assert ledger.counters[expected] == 1, expected


def test_a_gradient_that_is_in_the_step_survives_its_peer():
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    carry(ledger, route)
    ledger.handle(PeerGone(route.peers[1]), 2.0)
    survivor = next(p for p in ("1a", "1b") if p != route.peers[1])
    commands = ledger.handle(SteppedEvent(1, survivor, 1, frozenset((M,))), 3.0)
    assert not [c for c in commands if isinstance(c, Resend)]
    assert ledger.counters["rerouted_hops"] == ledger.counters["lost"] == 0


def test_a_microbatch_that_is_refused_everywhere_is_given_up():
    ledger = make_ledger()
    issue(ledger)
    for _ in range(20):
        flight = next(iter(ledger._flights.values()), None)
        if flight is None:
            break
        say(ledger, flight.hops[0].peer, pb.DROPPED, reason="not finite")
    assert ledger.in_flight == 0 and ledger.counters["lost"] == 1


def test_a_microbatch_is_not_given_up_because_peers_had_not_heard_of_its_trainer():
    ledger = make_ledger()
    issue(ledger)
    flight = next(iter(ledger._flights.values()))
    for _ in range(20):
        say(ledger, flight.hops[0].peer, pb.DROPPED, status=pb.STALE, reason="the trainer has not been heard")
    assert ledger.in_flight == 1 and ledger.counters["lost"] == 0


def test_a_supplier_that_supplies_nothing_is_replaced_however_often_its_neighbour_is():
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    carry(ledger, route, down_to=1)
    ledger.handle(
        PeerGone(route.peers[1]), 2.0
    )  # its gradient never reached stage 0: another one computes it
    supplier = ledger._flights[M].hops[1].peer
    ledger.handle(PeerReady(1, "1c", 0), 3.0)
    say(ledger, route.peers[0], pb.DROPPED, now_s=8.0, reason="not finite")  # stage 0 begins anew
    assert ledger.handle(Tick(), 11.9) == []
    commands = ledger.handle(Tick(), 12.6)
    assert ledger._flights[M].hops[1].peer == "1c" != supplier
    assert [type(c) for c in commands] == [Resend, Resend]  # from stages 0 and 2, what it computes from


def test_what_every_state_holds_is_never_counted_again_when_its_steps_are_no_longer_named():
    ledger = make_ledger(retain_until_step=True, pool=3)
    route = issue(ledger)
    carry(ledger, route, down_to=1)  # stage 0 still lacks its gradient
    pool = ["1a", "1b", "1c"]
    for peer in pool:
        ledger.handle(SteppedEvent(1, peer, 1, frozenset((M,))), 2.0)
    for peer in pool:  # long after, they have loaded a state anew: it tells of later steps
        ledger.handle(SteppedEvent(1, peer, 100, frozenset(), whole=True), 3.0)
    pool.remove(route.peers[1])
    ledger.handle(PeerGone(route.peers[0]), 4.0)
    ledger.handle(PeerGone(route.peers[1]), 4.0)
    for _ in pool:
        flight = ledger._flights[M]
        assert flight.route("t", b"s" * 8).accumulated == (1, 2)
        refusal = {"target": flight.peer(1), "attempt": flight.attempt, "status": pb.STALE}
        say(ledger, flight.peer(0), pb.PUSH_FAILED, 5.0, **refusal)


def test_a_stopped_peer_that_gets_a_hop_when_all_is_done_is_told_to_drop_it():
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    carry(ledger, route)
    for stage in range(3):
        for peer in (f"{stage}a", f"{stage}b"):
            ledger.handle(SteppedEvent(int(peer[0]), peer, 1, frozenset((M,))), 2.0)
    late = next(f"0{name}" for name in "ab" if f"0{name}" not in route.peers)
    told = Release(late, (M,))
    assert ledger.handle(Answered(late, M, 0, pb.ACCEPTED, push=True), 3.0) == [told]
    assert say(ledger, late, pb.ARRIVED, 3.0) == [told]
    assert say(ledger, late, pb.DROPPED, 3.0) == []


def test_a_gradient_that_was_handed_over_is_not_computed_again():
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    carry(ledger, route)
    leaver = route.peers[1]
    mate = "1b" if leaver == "1a" else "1a"
    assert say(ledger, leaver, pb.HANDED_OVER, target=mate, step=0) == []
    assert ledger.handle(PeerGone(leaver, left=True), 2.0) == []
    assert ledger.in_flight == 0 and ledger.counters["handed_over"] == 1
    again = ledger.handle(PeerGone(mate), 3.0)  # and with its new owner it is lost as ever
    ledger.handle(PeerReady(1, "1c", 0), 3.0)
    assert ledger.in_flight == 1, again


def test_a_handover_to_whom_this_trainer_does_not_know_counts_for_nothing():
    for target in ("stranger", "0a"):
        ledger = make_ledger(retain_until_step=True, strict=True)
        route = issue(ledger)
        carry(ledger, route)
        say(ledger, route.peers[1], pb.HANDED_OVER, target=target, step=0)
        ledger.handle(PeerGone(route.peers[1], left=True), 2.0)
        assert ledger.in_flight == 1 and ledger.counters["handed_over"] == 0


def test_waiting_behind_our_own_hops_does_not_make_a_peer_look_slow():
    """Two microbatches reach a peer at once; each of its four jobs takes a second, backwards first."""
    ledger = make_ledger(stages=2, pool=1)
    ids = [b"1" * 16, b"2" * 16]
    tokens = b"\0" * 4 * 5
    for microbatch in ids:
        (push,) = ledger.issue(microbatch, tokens, sequences=1, evaluate=False, step=0, now_s=0.0)
        ledger.handle(Answered("0a", microbatch, push.route.attempt, pb.ACCEPTED, push=True), 0.0)

    def tell(peer, kind, microbatch, now_s):
        ledger.handle(HopEvent(peer=peer, kind=kind, microbatch=microbatch), now_s)

    tell("0a", pb.FORWARDED, ids[0], 1.0)
    tell("1a", pb.BACKWARDED, ids[0], 1.5)  # the last stage takes half a second
    tell("0a", pb.FORWARDED, ids[1], 2.0)
    tell("1a", pb.BACKWARDED, ids[1], 2.5)
    tell("0a", pb.BACKWARDED, ids[0], 3.0)
    tell("0a", pb.BACKWARDED, ids[1], 4.0)
    first, last = (wiring._cost_s[peer] for wiring, peer in zip(ledger._wirings, ("0a", "1a"), strict=True))
    smoothing = 1 - (1 - ledger._wirings[0].smoothing) ** 2
    assert first == 1.0 + smoothing * (2.0 / 4 - 1.0)  # two seconds for four tokens
    assert abs(last - (1.0 + smoothing * (0.5 / 4 - 1.0))) < 1e-12


def test_what_is_in_flight_is_counted_however_microbatches_end():
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    assert ledger.in_flight == ledger.unsettled == 1
    carry(ledger, route)
    assert (ledger.in_flight, ledger.unsettled) == (0, 1)
    say(ledger, route.peers[1], pb.DROPPED, 2.0)  # it gives up what it had accumulated
    assert (ledger.in_flight, ledger.unsettled) == (1, 1)


def test_a_step_that_holds_a_hop_without_a_peer_leaves_it_one():
    """A route has a peer at every stage; without, the next one would stop the trainer."""
    ledger = make_ledger(pool=1, retain_until_step=True)
    carry(ledger, issue(ledger), down_to=1)
    ledger.handle(PeerGone("0a"), 2.0)
    ledger.handle(
        SteppedEvent(0, "0a", 1, frozenset([M])), 3.0
    )  # on its next watch stream: it lives after all
    ledger.handle(PeerReady(0, "0a", 1), 3.0)
    ledger.handle(PeerGone("2a"), 4.0)
    ledger.handle(Tick(), 5.0)
    commands = ledger.handle(PeerReady(2, "2b", 0), 6.0)
    (resend,) = [c for c in commands if isinstance(c, Resend)]
    assert resend.peer == "1a" and resend.route.peers == ("0a", "1a", "2b")


def test_what_waits_for_a_silent_peer_is_stuck_until_somebody_else_goes_on_with_it():
    ledger = make_ledger(verdict_s=5.0)
    route = issue(ledger)
    ledger.handle(Answered(route.peers[0], M, 0, pb.ACCEPTED, push=True), 1.0)
    ledger.handle(Tick(), 1.0)
    assert (ledger.in_flight, ledger.stuck) == (1, 0)
    ledger._wirings[1].suspend(route.peers[1], True)
    ledger.handle(Tick(), 2.0)
    assert (ledger.in_flight, ledger.stuck) == (1, 1)
    ledger.handle(PeerGone(route.peers[1], silent=True), 3.0)
    ledger.handle(Tick(), 4.0)
    assert ledger.stuck == 1, "what it did last is not known yet"
    ledger.handle(Tick(), 8.1)
    ledger.handle(Tick(), 8.2)
    assert (ledger.in_flight, ledger.stuck) == (1, 0), "another one has it"


def test_of_two_neighbours_that_fall_silent_nobody_accumulates_for_the_second_before_its_verdict():
    ledger = make_ledger(stages=4, pool=3, verdict_s=10.0)
    route = issue(ledger)
    ledger.handle(Answered(route.peers[0], M, 0, pb.ACCEPTED, push=True), 1.0)
    for peer in route.peers[:-1]:
        say(ledger, peer, pb.FORWARDED)
    say(ledger, route.peers[3], pb.BACKWARDED)
    ledger.handle(PeerGone(route.peers[2], silent=True), 2.0)
    ledger.handle(PeerGone(route.peers[1], silent=True), 2.5)
    commands = [c for now_s in (12.2, 12.6) for c in ledger.handle(Tick(), now_s)]
    routes = [c.route for c in commands if isinstance(c, Resend)]
    assert routes, "both are given to others"
    for stage in (1, 2):
        accumulate = {each.peers[stage] for each in routes if stage not in each.accumulated}
        assert len(accumulate) == 1, f"{accumulate} may all accumulate in stage {stage}"


def test_tokens_that_found_no_room_are_pushed_again_whoever_is_placed_meanwhile():
    ledger = make_ledger(stages=2, pool=1)
    ledger.handle(PeerReady(1, "1b", 0), 0.0)
    route = issue(ledger)
    assert ledger.handle(Answered("0a", M, 0, pb.BUSY, push=True), 1.0) == []  # nobody else is there
    assert ledger.counters["no_room"] == 1
    ledger.handle(PeerGone(route.peers[1]), 1.05)
    again = ledger.handle(Tick(), 1.2)
    assert [type(command) for command in again] == [PushTokens]


def test_tokens_that_are_refused_while_a_stage_has_nobody_are_pushed_again():
    ledger = make_ledger(stages=2, pool=1)
    issue(ledger)
    ledger.handle(PeerGone("1a"), 1.0)
    assert ledger.handle(Answered("0a", M, 0, pb.BUSY, push=True), 1.1) == []
    commands = ledger.handle(PeerReady(1, "1b", 0), 2.0) + ledger.handle(Tick(), 2.1)
    assert PushTokens in [type(command) for command in commands]


def test_a_promise_not_to_take_an_older_attempt_is_none_for_the_present_one():
    ledger = make_ledger(stages=3)
    route = issue(ledger)
    ledger.handle(Answered(route.peers[0], M, 0, pb.ACCEPTED, push=True), 1.0)
    say(ledger, route.peers[0], pb.FORWARDED)
    last = route.peers[2]
    (cancel,) = say(ledger, route.peers[1], pb.PUSH_FAILED, target=last, status=pb.BUSY)
    ledger.handle(PeerGone(route.peers[1]), 1.1)  # a new attempt, with the same last peer in its route
    attempt = ledger._flights[M].attempt
    assert attempt == 1 and ledger._flights[M].hops[2].peer == last
    commands = ledger.handle(CancelAnswered(last, cancel.microbatches, ()), 1.2)
    assert commands == [Cancel(last, ((M, attempt),))] and ledger._flights[M].hops[2].peer == last
    ledger.handle(CancelAnswered(last, ((M, attempt),), ()), 1.3)
    assert ledger._flights[M].hops[2].peer != last


def test_a_stage_heard_before_the_one_before_it_is_not_taken_for_infinitely_fast():
    ledger = make_ledger(stages=2, pool=1)
    issue(ledger)
    say(ledger, "1a", pb.BACKWARDED)
    assert ledger._wirings[1]._cost_s["1a"] == 1.0


def test_what_a_stages_only_peer_brings_back_is_not_computed_again_by_it_for_ever():
    """It was out of reach; all that its state holds was thought gone with it."""
    ledger = make_ledger(pool=1, retain_until_step=True)
    carry(ledger, issue(ledger))
    ledger.handle(PeerGone("0a", silent=True), 2.0)
    for stage in (1, 2):
        ledger.handle(SteppedEvent(stage, f"{stage}a", 1, frozenset((M,))), 2.5)
    ledger.handle(SteppedEvent(0, "0a", 1, frozenset((M,)), whole=True), 3.0)  # what it says first
    commands = ledger.handle(PeerReady(0, "0a", 1), 3.0)
    assert not [c for c in commands if isinstance(c, PushTokens)]
    assert ledger.unsettled == 0


def test_what_a_peer_brings_back_leaves_the_microbatch_with_a_peer_at_every_stage():
    """Another of its hops is still to be given away: its route names them all."""
    ledger = make_ledger(pool=1, retain_until_step=True)
    carry(ledger, issue(ledger), down_to=2)  # stage 2 has accumulated, the others have not
    ledger.handle(PeerGone("0a", silent=False), 2.0)
    ledger.handle(SteppedEvent(0, "0a", 1, frozenset((M,)), whole=True), 3.0)
    ledger.handle(PeerReady(0, "0a", 1), 3.0)
    ledger.handle(PeerGone("2a", silent=False), 4.0)
    commands = ledger.handle(PeerReady(2, "2a", 0), 5.0)
    routes = [command.route for command in commands if isinstance(command, Resend | PushTokens)]
    assert routes and all(route.peers == ("0a", "1a", "2a") for route in routes)
    assert all(0 in route.accumulated for route in routes), "nobody counts it again at stage 0"


def test_a_gradient_that_its_peer_gave_up_is_computed_again_when_the_state_that_held_it_is_given_up_too():
    """A stage that was lost went on in two states for a while: the one with this gradient was not kept."""
    ledger = make_ledger(retain_until_step=True)
    route = issue(ledger)
    carry(ledger, route)
    gave_up = route.peers[2]
    other = next(peer for peer in ("2a", "2b") if peer != gave_up)
    ledger.handle(SteppedEvent(2, other, 1, frozenset((M,)), whole=True), 2.0)
    assert say(ledger, gave_up, pb.DROPPED, 3.0) == [], "a living peer's state holds it"
    commands = ledger.handle(SteppedEvent(2, other, 2, frozenset(), whole=True), 4.0)
    commands += ledger.handle(SteppedEvent(2, gave_up, 2, frozenset()), 4.0)
    assert [c for c in commands if isinstance(c, Resend)], "nobody has it any more"
    assert ledger.unsettled == 1 and ledger.in_flight == 1
