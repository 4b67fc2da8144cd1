"""The whole swarm in virtual time: what must hold when nothing, or one particular thing, goes wrong."""

import asyncio
import logging
from collections import Counter

import pytest
import torch

from averaging import virtual_time
from averaging.codecs import CODECS
from averaging.memory_network import Link
from swarm import swarm_pb2 as pb
from swarm.messages import Push, Route, pack_tokens
from swarm.metrics import PUSH
from swarm.update import step_rules
from tests.sim import Sim, tiny_run


def simulate(test, *overrides, peers=2, **arguments):
    """Run `test(sim)` on a swarm that is ready."""

    async def main():
        sim = Sim(tiny_run(*overrides), seed=0, **arguments)
        for stage in range(3):
            for _ in range(peers):
                await sim.start_peer(stage)
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        await test(sim)
        assert not sim.errors, sim.errors

    virtual_time.run(main())


async def train(sim, count, first=0):
    ledger = sim.pipeline.ledger
    for number in range(first, first + count):
        await sim.until(lambda: ledger.in_flight - ledger.stuck < 6)
        sim.issue(number)
    await sim.until(lambda: len(sim.completed) >= first + count)


async def longest_stand_s(sim, member, for_s, check=lambda: None):
    """The longest time between two steps of a peer's stage; `check` is called all the while."""
    began_s = stepped_s = sim.clock()
    version, stood_s = member.peer.stage.version, 0.0
    while sim.clock() < began_s + for_s:
        await asyncio.sleep(0.05)
        if member.peer.stage.version > version:
            stood_s = max(stood_s, sim.clock() - stepped_s)
            version, stepped_s = member.peer.stage.version, sim.clock()
        check()
    return max(stood_s, sim.clock() - stepped_s)


def test_without_faults_nothing_is_rerouted_and_stages_stay_identical():
    async def test(sim):
        await train(sim, 80)
        counters = sim.pipeline.ledger.counters
        assert counters["rerouted_hops"] == counters["lost"] == 0
        assert min(p.peer.stage.version for p in sim.peers.values()) >= 5
        assert all(len(states) == 1 for states in sim.hashes.values())
        for p in sim.peers.values():
            taken = PUSH.validate_python({"kind": "peer", **p.peer.metrics()})
            assert taken.version >= 5 and taken.join_s > 0

    simulate(test)


@pytest.mark.parametrize("strict", ["false", "true"])
def test_hops_wait_for_a_step_but_not_for_one_that_a_stopped_member_holds_up(strict):
    """Without delayed updates the device would be idle until it is certain that the other has stopped."""

    async def test(sim):
        frozen: list[str] = []

        def stop_the_other(peer):
            if not frozen:
                frozen.append(peer)
                stage = sim.peers[peer].stage
                sim.hub.hang(next(p.id for p in sim.peers.values() if p.stage == stage and p.id != peer))

        sim.on_freeze = stop_the_other
        training = asyncio.create_task(train(sim, 40))
        await sim.until(lambda: frozen)
        member = sim.peers[frozen[0]]
        overdue_s = step_rules(sim.config).overdue_s
        await asyncio.sleep(0.8 * overdue_s)
        assert member.compute.held, "a step takes a while"
        await asyncio.sleep(0.4 * overdue_s)
        assert member.compute.held == (strict == "true"), "there all wait for the step anyway"
        assert member.peer.stage.version == 0
        training.cancel()

    simulate(test, "training.delayed_updates=false", f"training.strict={strict}")


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        (("training.strict=true", "training.delayed_updates=false"), 0.0, 0.0),
        (("training.delayed_updates=false", "averaging.progress_deadline_s=6"), 0.0, 0.5),
        (("training.delayed_updates=true",), 0.2, 2.0),
    ],
)
def test_peers_count_how_many_steps_behind_their_gradients_are(settings, least, most):
    async def test(sim):
        await train(sim, 100)
        counted = sum((Counter(p.peer.counters) for p in sim.peers.values()), Counter())
        assert least <= counted["steps_behind"] / counted["microbatches"] <= most

    simulate(test, *settings)


def test_bytes_retained_until_the_microbatch_are_released_with_it():
    async def test(sim):
        await train(sim, 30)
        await sim.until(lambda: sim.retained_bytes() == 0, 5)

    simulate(test, "pipeline.retain_until=microbatch")


