"""What is believed of links, and what comes of it."""

import pytest

from averaging import wire
from averaging.averager import Averager
from averaging.bandwidth import LEAST_BYTES, UplinkMeter, levelled
from averaging.errors import ProtocolError
from averaging.memory_network import MemoryHub
from averaging.plan import Pass, Report, StepRules, make_plan
from averaging.round import SMALL_PIECE_VALUES, first_round
from averaging.shares import Mode

MB = 1 << 20


def sent(meter: UplinkMeter, megabytes: int, seconds: float, *, at_s: float = 0.0) -> None:
    meter.begin(at_s)
    meter.end(megabytes * MB, at_s + seconds)
    meter.conclude()


def test_what_the_user_says_is_not_believed_beyond_what_was_measured():
    meter = UplinkMeter(100.0 * MB)
    assert meter.reported == 100 * MB
    sent(meter, 20, 2.0)
    assert meter.reported == pytest.approx(10 * MB)
    modest = UplinkMeter(1.0 * MB)
    sent(modest, 20, 2.0)
    assert modest.reported == MB, "somebody may want to give less than the link has"


def test_a_meter_counts_the_time_in_which_anything_is_on_its_way():
    meter = UplinkMeter(1e12)
    meter.begin(0.0)
    meter.begin(1.0)  # two at once, then a pause
    meter.end(4 * MB, 2.0)
    meter.end(4 * MB, 4.0)
    sent(meter, 8, 4.0, at_s=100.0)
    assert meter.reported == pytest.approx(2 * MB)


def test_little_data_measures_nothing():
    meter = UplinkMeter(5.0 * MB)
    meter.begin(0.0)
    meter.end(LEAST_BYTES // 2, 10.0)
    meter.conclude()
    assert meter.measured == 0


def test_a_process_that_was_stopped_while_it_sent_does_not_take_its_link_for_slow():
    meter = UplinkMeter(1e12)
    for seconds in (2.0, 2.0, 20.0):
        sent(meter, 20, seconds)
    assert meter.reported == pytest.approx(10 * MB)
    for _ in range(2):
        sent(meter, 20, 10.0)
    assert meter.reported == pytest.approx(2 * MB), "it is slow by now"


def test_what_did_not_arrive_measures_nothing():
    meter = UplinkMeter(1e12)
    meter.begin(0.0)
    meter.begin(0.0)
    meter.end(10 * MB, 1.0)
    meter.end(0, 20.0)  # to one that has stopped
    meter.conclude()
    assert meter.measured == 0
    sent(meter, 20, 2.0, at_s=30.0)
    assert meter.reported == pytest.approx(10 * MB)


def test_unknown_links_count_as_usual_near_ones_as_equal_and_claims_are_capped():
    assert levelled([0, 0, 0]) == [1, 1, 1]
    assert levelled([10, 12, 14, 0]) == [1, 1, 1, 1]
    assert levelled([10, 10, 40, 0]) == [10, 10, 40, 10]
    assert levelled([10, 10, 1e12]) == [10, 10, 100]


def test_over_links_known_to_be_slow_pieces_are_small():
    for rates, slow in (([0, 0, 0], False), ([0, 2.5e6, 1e9], True), ([1e9, 1e9, 0], False)):
        reports = {f"p{i}": Report(1.0, bytes(8), (Pass(4_000_000),), rate) for i, rate in enumerate(rates)}
        rules = StepRules(target=1, max_weight=10)
        made = make_plan(step=0, coordinator="p0", reports=reports, nonce=b"n", rules=rules)
        plan = wire.plan_of(wire.plan_message(made), "p0", rules)
        assert plan == made and plan.slow_links is slow
        work = first_round(plan, "p0", 0, rules=rules).work
        largest = max(len(piece) for each in work.values() for piece in each.pieces)
        assert largest == (SMALL_PIECE_VALUES if slow else rules.piece_values) < 4_000_000 // 3


def test_a_plan_gives_the_fast_peer_nearly_all_of_the_reducing():
    reports = {f"p{i}": Report(1.0, bytes(8), (Pass(600_000),), 10.0 if i else 100.0) for i in range(6)}
    rules = StepRules(target=1, max_weight=10)
    plan = make_plan(step=0, coordinator="p0", reports=reports, nonce=b"n", rules=rules)
    work = first_round(plan, "p0", 0, rules=rules).work
    reduced = {peer: sum(len(piece) for piece in each.pieces) for peer, each in work.items()}
    assert reduced["p0"] > 0.95 * 600_000 and sum(reduced.values()) == 600_000


def test_clients_reduce_nothing_and_auxiliaries_do_although_they_bring_nothing():
    modes = {"a": Mode.MEMBER, "b": Mode.CLIENT, "c": Mode.AUXILIARY}
    reports = {peer: Report(1.0, bytes(8), (Pass(9000),), 1.0, mode) for peer, mode in modes.items()}
    reports["c"] = Report(0.0, bytes(8), (), 1.0, Mode.AUXILIARY)
    rules = StepRules(target=1, max_weight=10)
    plan = make_plan(step=0, coordinator="a", reports=reports, nonce=b"n", rules=rules)
    round_ = first_round(plan, "a", 0, rules=rules)
    assert "b" not in round_.work and round_.work["c"].pieces
    assert round_.speakers == round_.receivers == {"a", "b"}


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_none_is_refused(wrong):
    message = wire.report_message(0, Report(1.0, bytes(8), (Pass(10),), wrong))
    with pytest.raises(ProtocolError):
        wire.report_of(message, "p")
    with pytest.raises(ValueError, match="bandwidth"):
        Averager(MemoryHub().network("a"), peers=list, target=1.0, bandwidth=wrong)
