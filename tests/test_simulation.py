"""The simulation: traces, the best assignment, fleets, data paths; by hand and against the real protocol."""

import random
from collections import Counter
from itertools import product

import pytest
from typer.testing import CliRunner

from averaging import virtual_time
from swarm.config import RunConfig, parse_run
from swarm.errors import UserError
from tests.sim import Sim, tiny_run
from trainers.cli import app
from trainers.simulation.links import Link
from trainers.simulation.optimum import best_assignment
from trainers.simulation.run import Simulation, Surroundings, simulate
from trainers.simulation.trace import Trace, parse_trace, synthetic_trace

TOKENS = 2048  # of a microbatch


def run_of(stages: int, *overrides: str) -> RunConfig:
    text = f"""
name: simulated
model: {{layers: {stages}, stages: {stages}, width: 256}}
training: {{sequence_tokens: 512, microbatch_sequences: 4, target_batch_tokens: {64 * TOKENS}}}
pipeline: {{in_flight: 400, hop_deadline_s: 60, retain_until: step}}
"""
    return parse_run(text, source="simulated", overrides=list(overrides))


def surroundings(stages: int, **more) -> Surroundings:
    """Hops take two seconds, loading a state ten."""
    return Surroundings(**{"speeds": [TOKENS / 2.0], "costs": [1.0] * stages, "state_s": 10.0} | more)


# ---- traces


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "t.csv: no rows"),
        ("\n\n", "t.csv: no rows"),
        ("0,4\n10,-1", "t.csv:2: instances -1"),
        ("0,4\n10,999999", "t.csv:2: instances 999999"),
        ("0,4\n10,4.5", "t.csv:2: instances '4.5' is not a whole number"),
        ("0,4\n20,4\n10,4", "t.csv:3: time goes back from 20 s to 10 s"),
        ("0,4\nnan,4", "t.csv:2: time nan"),
        ("-5,4\n10,4", "t.csv:1: time -5"),
        ("zero,4", "t.csv:1: time 'zero' is not a number"),
        ("0,4,1", "t.csv:1: '0,4,1' is not `time,instances`"),
        ("7,4\n7,3", "t.csv: all rows are of the same time"),
    ],
)
def test_a_bad_trace_is_refused_with_file_and_line(text, says):
    with pytest.raises(UserError) as refused:
        parse_trace(text, source="t.csv")
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_trace_is_a_step_function_from_its_first_row_on():
    trace = parse_trace("1,0\n2,0\n2,4\n\n3,4\n3,1\n5,1\n", source="t.csv", unit="hours")
    assert list(trace.changes()) == [(3600.0, 4), (7200.0, -3)]
    assert trace.end_s == 4 * 3600


def test_synthetic_traces_have_the_habits_of_the_traces_they_are_fitted_to():
    """Between the two: 12 T4 for the 18.5 h after their first, 1.89 preemptions per hour of 2.4 machines, all
    there for 73 % of the time; 16 K80 for 89 h, 1.26 per hour of 1.6, all there for 82 %."""
    drops, machines, hours, complete = 0, 0, 0.0, 0.0
    for seed in range(60):
        trace = synthetic_trace(hours=48, wanted=14, rng=random.Random(seed))
        assert min(trace.counts) >= 0 and max(trace.counts) == 14
        sizes = [-change for _, change in trace.changes() if change < 0]
        drops, machines, hours = drops + len(sizes), machines + sum(sizes), hours + 48
        ends = [*trace.times_s[1:], trace.end_s]
        spans = zip(trace.times_s, ends, trace.counts, strict=True)
        complete += sum(end - begin for begin, end, count in spans if count == 14) / 3600
    assert 1.26 < drops / hours < 1.89
    assert 1.6 < machines / drops < 2.4
    assert 0.73 < complete / hours < 0.82


# ---- the optimum


