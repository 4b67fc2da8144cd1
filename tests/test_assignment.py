"""Which stage a newcomer takes."""

import torch

from swarm.assignment import choose_stage, seats_of
from swarm.model import build_stage, stage_costs
from swarm.rebalance import Doing
from swarm.records import PeerRecord
from tests.sim import tiny_run


def roster(stage: int, *speeds: float, loading: bool = False, helpers: int = 0) -> list[PeerRecord]:
    peers = [
        PeerRecord(peer=f"s{stage}{loading}{number}", stage=stage, speed=speed, loading=loading)
        for number, speed in enumerate(speeds)
    ]
    return peers + [
        PeerRecord(peer=f"s{stage}h{n}", stage=stage, aggregates_only=True) for n in range(helpers)
    ]


def test_a_newcomer_takes_a_stage_without_peers_first():
    assert choose_stage([roster(0, 5.0), roster(1, helpers=2), roster(2, 1.0)], [1.0] * 3) == (
        1,
        "it has no peer",
    )


def test_a_newcomer_takes_the_stage_that_is_weakest_for_what_it_costs():
    rosters = [roster(0, 4.0, 4.0), roster(1, 9.0), roster(2, 4.0, 4.0, 4.0)]
    assert choose_stage(rosters, [1.0] * 3)[0] == 0
    stage, reason = choose_stage(rosters, [1.0, 1.0, 2.0])
    assert (stage, reason) == (2, "the weakest, with 3 peers and 67% of the strongest one")


def test_newcomers_at_once_spread_as_those_who_still_load_count_too():
    rosters = [roster(0, 1.0), roster(1, 1.0), [*roster(2, 1.0), *roster(2, 0.0, loading=True)]]
    rosters[0] += roster(0, 0.0, loading=True)
    assert choose_stage(rosters, [1.0] * 3)[0] == 1


def test_who_has_not_measured_itself_counts_as_usual_and_nobody_as_huge():
    seats = seats_of([roster(0, 2.0, 4.0, 0.0, 1e17), roster(1, 3.0)])
    assert [seat.speed for seat in seats] == [2.0, 4.0, 3.5, 35.0, 3.0]


def test_who_has_just_moved_counts_where_it_was_announced_last():
    old = PeerRecord(peer="mover", stage=0, speed=2.0, heading=1, announced_s=5.0)
    new = PeerRecord(peer="mover", stage=1, announced_s=6.0)
    (seat,) = seats_of([[old], [new]])
    assert (seat.stage, seat.doing) == (1, Doing.SERVES)
    (seat,) = seats_of([[PeerRecord(peer="loaded", stage=0, queue=7)]])
    assert seat.load == 7
    (seat,) = seats_of([[old], []])
    assert (seat.stage, seat.doing) == (1, Doing.MOVES)


def test_costs_are_the_values_of_a_stages_matrices_without_its_embedding():
    config = tiny_run("model.stages=2", "model.layers=3").model
    costs = stage_costs(config)
    for stage, cost in enumerate(costs):
        module = build_stage(config, stage, seed=0)
        matrices = {n: p for n, p in module.named_parameters() if p.ndim > 1 and "embed" not in n}
        assert cost == sum(p.numel() for p in matrices.values())
    assert torch.device("meta") != next(build_stage(config, 0, seed=0).parameters()).device
