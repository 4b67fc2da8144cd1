"""What fills a peer's mailbox, and what does not."""

from averaging.codecs import CODECS
from swarm.mailbox import Mailbox, Phase
from swarm.messages import Push, Route

STAGE = 1


def push(number: int, *, backward_until: int = 0, attempt: int = 0) -> Push:
    route = Route(
        microbatch=number.to_bytes(16, "big"),
        session=bytes(8),
        trainer="trainer",
        attempt=attempt,
        peers=("a", "b", "c"),
        forward_until=2,
        backward_until=backward_until,
    )
    return Push(
        route=route, stage=STAGE, backward=False, codec=CODECS["int8"], shape=(), tokens=b"", sequences=1
    )


def test_hops_that_wait_for_a_gradient_fill_it_and_those_that_get_none_do_not():
    mailbox = Mailbox(capacity=2, retained=10)
    for number in range(2):
        mailbox.add(push(number)).phase = Phase.FORWARDED
    assert mailbox.waiting == 2 and mailbox.is_full
    supplying = Mailbox(capacity=2, retained=4)
    for number in range(3):
        hop = supplying.add(push(number, backward_until=STAGE + 1))
        assert supplying.waiting == 1, "its forward is to come"
        hop.phase = Phase.FORWARDED
    assert supplying.waiting == 0 and not supplying.is_full
    supplying.add(push(3))
    assert supplying.is_full, "what is retained has a bound, too"


def test_a_newer_route_may_ask_for_the_gradient_after_all():
    mailbox = Mailbox(capacity=1, retained=10)
    hop = mailbox.add(push(0, backward_until=STAGE + 1))
    hop.phase = Phase.FORWARDED
    mailbox.adopt(hop, push(0, attempt=1).route)
    assert mailbox.waiting == 1 and mailbox.is_full