@pytest.mark.parametrize("seed", range(40))
def test_the_best_assignment_is_the_best_of_all(seed):
    rng = random.Random(seed)
    stages, peers = rng.choice([2, 3]), rng.randint(2, 7)
    equal = rng.random() < 0.5
    costs = [rng.choice([1.0, 2.0, 3.0]) for _ in range(stages)] if equal else [1.0] * stages
    speeds = [1.0] * peers if equal else [rng.choice([1.0, 2.0, 4.0]) for _ in range(peers)]

    def weakest(assignment) -> float:
        return min(
            sum(speed for speed, at in zip(speeds, assignment, strict=True) if at == stage) / costs[stage]
            for stage in range(stages)
        )

    best = max(weakest(assignment) for assignment in product(range(stages), repeat=peers))
    found, counts = best_assignment(speeds, costs)
    assert found == pytest.approx(best) and sum(counts) == peers


# ---- fleets


def test_the_default_rule_keeps_more_of_the_optimum_than_the_papers_and_that_more_than_none():
    trace = synthetic_trace(hours=24, wanted=12, rng=random.Random(5))
    around = surroundings(8, per_instance=8, state_s=60.0)
    best, paper, none = (
        simulate(run_of(8, f"rebalancing.rule={rule}", f"rebalancing.period_s={period}"), trace, around)
        for rule, period in (("best", 10), ("paper", 300), ("none", 10))
    )
    assert best.kept() > 0.98
    assert best.kept() > paper.kept() + 0.01 > none.kept() + 0.02
    assert none.moves == 0 < paper.moves and best.moves > 0


@pytest.mark.parametrize("seed", range(6))
def test_no_move_empties_a_stage_and_what_is_counted_is_what_is_there(seed):
    trace = synthetic_trace(hours=12, wanted=9, rng=random.Random(seed))
    simulation = Simulation(run_of(4), trace, surroundings(4, seed=seed, speeds=[500.0, 1000.0, 2000.0]))
    fleet, moves = simulation.fleet, []
    fleet._on_gone = lambda machine, left: moves.append(fleet.serving[machine.stage]) if left else None
    result = simulation.run()
    assert len(moves) == result.moves > 0 and min(moves) >= 1
    for stage in range(4):
        there = [m.speed for m in fleet.machines.values() if m.serves and m.stage == stage]
        assert fleet.serving[stage] == len(there)
        assert fleet.capacities[stage] == pytest.approx(sum(there))


def test_equal_seeds_give_equal_runs():
    trace = synthetic_trace(hours=1, wanted=9, rng=random.Random(1))
    first, again, other = (
        simulate(run_of(3), trace, surroundings(3, trainers=2, seed=seed)) for seed in (4, 4, 5)
    )
    assert (first.tokens, first.counters, first.moments) == (again.tokens, again.counters, again.moments)
    assert first.tokens != other.tokens


# ---- the data path


def test_equal_peers_are_kept_busy():
    """A wiring that takes waiting behind our own hops for slowness gets 0.75 here."""
    trace = Trace((0.0,), (64,), 900.0)
    result = simulate(run_of(4), trace, surroundings(4, trainers=1))
    half = [tokens for at_s, tokens in result.tokens if at_s >= 450]
    assert (half[-1] - half[0]) / 450 > 0.88 * result.moments[-1].optimum


