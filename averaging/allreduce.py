"""One round in one group: a butterfly all-reduce in pieces, after which all members hold the same bits.

Every reducer has a slice. Everyone sends each slice to its reducer, piece by piece; the reducer averages
a piece as soon as all parts of it are there, encodes the mean once, and sends the same bytes to every
member, itself included: decoding them is what makes all members bit-identical, compressed or not.
Sending, reducing and receiving overlap.

Members meet before the round begins, and from then on tell each other that they live: whoever breaks off or
is silent for `silence_s` is lost to the other, and nobody waits for it any more. What that leaves undone
stands in the `Done` of the round; `averaging.repair` decides what becomes of it.

I/O: one asyncio loop. Source: Moshpit SGD, arXiv:2103.03239, section 3.2; hivemind's partitioning.
"""

import asyncio
from collections import Counter

import torch
from google.protobuf.message import DecodeError

from averaging.averaging_pb2 import Piece, RoundFrame, RoundGreeting
from averaging.bandwidth import UplinkMeter
from averaging.errors import AveragingError, LinkError, ProtocolError, RoundAbandonedError
from averaging.feedback import Feedback
from averaging.network import LOOKS, Buffer, HasStopped, Network, PeerId, Stream, kept_alive, while_heard
from averaging.pace import Pace
from averaging.plan import StepRules
from averaging.reduction import HELD, Means, Reduction, decode
from averaging.round import Done, Round, RoundName, Work
from averaging.shares import Slice

SERVICE = "reduce"
FRAME_BYTES = 12  # of every frame, beside header and payload
OPEN_ROUNDS = 64  # that others may announce before this peer has their plan
OPEN_ROUNDS_EACH = 16  # one for every dimension, and repairs
ALIVE = RoundFrame(alive=True).SerializeToString()


class ButterflyAllReduce:
    """Meets other peers for any number of rounds."""

    def __init__(self, network: Network, *, rules: StepRules, uplink: UplinkMeter | None = None) -> None:
        self.network, self.rules = network, rules
        self.max_payload_bytes = HELD.size_bytes(rules.piece_values)
        self.feedback, self.uplink = Feedback(), uplink or UplinkMeter()
        # Of a member that is dialled; who has mates knows it sooner.
        self.has_stopped: HasStopped = lambda peer, unheard_s: unheard_s >= rules.silence_s
        self._rounds: dict[RoundName, asyncio.Future[OpenRound]] = {}
        self._waiting: Counter[PeerId] = Counter()  # greetings of rounds that this peer has no plan of

    async def start(self) -> None:
        """Begin to answer the members of rounds that this peer takes part in."""
        await self.network.serve(SERVICE, self._serve, max_payload_bytes=self.max_payload_bytes)

    def close(self) -> None:
        """Answer nobody any more."""
        self.network.unserve(SERVICE)

    def meet(self, round_: Round, means: Means) -> "OpenRound":
        """Open a round: call the others, and answer them. Raises RoundAbandonedError if it was open."""
        slot = self._slot(round_.name)
        if slot.done():
            raise RoundAbandonedError("this round has been run before")
        opened = OpenRound(self, round_, means)
        slot.set_result(opened)
        return opened

    def forget(self, name: RoundName) -> None:
        """A round is over; who is late finds it closed for a while yet."""
        asyncio.get_running_loop().call_later(2 * self.rules.progress_s, self._rounds.pop, name, None)

    def _slot(self, name: RoundName) -> "asyncio.Future[OpenRound]":
        slot = self._rounds.get(name)
        if slot is None:
            slot = self._rounds[name] = asyncio.get_running_loop().create_future()
        return slot

    async def _serve(self, stream: Stream) -> None:
        """Answer one member of a round that I have work in."""
        try:
            opened = await self._opened(stream, await self._greeting(stream))
            await opened.serve(stream)
        except AveragingError:
            stream.abort()

    async def _greeting(self, stream: Stream) -> RoundName:
        try:
            async with asyncio.timeout(self.rules.progress_s):
                frame = await stream.receive()
            greeting = RoundGreeting.FromString(frame.header if frame else b"")
        except (DecodeError, TimeoutError):
            raise ProtocolError(stream.remote, "malformed greeting of a round") from None
        if len(greeting.plan) != 16:
            raise ProtocolError(stream.remote, "malformed greeting of a round")
        return greeting.plan, greeting.line, greeting.attempt

    async def _opened(self, stream: Stream, name: RoundName) -> "OpenRound":
        """The round of that name: a member may have the plan a little before this peer."""
        slot = self._rounds.get(name)
        if slot is not None and slot.done():
            return slot.result()
        announced = sum(not other.done() for other in self._rounds.values())
        if self._waiting[stream.remote] >= OPEN_ROUNDS_EACH or announced >= OPEN_ROUNDS:
            raise ProtocolError(stream.remote, "announces one round too many")
        self._waiting[stream.remote] += 1
        try:
            async with asyncio.timeout(self.rules.progress_s):
                return await asyncio.shield(self._slot(name))  # shared with other members
        except TimeoutError:
            if not self._slot(name).done():
                del self._rounds[name]
            raise LinkError(stream.remote, "met nobody here") from None
        finally:
            self._waiting -= Counter((stream.remote,))