def test_a_newcomer_serves_once_it_has_what_closed_while_it_joined(caplog):
    async def test(sim):
        await train(sim, 8)
        mate = next(p for p in sim.peers.values() if p.stage == 1).peer
        announce, newcomer = sim.directory.announce, await sim.start_peer(1)
        joined_at = []

        async def late(record):
            if record.peer == newcomer and not record.loading and not joined_at:
                known = sim.peers[newcomer].peer.stage.version
                await sim.until(lambda: mate.stage.version > known)
                joined_at.append(mate.stage.version)
            await announce(record)

        sim.directory.announce = late
        with caplog.at_level(logging.INFO, "swarm.update"):
            await train(sim, 24, first=8)
            await sim.until(lambda: "serving stage 1" in caplog.text)
        version = int(caplog.text.split("serving stage 1 at version ")[1].split()[0])
        assert version >= joined_at[0] >= 1

    simulate(test)


def test_evaluation_accumulates_nothing_and_agrees_with_the_model():
    async def test(sim):
        microbatch = sim.issue(7, evaluate=True)
        await sim.until(lambda: microbatch in sim.losses)
        stages = {p.stage: p.peer.stage for p in sim.peers.values()}
        tokens = torch.randint(0, 16, (1, 5), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            x = tokens[:, :-1]
            for number in range(3):
                x = stages[number].module(x)
            loss = float(stages[2].loss(x, tokens[:, 1:])) / 4
        assert abs(sim.losses[microbatch] - loss) < 1e-5
        assert all(stage.accumulator.tokens == 0 for stage in stages.values())
        await sim.until(lambda: sim.retained_bytes() == 0, 5)

    simulate(test)


def test_a_stage_on_a_grid_stays_identical_and_survives_a_death():
    async def test(sim):
        await train(sim, 40)
        sim.kill(next(p.id for p in sim.peers.values() if p.stage == 1))
        await train(sim, 60, first=40)
        assert min(p.peer.stage.version for p in sim.peers.values()) >= 5
        assert {len(done.members) for _, _, done in sim.steps} >= {4, 5}
        assert all(len(states) == 1 for states in sim.hashes.values())

    simulate(test, "averaging.group_size=2", "averaging.codec=int8", peers=5)


def test_peers_that_begin_from_the_seed_do_not_send_each_other_their_state(caplog):
    async def test(sim):
        await sim.start_peer(1)
        await sim.until(lambda: any("the same state" in message for message in caplog.messages))
        assert not any("loaded version" in message for message in caplog.messages)
        await train(sim, 20)
        await sim.start_peer(1)
        await sim.until(lambda: any("loaded version" in message for message in caplog.messages))

    with caplog.at_level("INFO", logger="swarm.state"):
        simulate(test)


def test_a_stage_whose_gradients_travel_as_factors_stays_identical_and_survives_a_death():
    async def test(sim):
        await train(sim, 40)
        sim.kill(next(p.id for p in sim.peers.values() if p.stage == 1))
        await sim.start_peer(1)
        await train(sim, 60, first=40)
        assert min(p.peer.stage.version for p in sim.peers.values()) >= 6
        assert all(len(states) == 1 for states in sim.hashes.values())

    settings = ["averaging.codec=float16", "averaging.rank=2", "averaging.rank_from=3", "model.width=64"]
    simulate(test, *settings, peers=3)


def test_gradients_travel_whole_for_four_warm_ups_of_the_learning_rate():
    async def test(sim):
        passes: dict[int, int] = {}

        def note(peer):
            updater, stage = sim.peers[peer].peer.updater, sim.peers[peer].peer.stage
            passes[stage.version] = len(updater.passes)

        sim.on_freeze = note
        await train(sim, 60)
        assert max(passes) >= 5
        assert passes == {version: 1 if version < 4 else 2 for version in passes}

    settings = ["averaging.codec=float16", "averaging.rank=2", "training.optimizer.warmup_steps=1"]
    simulate(test, *settings, "model.width=64")


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_auxiliaries_reduce_for_a_stage_get_no_hops_and_may_die(codec):
    async def test(sim):
        await train(sim, 30)
        helpers = [await sim.start_auxiliary(1) for _ in range(2)]
        await train(sim, 60, first=30)
        assert all(helper.counters["assisted_steps"] >= 3 for helper in helpers)
        assert all(helper.counters["averaging_bytes"] > 0 for helper in helpers)
        assert not sim.pipeline._watched.keys() & sim.auxiliaries.keys()
        helpers[1].version += 10_000  # as if the stage had begun anew without it
        alone = next(iter(sim.auxiliaries))
        sim.hub.kill(alone)
        sim.auxiliaries[alone].cancel()
        newcomer = await sim.start_peer(1)  # must not ask them for a state
        await train(sim, 60, first=90)
        versions = [p.peer.stage.version for p in sim.peers.values() if p.stage == 1]
        assert min(versions) >= 15 and max(versions) - min(versions) <= 1
        assert newcomer in sim.peers
        assert abs(helpers[1].version - max(versions)) <= 1, "nobody believes an auxiliary's version"
        assert sim.pipeline.ledger.counters["lost"] == 0
        assert all(len(states) == 1 for states in sim.hashes.values())

    simulate(test, f"averaging.codec={codec}", "model.width=64")


def test_a_killed_peers_hops_are_accepted_elsewhere_within_half_a_second():
    async def test(sim):
        for number in range(8):
            sim.issue(number)
        at_work = lambda p: p.stage == 1 and p.peer.server.mailbox.waiting  # noqa: E731
        await sim.until(lambda: any(at_work(p) for p in sim.peers.values()))
        victim = next(p.id for p in sim.peers.values() if at_work(p))
        sim.kill(victim)
        await sim.until(lambda: len(sim.completed) == 8)
        assert sim.recovered and all(r.recovered_s - r.noticed_s < 0.5 for r in sim.recovered)

    simulate(test, compute_s=0.1)


def test_when_a_trainer_dies_its_unfinished_gradients_go_and_another_trains_on():
    async def test(sim):
        await train(sim, 4)  # less than a step: it stays in the peers' sums
        sim.hub.kill("trainer")
        sim.pipeline_task.cancel()
        before = {p.id: p.peer.stage.version for p in sim.peers.values()}
        await sim.start_trainer("second")
        await sim.until(lambda: sim.pipeline.ready_stages == 3)
        await sim.until(lambda: sim.clock() > 20)  # the first one's leases are over
        for number in range(100, 148):
            sim.issue(number)
            await asyncio.sleep(0.1)
        await sim.until(lambda: all(p.peer.stage.version >= before[p.id] + 3 for p in sim.peers.values()), 60)
        history = set().union(*(p.peer.stage.history for p in sim.peers.values()))
        assert not any(number.to_bytes(16, "big") in history for number in range(4))

    simulate(test)


def test_a_leaving_peer_says_goodbye_and_is_not_banned():
    async def test(sim):
        leaver = next(iter(sim.peers))
        await train(sim, 10)
        await sim.terminate(leaver)
        await sim.until(lambda: leaver not in sim.pipeline._watched)
        assert not sim.pipeline._wirings[0].is_banned(leaver, sim.clock())
        await train(sim, 10, first=10)

    simulate(test)


@pytest.mark.parametrize(("latency_s", "least"), [(0.03, 2), (0.3, 0)])  # slowly: all is in the step by then
def test_mates_that_leave_at_once_lose_nothing_however_slowly_their_stage_averages(latency_s, least):
    async def test(sim):
        training = asyncio.ensure_future(train(sim, 120))
        leavers = [p for p in sim.peers.values() if p.stage == 1][:2]
        await sim.until(lambda: all(p.peer.stage.accumulator.tokens >= 4 for p in leavers))
        await asyncio.gather(*(sim.terminate(p.id) for p in leavers))
        await training
        assert sum(p.peer.counters["handed_over"] for p in leavers) >= least
        assert sim.pipeline.ledger.counters["lost"] == 0
        applied = [microbatch for microbatch, _ in sim.lineage(1)]
        assert len(applied) == len(set(applied))

    simulate(test, "pipeline.retain_until=microbatch", peers=4, latency_s=latency_s)


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_leaving_peer_hands_its_gradients_over_and_nothing_is_lost_or_computed_twice(codec):
    async def test(sim):
        training = asyncio.ensure_future(train(sim, 80))
        handed = computed = 0
        for stage in (0, 1, 2):
            leaver = next(p for p in sim.peers.values() if p.stage == stage)
            await sim.until(lambda peer=leaver.peer: peer.stage.accumulator.tokens >= 8)
            await sim.terminate(leaver.id)
            handed += leaver.peer.counters["handed_over"]
            computed += leaver.peer.counters["microbatches"]
        await training
        counters = sum((p.peer.counters for p in sim.peers.values()), Counter())
        assert counters["taken_over"] == handed >= 6
        assert sim.pipeline.ledger.counters["handed_over"] == handed
        assert sim.pipeline.ledger.counters["lost"] == 0
        assert computed + counters["microbatches"] == 3 * 80
        for stage in range(3):
            applied = [microbatch for microbatch, _ in sim.lineage(stage)]
            assert len(applied) == len(set(applied))

    simulate(test, "pipeline.retain_until=microbatch", f"averaging.codec={codec}")


def test_a_gradient_that_will_be_given_up_is_not_said_to_stand():
    """Its session has ended; the trainer is back, and asks for the same microbatch again."""

    async def test(sim):
        await sim.until(lambda: sim.pipeline.ready_stages == 3)
        microbatch = sim.issue(0)
        holders = [p.peer.server for p in sim.peers.values() if p.stage == 1]
        await sim.until(lambda: any(h._stage.holds(microbatch) for h in holders))
        (server,) = (h for h in holders if h._stage.holds(microbatch))
        ask = pb.Microbatches(session=sim.pipeline.session, ids=[microbatch], attempts=[0])

        async def stands() -> bool:
            return bool(pb.HopReply.FromString(await server._cancel("trainer", ask)).accumulated)

        assert await stands()
        server.orphans.add(microbatch)
        assert not await stands()

    simulate(test, "training.target_batch_tokens=4096")


def test_microbatches_wait_for_a_stage_without_peers_and_go_on_when_one_comes():
    async def test(sim):
        for peer in [p.id for p in sim.peers.values() if p.stage == 1]:
            sim.kill(peer)
        sim.issue(0)
        await sim.until(lambda: sim.clock() > 20)
        assert not sim.completed
        await sim.start_peer(1)
        await sim.until(lambda: len(sim.completed) == 1)

    simulate(test, peers=1)


def make_push(sim, target, sender, **changes):
    peers = sorted(p.id for p in sim.peers.values())
    route = Route(
        microbatch=b"m" * 16, session=sim.pipeline.session, trainer="trainer", attempt=0,
        peers=tuple(peers), forward_until=2, backward_until=0,
    )  # fmt: skip
    fields = {
        "route": route,
        "stage": 1,
        "backward": False,
        "codec": CODECS["float32"],
        "shape": (1, 4, 8),
        "tokens": pack_tokens(torch.zeros(1, 5, dtype=torch.int64)),
        "sequences": 1,
    }
    return Push(**fields | changes).pack()


def test_bad_tensors_are_rejected_counted_against_their_sender_and_hurt_nobody_else():
    async def test(sim):
        sender, target = sorted(p.id for p in sim.peers.values())[:2]
        server = sim.peers[target].peer.server
        good = bytes(CODECS["float32"].encode(torch.zeros(1, 4, 8)))
        nan = bytes(CODECS["float32"].encode(torch.full((1, 4, 8), float("nan"))))
        out_of_range = pack_tokens(torch.full((1, 5), 99))
        cases = [
            (make_push(sim, target, sender), nan, "not finite"),
            (make_push(sim, target, sender), good[:-4], "takes"),
            (make_push(sim, target, sender, shape=(1, 4, 9)), good, "shape"),
            (make_push(sim, target, sender, shape=(1 << 20, 1 << 20, 8)), good, "shape"),
            (make_push(sim, target, sender, stage=2), good, "route"),
            (make_push(sim, target, sender, tokens=out_of_range), good, "token ids"),
            (make_push(sim, target, sender, tokens=b"123"), good, "tokens"),
            (b"\xff\xff garbage", good, "malformed"),
        ]
        calls = sim.peers[sender].peer.server._calls_after
        for count, (header, payload, says) in enumerate(cases, 1):
            reply = pb.HopReply.FromString((await calls.call(target, header, payload)).header)
            assert reply.status == pb.REJECTED and says in reply.reason, (says, reply)
            assert server.rejections[sender] == count
        assert len(server.mailbox) == 0
        stranger = sim.hub.network("stranger")
        from averaging.network import Calls

        answer = await Calls(stranger, "hop/1", deadline_s=5).call(
            target, make_push(sim, target, sender), good
        )
        assert pb.HopReply.FromString(answer.header).status == pb.REJECTED
        assert server.rejections["stranger"] == 1
        await train(sim, 10)

    simulate(test, peers=1)


def test_a_stage_on_a_grid_goes_on_together_when_members_are_killed_while_they_average():
    async def test(sim):
        killed = []

        def kill_soon(peer):
            """Now and then, between the first message of its round and the last."""
            if peer.endswith("stage1") and len(killed) < 3 and len(sim.steps) > 40 * len(killed):
                killed.append(peer)
                asyncio.get_running_loop().call_later(0.02, sim.kill, peer)

        sim.on_freeze = kill_soon
        await train(sim, 120)
        assert len(killed) == 3
        assert min(max(v for s, v in sim.hashes if s == stage) for stage in range(3)) >= 6
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"

    simulate(test, "averaging.group_size=2", "averaging.codec=int8", peers=5)


def test_trainers_find_a_newcomer_at_once_not_when_they_read_the_roster_next():
    async def test(sim):
        await train(sim, 20)
        newcomer = await sim.start_peer(1)
        await sim.until(lambda: hasattr(sim.peers[newcomer].peer, "updater"))
        peer = sim.peers[newcomer].peer
        await sim.until(lambda: peer.updater.state_hash)
        joined_s = sim.clock()
        await sim.until(lambda: newcomer in sim.pipeline.hearing)
        assert sim.clock() - joined_s < 0.5
        training = asyncio.ensure_future(train(sim, 60, first=20))
        await sim.until(lambda: peer.server.counters["tokens"] > 0, 5)
        await training

    simulate(test, "network.announce_s=30", "network.expire_s=120")


def test_a_newcomer_is_watched_while_its_state_comes_and_works_the_moment_it_has_it():
    async def test(sim):
        await train(sim, 60)
        newcomer, asked_s = await sim.start_peer(1), sim.clock()
        peer, announce = sim.peers[newcomer].peer, sim.directory.announce

        def slow(a, b):
            from_donor = b == newcomer and a.endswith("stage1")
            return Link(latency_s=sim.latency_s, bytes_per_s=10_000 if from_donor else float("inf"))

        async def late(record):
            await asyncio.sleep(0 if record.loading else 5)
            await announce(record)

        sim.hub.link, sim.directory.announce = slow, late
        await sim.until(lambda: newcomer in sim.pipeline._watched, 1)
        training = asyncio.ensure_future(train(sim, 100, first=60))
        await sim.until(lambda: peer.server.announced_version, 30)
        assert sim.clock() - asked_s > 0.5
        assert not peer.server.counters["tokens"], "it was given work before it had the state"
        await sim.until(lambda: peer.server.counters["tokens"], 0.3)
        await training

    simulate(test, "network.announce_s=30", "network.expire_s=120", "training.target_batch_tokens=160")


def test_who_was_away_and_reads_a_roster_without_the_others_takes_no_step_alone():
    """The DHT's engine forgets nodes that did not answer, also when it could not hear them itself."""

    async def test(sim):
        await train(sim, 40)
        away, mate = (p.id for p in sim.peers.values() if p.stage == 1)
        peer, directory = sim.peers[away].peer, sim.directory

        class OfWhoWasAway:
            async def announce(self, record):
                if away not in sim.hub.hung:
                    await directory.announce(record)

            async def roster(self, stage):
                records = await directory.roster(stage)
                return [r for r in records if r.peer == away or away in sim.hub.hung]

        peer.membership._directory = OfWhoWasAway()
        sim.hub.hang(away)
        training = asyncio.ensure_future(train(sim, 300, first=40))
        await sim.until(lambda: sim.peers[mate].peer.stage.version > peer.stage.version + 3)
        sim.hub.resume(away)
        woken = sim.peers[mate].peer.stage.version
        await training
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"
        assert woken + 5 < peer.stage.version >= sim.peers[mate].peer.stage.version - 1

    simulate(test)


def test_who_stops_gets_no_more_work_once_a_heartbeat_is_late_and_is_silent_after_four():
    async def test(sim):
        wirings, hearing = sim.pipeline._wirings, sim.pipeline.hearing
        training = asyncio.ensure_future(train(sim, 100))
        while not training.done():
            assert not any(wiring.suspended for wiring in wirings), "all of them live"
            await asyncio.sleep(0.02)
        stopped, mate = (p.id for p in sim.peers.values() if p.stage == 1)
        beat_s, stopped_s = sim.config.network.heartbeat_s, sim.clock()
        sim.hub.hang(stopped)
        await sim.until(lambda: stopped in wirings[1].suspended)
        assert sim.clock() - stopped_s < 1.4 * beat_s
        await sim.until(lambda: hearing.silent_mates(mate, sim.clock()) == [stopped])
        assert 3 * beat_s <= sim.clock() - stopped_s < 4.7 * beat_s

    simulate(test)


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_of_two_goes_on_when_trainers_too_hear_one_of_them_no_more(first):
    """A mate alone cannot tell who has stopped from who is behind a broken link and goes on; trainers can."""

    async def test(sim):
        await train(sim, 40)
        pair = sorted(p.id for p in sim.peers.values() if p.stage == 1)
        stopped, other = pair if first else reversed(pair)
        sim.hub.hang(stopped)
        training = asyncio.ensure_future(train(sim, 200, first=40))
        version = sim.peers[other].peer.stage.version
        await sim.until(lambda: sim.peers[other].peer.stage.version > version + 1, 8)
        sim.hub.resume(stopped)
        await training
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"
        assert sim.peers[stopped].peer.stage.version > version + 10

    simulate(test, "network.expire_s=20")


@pytest.mark.parametrize("first", [True, False])
def test_a_step_closed_without_one_that_stopped_stands_when_it_wakes_up_with_another(first):
    """It had closed that step for both, but its mate could not know."""

    async def test(sim):
        await train(sim, 20)
        pair = sorted(p.id for p in sim.peers.values() if p.stage == 1)
        stopped, mate = (sim.peers[name] for name in (pair if first else reversed(pair)))
        sim.hub.link = lambda a, b: Link(latency_s=0.2 * (a != b))  # a verdict is under way for a while
        training = asyncio.ensure_future(train(sim, 120, first=20))
        await sim.until(lambda: stopped.peer.stage.version > mate.peer.stage.version, 60)
        sim.hub.hang(stopped.id)
        version = mate.peer.stage.version + 1
        await sim.until(lambda: mate.peer.stage.version == version, 30)
        alone = (1, version, mate.peer.stage.hash())
        sim.hub.resume(stopped.id)
        await training
        assert len(sim.hashes[1, version]) == 2, "one of them was closed without the other"
        assert alone in sim.steps_to(sim.newest(1))

    simulate(test, "network.expire_s=20")


@pytest.mark.parametrize("role", ["coordinator", "member"])
def test_a_stage_of_two_goes_on_at_once_when_one_stops_in_the_middle_of_a_step(role):
    """Nobody else can say what became of the plan, but all say that whoever could is silent."""

    async def test(sim):
        await train(sim, 40)
        pair = [p for p in sim.peers.values() if p.stage == 1]
        sim.hub.link = lambda a, b: Link(latency_s=0.05)  # so that a plan is under way for a while
        training = asyncio.ensure_future(train(sim, 200, first=40))

        def averaging() -> list:
            plans = [p.peer.updater.participant for p in pair]
            return [p.reporting_to for p in plans] if all(p._pending for p in plans) else []

        await sim.until(averaging, 30)
        (coordinator,) = set(averaging())
        member = next(p.id for p in pair if p.id != coordinator)
        stopped, other = (coordinator, member) if role == "coordinator" else (member, coordinator)
        sim.hub.hang(stopped)
        version, stopped_s = sim.peers[other].peer.stage.version, sim.clock()
        await sim.until(lambda: sim.peers[other].peer.stage.version > version, 30)
        took_s = sim.clock() - stopped_s
        await asyncio.sleep(5)
        sim.hub.resume(stopped)
        await training
        assert took_s < 3.5, f"nobody took a step for {took_s:.1f} s"
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"
        assert sim.peers[stopped].peer.stage.version > version + 5

    simulate(test, "network.expire_s=20")


def test_a_newcomer_goes_on_at_once_when_its_only_mate_is_killed():
    """It has never dialled that one, so that no answer is no proof; but the trainers know."""

    async def test(sim):
        sim.hub.is_proof = lambda source, target: source == "trainer"
        await train(sim, 40)
        gone, left = sorted((p for p in sim.peers.values() if p.stage == 1), key=lambda p: p.id)
        training = asyncio.ensure_future(train(sim, 500, first=40))
        sim.kill(left.id)
        await asyncio.sleep(10)  # until its record is gone
        newcomer = sim.peers[await sim.start_peer(1)].peer
        await sim.until(lambda: gone.id in newcomer.membership.others and not newcomer.membership.loading, 30)
        await sim.until(lambda: newcomer.server.counters["tokens"] > 0, 30)
        killed_s, version = sim.clock(), newcomer.stage.version
        sim.kill(gone.id)
        await sim.until(lambda: newcomer.stage.version > version + 1, 30)
        took_s = sim.clock() - killed_s
        await training
        assert took_s < 3.0, f"nobody took a step for {took_s:.1f} s"

    simulate(test, "network.expire_s=8", "network.announce_s=4")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("away_s", "queue"),
    [(1, 32), (5, 8)],  # it keeps its lease, and gradients wait for it to hold them; or it is as if it joined
)
def test_who_has_yet_to_catch_up_holds_nobody_up_and_computes_nothing(first, away_s, queue):
    async def test(sim):
        await train(sim, 40)
        pair = sorted((p for p in sim.peers.values() if p.stage == 1), key=lambda p: p.id)
        away, mate = pair if first else reversed(pair)
        sim.hub.hang(away.id)
        training = asyncio.ensure_future(train(sim, 400, first=40))
        await asyncio.sleep(away_s)
        await sim.until(lambda: mate.peer.stage.version > away.peer.stage.version + 3)
        catch_up, began = away.peer.updater._refetch, asyncio.Event()

        async def slowly(error):
            if not began.is_set():
                began.set()
                await asyncio.sleep(12)
            return await catch_up(error)

        away.peer.updater._refetch = slowly
        sim.hub.resume(away.id)
        await began.wait()
        await asyncio.sleep(0.5)  # for what lay in its queue
        before, tokens = mate.peer.stage.version, away.peer.server.counters["tokens"]
        await asyncio.sleep(10)
        steps = mate.peer.stage.version - before
        assert away.peer.server.counters["tokens"] == tokens, "it computed with weights that are gone"
        await training
        assert steps >= 15, f"{steps} steps in ten seconds"
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"
        assert away.peer.stage.version >= mate.peer.stage.version - 1

    simulate(test, "network.expire_s=20", f"pipeline.queue={queue}")


