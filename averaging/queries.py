"""What the peers of a stage ask each other: where are you, and what became of a plan?

Who answers that it knows of no end of a plan, and hears its coordinator no more, promises never to commit it:
if the coordinator has vanished, the answers of all settle the matter (`averaging.participant`).
Who asks here, but is on no roster that was read or counts as dead, may be a mate that came a moment ago.

I/O: one event loop. Design section 6.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from averaging import averaging_pb2 as pb
from averaging.bounded import forget_oldest
from averaging.errors import LinkError
from averaging.mates import Mates
from averaging.network import Buffer, Calls, Frame, Network, PeerId, Stream, answer
from averaging.plan import StepRules

SERVICE = "step-query"
DEADLINE_S = 2.0
MEETINGS = 16  # with such as may be mates, at once
REMEMBERED_PLANS = 256
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Committed:
    """What a plan came to."""

    ids: tuple[bytes, ...]  # of all that the mean is made of
    left_out: tuple[PeerId, ...]  # members of whom nothing is in it
    outdated: tuple[PeerId, ...]  # members whose mean, if they have one, is another


class Queries:
    """Of one peer: what it asks, what it answers, and which plans it has committed or promised not to."""

    def __init__(
        self,
        *,
        network: Network,
        rules: StepRules,
        version: Callable[[], int],
        mates: Mates,
        reporting_to: Callable[[], PeerId],
        pending: Callable[[bytes], bool],
        reports: Callable[[int], int],
    ) -> None:
        """`version`, `reporting_to` and `pending` as of the `Coordinator`; `reports` are those that it has
        collected for a step."""
        self._network, self._version, self._mates = network, version, mates
        self._reporting_to, self._pending, self._reports = reporting_to, pending, reports
        self.leaving = False  # told to whoever asks
        self._committed: dict[bytes, Committed] = {}
        self._abandoned: dict[bytes, None] = {}
        self._meeting: dict[PeerId, asyncio.Task[None]] = {}
        self._calls = Calls(network, SERVICE, deadline_s=min(DEADLINE_S, rules.progress_s))

    async def start(self) -> None:
        async def serve(stream: Stream) -> None:
            await answer(stream, self._answer)

        await self._network.serve(SERVICE, serve)

    def close(self) -> None:
        """Answer nobody any more."""
        self._network.unserve(SERVICE)
        for meeting in list(self._meeting.values()):
            meeting.cancel()
        self._calls.close()

    async def ask(self, peer: PeerId, query: pb.StepQuery) -> pb.StepInfo:
        """What another peer says of a plan or a step. Raises LinkError."""
        frame = await self._calls.call(peer, query.SerializeToString())
        try:
            info = pb.StepInfo.FromString(frame.header)
        except DecodeError:
            raise LinkError(peer, "malformed answer to a step query") from None
        self._mates.answers(peer)
        if info.version >= self._version() and not info.helps:
            self._mates.hear(peer)
        return info

    async def _answer(self, sender: PeerId, frame: Frame) -> tuple[bytes, Buffer]:
        try:
            query = pb.StepQuery.FromString(frame.header)
        except DecodeError:
            raise LinkError(sender, "malformed step query") from None
        self._meet(sender)
        info = pb.StepInfo(
            coordinator=self._reporting_to(), leaving=self.leaving, helps=not self._mates.has_a_say
        )
        info.version = 0 if info.helps else self._version()
        if query.plan:
            known = self._committed.get(query.plan)
            if known is not None:
                info.committed = True
                info.ids.extend(known.ids)
                info.left_out.extend(known.left_out)
                info.outdated.extend(known.outdated)
            elif self._pending(query.plan):
                info.pending = True
            else:
                self.abandon(query.plan)
        else:
            info.reports = self._reports(query.step)
        return info.SerializeToString(), b""

    def _meet(self, peer: PeerId) -> "asyncio.Task[None] | None":
        """Who asks here, but is on no roster that was read or counts as dead, may be a mate: ask back."""
        if peer in self._mates.live():
            return None
        if peer not in self._meeting and len(self._meeting) < MEETINGS:
            task = self._meeting[peer] = asyncio.create_task(self._ask_back(peer))
            task.add_done_callback(lambda done: self._meeting.pop(peer))
        return self._meeting.get(peer)

    async def get_to_know(self, peers: Iterable[PeerId]) -> None:
        """Find out whether they are mates that this peer has not read of, or takes for dead: they may have
        come, or been started again, a moment ago.

        They are asked first: reading the roster takes seconds while others in the directory do not answer.
        """
        live = self._mates.live()
        if unknown := [peer for peer in peers if peer not in live]:
            if asking := [task for peer in unknown if (task := self._meet(peer)) is not None]:
                await asyncio.wait(asking)
            if not {*self._mates.roster(), *self._mates.live()}.issuperset(unknown):
                await self._mates.refresh()

    async def _ask_back(self, peer: PeerId) -> None:
        with contextlib.suppress(LinkError):
            await self.ask(peer, pb.StepQuery(step=self._version()))

    # verdicts

    def commit(self, plan: bytes, what: Committed) -> bool:
        """Commit to `plan` unless this peer has promised not to."""
        if plan in self._abandoned:
            return False
        _remember(self._committed, plan, what)
        return True

    def learn_committed(self, plan: bytes, what: Committed) -> None:
        """Another member has committed to `plan`: so does this one, whatever it had promised."""
        _remember(self._committed, plan, what)

    def abandon(self, plan: bytes) -> None:
        """Promise never to commit `plan`; no-op if that was done already."""
        if plan not in self._committed:
            _remember(self._abandoned, plan, None)

    def is_abandoned(self, plan: bytes) -> bool:
        return plan in self._abandoned


def _remember(memory: dict[bytes, T], key: bytes, value: T) -> None:
    memory[key] = value
    forget_oldest(memory, REMEMBERED_PLANS)