class OpenRound:
    """This peer's part of one round, from the meeting to the means."""

    def __init__(self, owner: ButterflyAllReduce, round_: Round, means: Means) -> None:
        self._owner, self._round, self._means = owner, round_, means
        self._me, self._silence_s = owner.network.peer_id, owner.rules.silence_s
        self._work = work = round_.work.get(self._me, Work())
        self._residual = owner.feedback.of(round_)
        self._reduction = Reduction(round_, work, self._residual)
        self._begun: asyncio.Future[tuple[torch.Tensor, float]] = asyncio.get_running_loop().create_future()
        self._held: dict[PeerId, int] = dict.fromkeys(round_.work, 0)
        self._lost: dict[PeerId, str] = {}  # reducers
        self._served: dict[PeerId, Stream] = {}
        given = {peer: len(work.reduced) if peer in round_.speakers else 0 for peer in round_.members}
        self._paces = {peer: Pace(pieces) for peer, pieces in given.items()}
        self._closed = False
        self.sent_bytes = 0
        self._receives, self._speaks = self._me in round_.receivers, self._me in round_.speakers
        others = [p for p in round_.work if p != self._me] if self._receives or self._speaks else []
        self._exchanges = [asyncio.create_task(self._exchange(peer)) for peer in others]
        self._doors = asyncio.create_task(self._close_doors())

    async def run(self, vector: torch.Tensor, weight: float) -> Done:
        """Average `vector` ([values] float32), now that it is known, with the group.

        Returns when there is nothing more to wait for; the means that are here lie in `means`.
        """
        reduction, work = self._reduction, self._work
        reduction.hold(self._means)
        weight = weight if self._speaks else 0.0
        self._begun.set_result((vector, weight))
        reduction.begin(self._me, weight)
        if weight > 0:
            for index, part in enumerate(work.reduced, len(work.passed)):
                reduction.add(self._me, index, self._own(vector, part))
        own = asyncio.create_task(self._take_own())
        try:
            await asyncio.gather(own, *self._exchanges)
        finally:
            own.cancel()
        self._owner.uplink.conclude()
        return self._done()

    def close(self) -> None:
        """End what is still open; no-op if that was done before."""
        if not self._closed:
            self._closed = True
            self._doors.cancel()
            for exchange in self._exchanges:
                exchange.cancel()
            self._begun.cancel()
            self._reduction.fail("the round is over")
            for stream in self._served.values():
                stream.abort()
            self._owner.forget(self._round.name)

    def _done(self) -> Done:
        round_, reduction = self._round, self._reduction
        pieces = {peer: len(work.pieces) for peer, work in round_.work.items()}
        wanted = round_.work if self._receives else round_.work.keys() & {self._me}
        missing = {peer: self._held[peer] for peer in wanted if self._held[peer] < pieces[peer]}
        unused = frozenset(round_.members) - reduction.used - {self._me}
        lost = frozenset(self._lost) | frozenset(reduction.lost)
        _, line, attempt = round_.name
        return Done(line, attempt, missing, lost, unused)

    # what others reduce

    async def _exchange(self, reducer: PeerId) -> None:
        """Send my parts to one reducer and receive its means; a failure is noted, it concerns nobody else."""
        try:
            stream = await self._dial(reducer)
        except LinkError as error:
            self._lost[reducer] = error.what
            return
        plan, line, attempt = self._round.name
        try:
            await stream.send(RoundGreeting(plan=plan, line=line, attempt=attempt).SerializeToString())
            async with kept_alive(stream, ALIVE, self._silence_s), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_parts(stream))
                tasks.create_task(self._receive_means(stream))
            await stream.finish()
        except* AveragingError as errors:
            if self._held[reducer] < len(self._round.work[reducer].pieces) or not self._receives:
                self._lost[reducer] = str(errors.exceptions[0])
        finally:
            stream.abort()

    async def _dial(self, reducer: PeerId) -> Stream:
        owner = self._owner
        dialling = owner.network.open(reducer, SERVICE, max_payload_bytes=owner.max_payload_bytes)
        return await while_heard(reducer, dialling, owner.has_stopped, look_s=self._silence_s / LOOKS)

    async def _send_parts(self, stream: Stream) -> None:
        """A part of no weight needs no bytes."""
        vector, weight = await asyncio.shield(self._begun)
        await self._send(stream, RoundFrame(begin=weight).SerializeToString())
        work = self._round.work[stream.remote]
        for index, part in enumerate(work.reduced, len(work.passed)) if weight > 0 else ():
            await self._paces[stream.remote].allows(index - len(work.passed), len(work.reduced))
            header = RoundFrame(piece=Piece(index=index)).SerializeToString()
            values, codec = vector[part.start : part.stop], self._round.codec_of(part)
            await self._send(stream, header, self._residual.encode(codec, values, part, weight))

    async def _receive_means(self, stream: Stream) -> None:
        if not self._receives:
            return
        work = self._round.work[stream.remote]
        for index, part in enumerate(work.pieces):
            weight, payload = await self._receive_piece(stream, index)
            if not 0 <= weight <= self._round.most_weight * len(self._round.members):
                raise ProtocolError(stream.remote, f"sent a mean of weight {weight:g}")
            codec = HELD if index < len(work.passed) else self._round.mean_codec_of(part)
            decode(codec, stream.remote, payload, (len(part),), self._means.room(part))
            self._means.note(part, weight)
            self._held[stream.remote] = index + 1

    # what I reduce

    def _own(self, vector: torch.Tensor, part: Slice) -> torch.Tensor:
        """My part of what I reduce: where other lines sum the same values, as if it had travelled."""
        values, codec = vector[part.start : part.stop], self._round.codec_of(part)
        if self._round.feed_back or codec is HELD:
            return values
        return codec.decode(codec.encode(values), (len(part),))

    async def _take_own(self) -> None:
        work = self._work
        for index, (mean, part) in enumerate(zip(self._reduction.means, work.pieces, strict=True)):
            try:
                frame = await asyncio.shield(mean)
            except RoundAbandonedError:
                return
            if index >= len(work.passed):
                self._round.mean_codec_of(part).decode(frame.payload, (len(part),), self._means.room(part))
                self._means.note(part, RoundFrame.FromString(frame.header).piece.weight)
            self._held[self._me] = index + 1

    async def serve(self, stream: Stream) -> None:
        """Exchange parts for means with one member. Raises AveragingError."""
        peer = stream.remote
        if self._closed or peer not in self._round.members or peer in self._served:
            raise ProtocolError(peer, "is not a member of the round it wants to join")
        self._served[peer] = stream
        try:
            async with kept_alive(stream, ALIVE, self._silence_s), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive_parts(stream))
                if peer in self._round.receivers:
                    tasks.create_task(self._send_means(stream))
            await stream.finish()
        except* AveragingError as errors:
            stream.abort()
            self._leave(peer, str(errors.exceptions[0]))

    async def _close_doors(self) -> None:
        """Wait for who is to come: for `progress_s`, or half of that for who is silent elsewhere, too."""
        rules, time_s = self._owner.rules, asyncio.get_running_loop().time
        began_s, awaited = time_s(), set(self._round.speakers) - {self._me}
        while awaited:
            await asyncio.sleep(rules.progress_s / LOOKS)
            awaited -= self._served.keys()
            unheard_s = (time_s() - began_s) * rules.silence_s / rules.progress_s
            for peer in sorted(awaited):
                if self._owner.has_stopped(peer, unheard_s):
                    awaited.discard(peer)
                    self._leave(peer, "did not come")

    def _leave(self, peer: PeerId, why: str) -> None:
        self._reduction.leave(peer, why)
        self._paces[peer].release()

    async def _receive_parts(self, stream: Stream) -> None:
        frame, _ = await self._receive(stream)
        if frame.WhichOneof("content") != "begin":
            raise ProtocolError(stream.remote, "sends parts without a weight")
        self._reduction.begin(stream.remote, frame.begin)
        work, pace = self._work, self._paces[stream.remote]
        for index in range(len(work.passed), len(work.pieces)) if frame.begin > 0 else ():
            _, payload = await self._receive_piece(stream, index)
            self._reduction.add(stream.remote, index, payload)
            pace.step()
        pace.release()

    async def _send_means(self, stream: Stream) -> None:
        for mean in self._reduction.means:
            frame = await asyncio.shield(mean)
            await self._send(stream, frame.header, frame.payload)

    # frames

    async def _send(self, stream: Stream, header: bytes, payload: Buffer = b"") -> None:
        time_s, uplink = asyncio.get_running_loop().time, self._owner.uplink
        size, sent = FRAME_BYTES + len(header) + len(payload), 0
        uplink.begin(time_s())
        try:
            await stream.send(header, payload)
            sent = size
        finally:
            uplink.end(sent, time_s())
        self.sent_bytes += sent

    async def _receive_piece(self, stream: Stream, index: int) -> tuple[float, Buffer]:
        """The next frame, which must be that piece: its weight and its payload."""
        frame, payload = await self._receive(stream)
        if frame.piece.index != index or not frame.HasField("piece"):
            raise ProtocolError(stream.remote, f"sent something else than piece {index}")
        return frame.piece.weight, payload

    async def _receive(self, stream: Stream) -> tuple[RoundFrame, Buffer]:
        """The next frame that is not a sign of life. Raises LinkError after a silence."""
        while True:
            frame = await stream.receive(self._silence_s)
            if frame is None:
                raise LinkError(stream.remote, "ended the stream")
            try:
                content = RoundFrame.FromString(frame.header)
            except DecodeError:
                raise ProtocolError(stream.remote, "malformed frame of a round") from None
            if not content.alive:
                return content, frame.payload