@pytest.mark.parametrize("first", [True, False])
def test_who_comes_back_steps_with_its_mate_at_once_however_slowly_the_directory_is_read(first):
    """While nodes of the DHT do not answer, each reading takes seconds; and its record has expired."""

    async def test(sim):
        await train(sim, 40)
        pair = sorted((p for p in sim.peers.values() if p.stage == 1), key=lambda p: p.id)
        away, mate = pair if first else reversed(pair)
        read, store = sim.directory.roster, sim.directory.announce

        async def roster(stage):
            await asyncio.sleep(6)
            return await read(stage)

        async def announce(record):
            await asyncio.sleep(6)
            if record.peer not in sim.hub.hung:
                await store(record)

        sim.directory.roster, sim.directory.announce = roster, announce
        sim.hub.hang(away.id)
        training = asyncio.ensure_future(train(sim, 1200, first=40))
        await asyncio.sleep(20)
        assert away.id not in mate.peer.membership.others
        sim.hub.resume(away.id)
        woken_s = sim.clock()

        def is_with_it():
            if sim.clock() > woken_s + 3:
                behind = mate.peer.stage.version - away.peer.stage.version
                assert behind <= 1, "it has not caught up after three seconds"

        stood_s = await longest_stand_s(sim, mate, 12, is_with_it)
        assert not training.done(), "nothing was left to take steps for"
        training.cancel()
        assert stood_s < 1.5, f"nobody took a step for {stood_s:.1f} s"
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"

    simulate(test, "network.expire_s=8")


