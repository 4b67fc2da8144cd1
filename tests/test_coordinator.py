"""The coordinator's decisions over time, on the in-memory network."""

import asyncio
import random

import pytest

from averaging import averaging_pb2 as pb
from averaging import virtual_time
from averaging.ballot import Ballot
from averaging.coordinator import STEP_SERVICE, Coordinator
from averaging.errors import LinkError
from averaging.mates import Mates
from averaging.memory_network import MemoryHub
from averaging.plan import Pass, Report, StepRules
from averaging.round import Done
from averaging.wire import done_message, report_message

NAMES, STATE = ["a", "b", "c"], b"12345678"


async def nothing():
    pass


def coordinator_of(network, rules):
    return Coordinator(
        network=network,
        rules=rules,
        version=lambda: 0,
        mates=Mates(me=network.peer_id, rules=rules, roster=lambda: NAMES, refresh=nothing),
        reporting_to=lambda: "a",
        pending=lambda plan: False,
        rng=random.Random(0),
    )


def test_who_is_missing_is_waited_for_anew_when_the_target_is_lost_and_reached_again():
    async def main():
        rules = StepRules(target=8.0, max_weight=32.0)
        coordinator = coordinator_of(MemoryHub().network("a"), rules)
        target = rules.target
        always = {"a": float("inf"), "b": float("inf")}
        ballot = Ballot(0, reports={"a": Report(target, STATE), "b": Report(0, STATE)}, heard_s=always)
        assert "waiting" in coordinator.consider(ballot).reason
        ballot.reports["a"] = Report(target / 2, STATE)  # some of it is given up
        assert not coordinator.consider(ballot).close
        await asyncio.sleep(10 * rules.grace_s)
        ballot.reports["a"] = Report(target, STATE)
        assert "waiting" in coordinator.consider(ballot).reason
        await asyncio.sleep(2 * rules.grace_s)
        assert ballot.plan is not None

    virtual_time.run(main())


def test_who_was_dead_and_has_been_started_again_may_report_at_once():
    async def main():
        hub = MemoryHub()
        here, back = (coordinator_of(hub.network(me), StepRules(target=8.0, max_weight=32.0)) for me in "ab")
        here._mates.suspect(LinkError("b", "nobody is there", refused=True))
        await here.queries.get_to_know(["b"])
        assert "b" not in here._mates.live()
        await back.start()
        await here.queries.get_to_know(["b"])
        assert "b" in here._mates.live()

    virtual_time.run(main())


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("weight", [0.0, 8.0])
def test_nothing_is_committed_of_which_nobody_knows_what_is_in_it(weight, said):
    """A lost member is in the mean; what it froze may be more than it had reported."""

    async def main():
        hub = MemoryHub()
        networks = {name: hub.network(name) for name in NAMES}
        coordinator = coordinator_of(networks["a"], StepRules(target=8.0, max_weight=32.0))
        await coordinator.start()
        streams = {name: await networks[name].open("a", STEP_SERVICE) for name in NAMES}

        async def say(name, **content):
            await streams[name].send(pb.FromMember(**content).SerializeToString())

        async def hear(name, kind):
            while True:
                frame = await streams[name].receive()
                message = pb.FromCoordinator.FromString(frame.header)
                if message.WhichOneof("content") == kind:
                    return getattr(message, kind)

        for name in NAMES:
            report = Report(weight if name == "c" else 8.0, STATE, (Pass(100, 0),))
            await say(name, report=report_message(0, report))
        for name in NAMES:
            await hear(name, "plan")
            if name != "c" or said:
                await say(name, frozen=pb.Frozen(ids=[name.encode() * 16]))
        await asyncio.sleep(0.1)
        streams["c"].abort()
        for name in ("a", "b"):
            await say(name, done=done_message(Done(0, 0)))  # with all of the mean, and c's part in it
        verdict = await hear("b", "verdict")
        assert verdict.commit == said
        assert list(verdict.ids) == [name.encode() * 16 for name in NAMES] * said

    virtual_time.run(main())


