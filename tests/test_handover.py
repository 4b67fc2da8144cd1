"""A peer that leaves hands its gradients over; strangers and misfits are refused."""

import pytest
import torch

from averaging import virtual_time
from averaging.codecs import CODECS
from swarm import swarm_pb2 as pb
from swarm.errors import RejectedError
from swarm.handover import hand_over
from swarm.messages import Handover, Route, parse_handover
from swarm.scope import at_stage
from tests.sim import Sim, tiny_run

ID, SESSION = bytes(16), bytes(8)


def route(microbatch: bytes = ID, trainer: str = "trainer", session: bytes = SESSION) -> Route:
    return Route(
        microbatch=microbatch,
        session=session,
        trainer=trainer,
        attempt=3,
        peers=("giver",),
        forward_until=0,
        backward_until=0,
    )


def test_a_handover_survives_the_wire():
    routes = (route(), route(b"2" * 16, "other"), route(b"3" * 16, session=b"s" * 8))
    offered = Handover(7, 300, CODECS["int8"], routes)
    assert parse_handover("giver", offered.pack(1), stage=1, most_tokens=300) == offered


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (Handover(7, 300, CODECS["int8"], ()), "or none"),
        (Handover(7, 300, CODECS["int8"], (route(), route())), "twice"),
        (Handover(7, 301, CODECS["int8"], (route(),)), "301 tokens"),
        (Handover(7, 0, CODECS["int8"], (route(),)), "0 tokens"),
        (Handover(7, 300, CODECS["int8"], (route(b"short"),)), "16 bytes"),
        (Handover(7, 300, CODECS["int8"], (route(session=b""),)), "8 bytes"),
    ],
)
def test_a_handover_that_makes_no_sense_is_rejected(wrong, what):
    with pytest.raises(RejectedError, match=what):
        parse_handover("giver", wrong.pack(1), stage=1, most_tokens=300)


def test_bytes_that_are_no_handover_are_rejected():
    good = Handover(7, 300, CODECS["int8"], (route(),)).pack(1)
    nobodys = pb.Handover.FromString(good)
    nobodys.microbatches[0].session = 5
    for data in (
        b"\xff" * 20,
        good[:-3],
        nobodys.SerializeToString(),
        Handover(7, 1, CODECS["int8"], (route(),)).pack(2),
    ):
        with pytest.raises(RejectedError):
            parse_handover("giver", data, stage=1, most_tokens=300)


def offered_to(mate: str, offer, *overrides: str) -> tuple[bool, int]:
    """Was it taken, and how many tokens has the mate accumulated then?"""

    async def main():
        sim = Sim(tiny_run(*overrides), 0)
        for stage in range(3):
            for _ in range(2):
                await sim.start_peer(stage)
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        for number in range(2):
            sim.issue(number)
        await sim.until(lambda: len(sim.completed) == 2)
        names = sorted(p.id for p in sim.peers.values() if p.stage == 0)
        giver = sim.peers[names[0]].peer._everybody if mate == "mate" else sim.hub.network("stranger")
        stage = sim.peers[names[1]].peer.stage
        sum_of_gradients = torch.ones(stage.values)
        whose = route(b"x" * 16, session=sim.pipeline.session)
        given, vector = offer(Handover(0, 4, CODECS["float32"], (whose,)), sum_of_gradients)
        assert any(stage.holds(number.to_bytes(16, "big")) for number in range(2))
        before = stage.accumulator.tokens
        taken = await hand_over(at_stage(giver, 0), given, vector, [names[1]], stage=0)
        if taken is not None:
            assert taken == (names[1], stage.accumulator.step)
            assert stage.holds(b"x" * 16) is stage.accumulator
        return taken is not None, stage.accumulator.tokens - before

    return virtual_time.run(main())


def test_a_mate_takes_a_sum_over():
    assert offered_to("mate", lambda given, vector: (given, vector)) == (True, 4)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda given, vector: (given, vector * float("nan")),
        lambda given, vector: (given, vector[:-1]),
        lambda given, vector: (Handover(0, 4, given.codec, (route(b"x" * 16, "nobody"),)), vector),
        lambda given, vector: (
            Handover(
                0,
                4,
                given.codec,
                (
                    *(route(i.to_bytes(16, "big"), session=given.routes[0].session) for i in (0, 1)),
                    *given.routes,
                ),
            ),
            vector,
        ),
    ],
    ids=["not finite", "too short", "of a trainer that is not heard", "of what it has in part"],
)
def test_what_does_not_fit_changes_nothing(spoilt):
    assert offered_to("mate", spoilt) == (False, 0)


def test_a_stranger_hands_nothing_over():
    assert offered_to("stranger", lambda given, vector: (given, vector)) == (False, 0)


def test_in_strict_mode_a_sum_of_another_step_is_refused():
    strict = ("training.strict=true", "training.delayed_updates=false")
    ahead = lambda given, vector: (Handover(1, 4, given.codec, given.routes), vector)  # noqa: E731
    assert offered_to("mate", ahead, *strict) == (False, 0)