@pytest.mark.parametrize("first", [True, False])
def test_a_dead_peer_that_is_read_of_for_longer_than_its_record_lives_holds_nobody_up(first):
    """While nodes of the DHT do not answer, a reading takes seconds, and tells what was there before."""

    async def test(sim):
        await train(sim, 40)
        pair = sorted((p for p in sim.peers.values() if p.stage == 1), key=lambda p: p.id)
        dead, mate = pair if first else reversed(pair)
        read, store = sim.directory.roster, sim.directory.announce
        slow_s, newcomer = 0.0, ""

        async def roster(stage):
            records = await read(stage)
            await asyncio.sleep(slow_s)
            return records

        async def announce(record):
            nonlocal slow_s
            if record.peer == newcomer and not record.loading:
                slow_s = 6.0
            await store(record)

        sim.directory.roster, sim.directory.announce = roster, announce
        training = asyncio.ensure_future(train(sim, 900, first=40))
        await asyncio.sleep(3)
        sim.kill(dead.id)
        newcomer = await sim.start_peer(1)
        sim.hub.is_proof = lambda source, target: source != newcomer  # it has never reached the dead one
        stood_s = await longest_stand_s(sim, mate, 25)
        training.cancel()
        assert stood_s < 2.5, f"nobody took a step for {stood_s:.1f} s"

    simulate(test, "network.expire_s=8", "network.announce_s=3")