@pytest.mark.parametrize("seed", range(8))
def test_whatever_dies_every_gradient_is_in_at_most_one_step_and_none_is_forgotten(seed):
    rng = random.Random(seed)
    times = sorted(rng.uniform(100, 900) for _ in range(8))
    counts = [rng.randint(8, 16) for _ in times]
    trace = Trace((0.0, *times, 1000.0), (12, *counts, 12), 1600.0)
    simulation = Simulation(run_of(4), trace, surroundings(4, trainers=2, seed=seed))
    world = simulation.world
    assert world is not None
    taken: dict[tuple[int, int], list[bytes]] = {}  # (stage, version) -> microbatches
    for stage, steps in enumerate(world.steps):

        def announce(held, stage=stage, steps=steps, announce=steps._announce):
            taken[stage, steps.version] = [m for each in held.values() for ids in each.values() for m in ids]
            announce(held)

        steps._announce = announce
    result = simulation.run()
    inside = Counter(
        (stage, microbatch)
        for (stage, version), microbatches in taken.items()
        for microbatch in microbatches
        if version <= world.steps[stage].version
    )
    assert max(inside.values()) == 1, "a gradient is in two steps"
    assert result.counters["lost"] == 0 and sum(inside.values()) > 1000
    if not result.lost_steps:  # else what was in them is lost with the last peer of their stage
        for name, trainer in world.trainers.items():
            for number in range(1, trainer._issued // 2):
                microbatch = name.encode() + number.to_bytes(8, "big")
                assert all(inside[stage, microbatch] for stage in range(4)), f"{name}'s {number} is missing"


def test_slow_links_slow_the_run_down():
    trace = Trace((0.0,), (12,), 600.0)
    fast, slow = (
        simulate(run_of(3), trace, surroundings(3, trainers=1, link=Link(rate, rate))) for rate in (1e8, 2e5)
    )
    assert slow.tokens[-1][1] < 0.5 * fast.tokens[-1][1]
    assert 0 < slow.sent_bytes < fast.sent_bytes


def test_the_simulation_agrees_with_the_real_protocol_in_virtual_time():
    """Three stages of two peers; every job half a second, the last stage's one job included."""
    seconds = 120.0

    async def real() -> int:
        sim = Sim(tiny_run("pipeline.in_flight=24", "training.target_batch_tokens=64"), 0, compute_s=0.5)
        for stage in range(3):
            for _ in range(2):
                await sim.start_peer(stage)
        pipeline = await sim.start_trainer()
        await sim.until(lambda: pipeline.ready_stages == 3 and sim.all_acquainted())
        began_s, number = sim.clock(), 0
        while sim.clock() < began_s + seconds:
            while pipeline.throttle.admits(pipeline.ledger.in_flight):
                sim.issue(number)
                number += 1
            await virtual_time.asyncio.sleep(0.05)
        return sum(sim.completed.values())

    config = tiny_run("pipeline.in_flight=24", "training.target_batch_tokens=64")
    tokens = config.training.microbatch_tokens
    around = Surroundings(
        speeds=[float(tokens)], costs=[1.0, 1.0, 0.5], state_s=0.0, trainers=1, latency_s=0.005, jitter=0.5
    )
    result = simulate(config, Trace((0.0,), (6,), seconds), around)
    measured, simulated = virtual_time.run(real()), result.tokens[-1][1] / tokens
    assert measured == pytest.approx(simulated, rel=0.15), f"{measured} measured, {simulated} simulated"


# ---- the command


def test_the_command_prints_what_came_of_it_and_draws_it(tmp_path):
    trace, plot = tmp_path / "trace.csv", tmp_path / "run.png"
    trace.write_text("0,6\n300,6\n300,4\n900,4\n900,8\n1500,8\n")
    arguments = ["simulate", "experiments/quickstart.yaml", "--trace", str(trace), "--plot", str(plot)]
    done = CliRunner().invoke(
        app, [*arguments, "--tflops", "0.005", "--speeds", "1,2", "--join-seconds", "20"]
    )
    assert done.exit_code == 0, done.output
    for words in ("0.4 h", "of the best assignment", "GB per peer and hour", "moves", "pipeline.in_flight"):
        assert words in done.output, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trace", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--speeds", "1,-2"], "--speeds '1,-2'"),
        (["--plot", "nowhere/run.png"], "there is no folder"),
        (["--plot", "run.xyz"], "the suffix says the format"),
        (["--set", "model.stages=0"], "model.stages"),
    ],
)
def test_mistakes_end_in_one_line(arguments, says):
    done = CliRunner().invoke(app, ["simulate", "experiments/quickstart.yaml", *arguments])
    assert done.exit_code == 2 and says in done.output and "Traceback" not in done.output