@pytest.mark.parametrize("back", [True, False])
def test_who_has_fallen_silent_is_in_no_plan_until_it_reports_again(back):
    """A stopped process has reported, and its stream is open: with it in the plan all would wait for it."""

    async def main():
        hub = MemoryHub()
        networks = {name: hub.network(name) for name in NAMES}
        rules = StepRules(target=8.0, max_weight=32.0)
        coordinator = coordinator_of(networks["a"], rules)
        await coordinator.start()
        streams = {name: await networks[name].open("a", STEP_SERVICE) for name in NAMES}

        async def report(name, weight):
            message = report_message(0, Report(weight, STATE, (Pass(100, 0),)))
            await streams[name].send(pb.FromMember(report=message).SerializeToString())

        async def plan_of(name):
            while True:
                message = pb.FromCoordinator.FromString((await streams[name].receive()).header)
                if message.WhichOneof("content") == "moved":
                    return message.moved
                if message.WhichOneof("content") == "plan":
                    return sorted(member.peer for member in message.plan.members)

        await report("c", 3.0)
        for _ in range(8):  # twice the time that counts as silence
            for name in ("a", "b"):
                await report(name, 1.0)
            await asyncio.sleep(rules.silence_s / 4)
        if back:
            await report("c", 3.0)
            await asyncio.sleep(0.1)
        for name in ("a", "b"):
            await report(name, 4.0)
        assert await plan_of("b") == (["a", "b", "c"] if back else ["a", "b"])
        assert await plan_of("c") == (["a", "b", "c"] if back else "a"), "it is to report anew, nothing more"

    virtual_time.run(main())


@pytest.mark.parametrize("back", [True, False])
def test_no_plan_is_made_with_a_reporter_that_is_overdue(back):
    """It may have stopped a moment ago: all others would be held up until that is certain."""

    async def main():
        hub = MemoryHub()
        networks = {name: hub.network(name) for name in NAMES}
        rules = StepRules(target=8.0, max_weight=32.0)
        coordinator = coordinator_of(networks["a"], rules)
        await coordinator.start()
        streams = {name: await networks[name].open("a", STEP_SERVICE) for name in NAMES}
        time_s = asyncio.get_running_loop().time

        async def report(name, weight):
            message = report_message(0, Report(weight, STATE, (Pass(100, 0),)))
            await streams[name].send(pb.FromMember(report=message).SerializeToString())

        async def members():
            while True:
                message = pb.FromCoordinator.FromString((await streams["b"].receive()).header)
                if message.WhichOneof("content") == "plan":
                    return sorted(member.peer for member in message.plan.members)

        await report("c", 3.0)  # the last that is heard of it
        began_s, planned = time_s(), asyncio.create_task(members())
        while time_s() < began_s + 2 * rules.overdue_s:
            weight = 1.0 if time_s() < began_s + 1.3 * rules.overdue_s else 4.0
            await asyncio.gather(report("a", weight), report("b", weight))
            await asyncio.sleep(rules.silence_s / 16)
        assert not planned.done()
        if back:
            await report("c", 3.0)
        while not planned.done():
            await asyncio.gather(report("a", 4.0), report("b", 4.0))
            await asyncio.sleep(rules.silence_s / 16)
        assert await planned == (NAMES if back else ["a", "b"])
        assert time_s() < began_s + 1.5 * rules.silence_s

    virtual_time.run(main())


def test_a_plan_that_has_lost_its_quorum_is_abandoned_at_once():
    """Nothing can come of it: whoever is left would be held up by rounds with those that are gone."""

    async def main():
        hub = MemoryHub()
        networks = {name: hub.network(name) for name in NAMES}
        coordinator = coordinator_of(networks["a"], StepRules(target=8.0, max_weight=32.0))
        await coordinator.start()
        streams = {name: await networks[name].open("a", STEP_SERVICE) for name in NAMES}
        for name in NAMES:
            report = report_message(0, Report(8.0, STATE, (Pass(100, 0),)))
            await streams[name].send(pb.FromMember(report=report).SerializeToString())
        await asyncio.sleep(0.1)
        streams["b"].abort()
        streams["c"].abort()
        async with asyncio.timeout(0.1):
            while True:
                message = pb.FromCoordinator.FromString((await streams["a"].receive()).header)
                if message.WhichOneof("content") == "verdict":
                    break
        assert not message.verdict.commit

    virtual_time.run(main())