def test_a_stage_of_two_whose_link_is_cut_does_not_split_while_trainers_hear_both():
    async def test(sim):
        await train(sim, 40)
        pair = [p.id for p in sim.peers.values() if p.stage == 1]
        sim.hub.sever(*pair)
        training = asyncio.ensure_future(train(sim, 200, first=40))
        await asyncio.sleep(10)
        sim.hub.heal(*pair)
        await training
        split = [node for node, states in sim.hashes.items() if len(states) > 1]
        assert not split, f"(stage, version) with different states: {split}"

    simulate(test, "network.expire_s=20")


def test_who_is_leaving_says_so_to_a_mate_that_would_rely_on_it():
    async def test(sim):
        training = asyncio.ensure_future(train(sim, 60))
        await sim.until(lambda: len(sim.completed) > 20)
        leaving, other = (p for p in sim.peers.values() if p.stage == 1)
        assert await other.peer.stays(leaving.id)
        end = asyncio.ensure_future(sim.terminate(leaving.id))
        await asyncio.sleep(0)
        assert not await other.peer.stays(leaving.id) and not end.done()
        await end
        await training

    simulate(test)


def test_nobody_relies_on_a_mate_that_is_behind():
    """Who moves to another stage would take with it what only its own state has."""

    async def test(sim):
        await train(sim, 40)
        (away_id, away), (_, mate) = ((p.id, p.peer) for p in sim.peers.values() if p.stage == 1)
        assert await mate.stays(away_id)
        catch_up, may_catch_up = away.updater._refetch, asyncio.Event()

        async def later(error):
            await may_catch_up.wait()
            return await catch_up(error)

        away.updater._refetch = later
        sim.hub.hang(away_id)
        training = asyncio.ensure_future(train(sim, 200, first=40))
        await sim.until(lambda: mate.stage.version > away.stage.version + 1)
        sim.hub.resume(away_id)
        assert not await mate.stays(away_id)
        may_catch_up.set()
        await sim.until(lambda: away.stage.version >= mate.stage.version)
        assert await mate.stays(away_id)
        await training

    simulate(test)


