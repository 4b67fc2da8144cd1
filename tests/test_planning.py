"""Predictions: who serves what, what limits a run, and what is wrong with a list of peers."""

import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from swarm.config import parse_run
from swarm.errors import UserError
from swarm.planning import loads_of, read_volunteers
from swarm.prediction import OPERATIONS, StageLoad, Volunteer, predict, utilisation
from trainers.cli import app
from trainers.simulation.links import Link
from trainers.simulation.run import Surroundings, simulate
from trainers.simulation.trace import Trace

HEADER = "name,tflops,memory_gb,up_mbit,down_mbit,availability,count\n"
FAST = Volunteer("fast", 6e12, 64e9, 1e12, 1e12)
RUN = parse_run(
    """
name: planned
model: {width: 256, layers: 4, stages: 4}
training: {sequence_tokens: 512, microbatch_sequences: 4, target_batch_tokens: 131072}
pipeline: {in_flight: 400, hop_deadline_s: 120, codec: int8}
""",
    source="planned",
)


def load(cost: float = 1e6, **more) -> StageLoad:
    return StageLoad(**{"cost": cost, "values": 1000, "up_bytes": 0.0, "down_bytes": 0.0} | more)


def test_devices_alone_limit_peers_with_unbounded_links():
    found = predict(RUN, [load(1e6), load(2e6)], [replace(FAST, name=str(i)) for i in range(6)])
    assert [len(seat.peers) for seat in found.seats] == [2, 4]
    assert found.tokens_s == pytest.approx(2 * 6e12 / OPERATIONS / 1e6)
    assert "its device" in found.limits


def test_an_uplink_limits_what_it_cannot_carry_and_averaging_takes_its_part():
    slow = [replace(FAST, name=str(i), up_bytes_s=1e4) for i in range(2)]
    alone = predict(RUN, [load(up_bytes=100.0, values=1)], slow[:1])
    assert alone.tokens_s == pytest.approx(1e4 / 100.0) and "its uplink" in alone.limits
    both = predict(RUN, [load(up_bytes=100.0, values=10_000_000)], slow)
    # Two peers move a vector of about 10 MB once per step of 131072 tokens, beside their hops.
    vector = 10_000_000 * (1 + 4 / 256)
    assert both.tokens_s == pytest.approx(2 * 1e4 / (100.0 + 2 * vector / 131072), rel=0.02)
    assert both.gigabytes_day[0] == pytest.approx(1e4 * 86400 / 1e9, rel=0.01), "the links are full"


def test_who_has_no_memory_is_left_out_and_who_has_little_gets_a_small_stage():
    small, none = replace(FAST, name="small", memory_bytes=1e6), replace(FAST, name="none", memory_bytes=1e3)
    found = predict(RUN, [load(values=1_000_000), load(values=10_000)], [FAST, small, none])
    assert [peer.name for peer in found.left_out] == ["none"]
    assert [[peer.name for peer in seat.peers] for seat in found.seats] == [["fast"], ["small"]]


def test_without_peers_for_a_stage_the_run_cannot_go():
    found = predict(RUN, [load(), load()], [FAST])
    assert not found.works and found.limits == "nobody serves it"


@pytest.mark.parametrize("seed", range(10))
def test_no_peer_sends_more_than_its_link_carries(seed):
    rng = random.Random(seed)
    peers = [
        Volunteer(str(i), rng.uniform(0.1, 8) * 1e12, 32e9, rng.uniform(1e6, 1e8), rng.uniform(1e6, 1e8))
        for i in range(rng.randint(8, 40))
    ]
    found = predict(RUN, loads_of(RUN), peers)
    assert found.works and found.tokens_s <= min(found.rates) * (1 + 1e-6)
    assert sum(len(seat.peers) for seat in found.seats) == len(peers)


def test_the_prediction_agrees_with_a_simulated_run():
    """16 equal peers in 4 stages; the simulation has queues, jitter and steps that the prediction has not."""
    up, operations_s = 5e6, 2e9
    volunteers = [Volunteer(str(i), operations_s, 1e12, up, up) for i in range(16)]
    predicted = predict(RUN, loads_of(RUN), volunteers).tokens_s
    around = Surroundings(speeds=[operations_s / OPERATIONS], trainers=1, link=Link(up, up), state_s=0.0)
    result = simulate(RUN, Trace((0.0,), (16,), 3000.0), around)
    half = [tokens for at_s, tokens in result.tokens if at_s >= 1500]
    assert (half[-1] - half[0]) / 1500 == pytest.approx(predicted, rel=0.15)


def test_the_square_cube_law():
    def busy(width: int, mbit: float) -> float:
        return utilisation(
            width=width, operations_s=4e12, bytes_s=mbit * 125_000, layers=3, codec="int8", feed_forward=2.67
        )

    assert busy(1024, 100) == pytest.approx(2 * busy(512, 100), rel=0.02), "twice the width, twice as busy"
    assert busy(512, 100) == pytest.approx(4 * busy(512, 25))
    assert busy(8192, 1000) == 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no peers: it has a header"),
        (HEADER, "no peers"),
        (HEADER + "a,fast,16,100,100,1,1", ":2: tflops: input should be a valid number"),
        (HEADER + "a,1,16,100,100,1,1\nb,1,16,-5,100,1,1", ":3: up_mbit: input should be greater than 0"),
        (HEADER + "a,1,16,100,100,1.5,1", ":2: availability"),
        (HEADER + "a,1,16,100,,1,1", ":2: column 'down_mbit' is missing"),
        (HEADER + "a,1,16,100,100,1,1,9", ":2: more fields than the header"),
        ("speed,memory_gb\n1,2", ":2: "),
        (HEADER + "a,1,16,100,100,1,100000\nb,1,16,100,100,1,1", ":3: more than 100000 peers"),
    ],
)
def test_a_bad_list_of_peers_is_refused_with_file_and_line(text, says, tmp_path):
    path = tmp_path / "peers.csv"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_volunteers(path)
    assert str(path) in str(refused.value) and says in str(refused.value)


def test_the_command_says_who_serves_what_and_what_limits_it(tmp_path):
    path = tmp_path / "peers.csv"
    path.write_text(HEADER + "t4,4,16,100,200,0.9,6\nphone,0.05,0.001,10,50,0.3,2\n")
    done = CliRunner().invoke(app, ["plan", "experiments/quickstart.yaml", "--peers", str(path)])
    assert done.exit_code == 0, done.output
    for words in ("Limited by stage", "tokens per second", "phone 1, phone 2", "other numbers of stages"):
        assert words in done.output, done.output
    few = path.with_name("few.csv")
    few.write_text(HEADER + "t4,4,16,100,200,0.9,1\n")
    done = CliRunner().invoke(app, ["plan", "experiments/quickstart.yaml", "--peers", str(few)])
    assert done.exit_code == 1 and "cannot go" in done.output