def pools_of(sim) -> list[int]:
    """Peers that serve each stage."""
    serving = Counter(p.stage for p in sim.peers.values() if not p.peer.membership.loading)
    return [serving[stage] for stage in range(3)]


def test_volunteers_spread_and_one_moves_to_a_stage_that_has_lost_peers():
    async def test(sim):
        volunteers = [await sim.start_volunteer() for _ in range(3)]
        await sim.until(lambda: pools_of(sim) == [3, 3, 3], 30)
        await train(sim, 30)
        fixed = [p.id for p in sim.peers.values() if p.stage == 1 and p.id not in volunteers]
        for peer in fixed:
            sim.kill(peer)
        training = asyncio.ensure_future(train(sim, 150, first=30))
        await sim.until(lambda: sorted(pools_of(sim)) == [2, 2, 3] and pools_of(sim)[1] == 2, 60)
        await training
        await train(sim, 30, first=180)
        assert sum(sim.peers[peer].volunteer.moves for peer in volunteers) == 1
        mover = next(sim.peers[peer] for peer in volunteers if sim.peers[peer].volunteer.moves)
        metrics = PUSH.validate_python({"kind": "peer", **mover.volunteer.metrics()}).model_dump()
        assert metrics["tokens"] > mover.peer.server.counters["tokens"] > 0, "counters go on"
        assert mover.stage == 1 and mover.peer.server.counters["tokens"] > 0
        assert all(len(states) == 1 for states in sim.hashes.values())
        assert sim.pipeline.ledger.counters["lost"] == 0
        for stage in range(3):
            applied = [microbatch for microbatch, _ in sim.lineage(stage)]
            assert len(applied) == len(set(applied))

    simulate(test, "rebalancing.period_s=2")


def test_the_last_living_peer_of_a_stage_does_not_leave_it():
    async def test(sim):
        volunteers = [await sim.start_volunteer() for _ in range(2)]
        await sim.until(lambda: sorted(pools_of(sim)) == [1, 2, 2])
        stage = next(sim.peers[v].stage for v in volunteers)
        mover = next(sim.peers[v] for v in volunteers)
        mate = next(p.id for p in sim.peers.values() if p.stage == stage and p.id not in volunteers)
        await train(sim, 10)
        sim.kill(mate)  # its record lives on
        assert [r.peer for r in await mover.volunteer._serving(stage)] == [mate]
        assert not await mover.volunteer._others_stay()

    simulate(test, peers=1)


def test_who_leaves_while_it_prepares_a_move_loads_nothing_more():
    async def test(sim):
        volunteers = [await sim.start_volunteer() for _ in range(3)]
        await train(sim, 40)
        fixed = [p.id for p in sim.peers.values() if p.stage == 1 and p.id not in volunteers]
        sim.hub.link = lambda a, b: Link(latency_s=0.005, bytes_per_s=20_000)  # states take their time
        for peer in fixed:
            sim.kill(peer)
        training = asyncio.ensure_future(train(sim, 400, first=40))
        await sim.until(lambda: any(sim.peers[v].peer.membership.heading == 1 for v in volunteers), 60)
        mover = next(sim.peers[v] for v in volunteers if sim.peers[v].peer.membership.heading == 1)
        began_s = sim.clock()
        await sim.terminate(mover.id)
        assert mover.volunteer._preparing.cancelled() and not mover.volunteer.moves
        assert sim.clock() - began_s < 3
        sim.hub.link = lambda a, b: Link(latency_s=0.005, bytes_per_s=1e9)
        await training

    simulate(test, "rebalancing.period_s=2")


def test_a_volunteer_leaves_cleanly_before_it_has_a_stage():
    async def test(sim):
        from swarm.volunteer import Volunteer

        volunteer = Volunteer(
            me="nobody", directory=sim.directory, config=sim.config, make_peer=lambda stage: None
        )
        await volunteer.leave()

    simulate(test, peers=1)
