"""The in-memory twin of the network: many peers on one event loop, with links that misbehave on demand.

`MemoryHub` is the internet; `MemoryNetwork` is one peer's view of it. Each direction of a stream
delivers frames in order after the link's latency and size / rate. A peer can be killed (its streams
break), hung (nothing enters or leaves until it resumes), or cut off from another; single frames can be
dropped by breaking their stream before or after delivery, and requests can be delivered twice.

Used by tests and simulations in virtual time, by benchmarks without sockets, and by every real
process to talk to itself. Threading: one event loop.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from averaging.errors import LinkError
from averaging.network import LOOKS, Buffer, Frame, Handler, PeerId

Fate = Literal["deliver", "break_before", "break_after", "twice"]
DIAL_S, FINISH_S = 10.0, 3.0
INBOX_FRAMES = 256  # a sender waits for room beyond this, as a full socket would make it


@dataclass(kw_only=True)
class Link:
    """How frames between two peers travel; replace in `MemoryHub.link` to make links unequal."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")


class MemoryStream:
    """One end of a stream inside this process."""

    superseded = False

    def __init__(self, hub: "MemoryHub", local: PeerId, remote: PeerId, service: str, limit_bytes: int):
        self.remote, self._local, self._hub, self._service = remote, local, hub, service
        self._limit_bytes = limit_bytes
        self._twin: MemoryStream | None = None
        self._inbox: deque[Frame | None] = deque()
        self._changed = asyncio.Event()
        self._broken: str | None = None
        self._free_at_s = 0.0  # when the link has finished sending what was sent so far
        self._sent_bytes = self._received_bytes = 0
        self._arrival_s = 0.0  # of the newest frame: timers of equal time fire in any order
        self.from_dialer = False
        self.finishing = False
        self._mute = False  # it lost frames: nothing more arrives in order

    async def send(self, header: bytes, payload: Buffer = b"") -> None:
        await self._put(Frame(header, bytes(payload)))

    async def finish(self) -> None:
        self.finishing = True
        await self._put(None)
        try:
            async with asyncio.timeout(FINISH_S):
                while await self.receive() is not None:
                    pass
        except (LinkError, TimeoutError):
            pass  # closed is closed
        self.abort()

    async def _put(self, frame: Frame | None) -> None:
        twin = self._twin
        assert twin is not None
        if self._broken is None and len(twin._inbox) >= INBOX_FRAMES:
            await asyncio.sleep(0.01)
        if self._broken is not None:
            raise LinkError(self.remote, self._broken)
        await self._hub.carry(self, twin, frame)

    def _received_so_far(self) -> int:
        """As if they trickled in: all that has been sent to here but what the link still has to carry."""
        twin = self._twin
        assert twin is not None
        if self._hub.hung.isdisjoint((self._local, self.remote)):
            self._received_bytes = twin._sent_bytes - int(self._hub.under_way_bytes(twin))
        return self._received_bytes

    async def receive(self, silence_s: float | None = None) -> Frame | None:
        time_s = asyncio.get_running_loop().time
        heard_s, seen = time_s(), 0 if silence_s is None else self._received_so_far()
        while not self._inbox:
            if self._broken is not None:
                raise LinkError(self.remote, self._broken)
            self._changed.clear()
            if silence_s is None:
                await self._changed.wait()
                continue
            try:
                async with asyncio.timeout(silence_s / LOOKS):
                    await self._changed.wait()
            except TimeoutError:
                if (now := self._received_so_far()) != seen:
                    heard_s, seen = time_s(), now
                elif time_s() - heard_s >= silence_s:
                    raise LinkError(self.remote, f"silent for {silence_s:.1f} s") from None
        return self._inbox.popleft()

    def abort(self) -> None:
        self._break("closed here")
        if self._twin is not None:
            self._hub.later(self._local, self.remote, self._twin._break, "stream broke")

    def _deliver(self, frame: Frame | None) -> None:
        if self._broken is not None:
            return
        if frame is not None and len(frame.payload) > self._limit_bytes:
            self.abort()
            return
        self._inbox.append(frame)
        self._changed.set()

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
            self._hub.closed(self)
            self._changed.set()


@dataclass(kw_only=True)
class MemoryHub:
    """All peers of one in-memory network, and what goes wrong between them."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    link: Callable[[PeerId, PeerId], Link] = field(default=lambda a, b: Link())
    fate: Callable[[PeerId, PeerId, str, bool], Fate] = field(
        default=lambda a, b, service, request: "deliver"
    )
    # Is it certain for the first that a dead second does not run any more, once it has dialled it?
    is_proof: Callable[[PeerId, PeerId], bool] = field(default=lambda source, target: True)
    dead: set[PeerId] = field(default_factory=set)
    hung: set[PeerId] = field(default_factory=set)
    cut: set[frozenset[PeerId]] = field(default_factory=set)
    _networks: dict[PeerId, "MemoryNetwork"] = field(default_factory=dict)
    # Dictionaries as ordered sets: the order in which streams break must not depend on addresses.
    _streams: dict[PeerId, dict[MemoryStream, None]] = field(default_factory=dict)
    _waiting: dict[PeerId, list[Callable[[], None]]] = field(default_factory=dict)  # for a hung peer
    # Tasks of killed peers wait here: garbage collection would end them at moments that no seed repeats.
    _never: asyncio.Event = field(default_factory=asyncio.Event)

    def network(self, peer_id: PeerId) -> "MemoryNetwork":
        """Create the view of a new peer."""
        assert peer_id not in self._networks, f"peer id {peer_id} is taken"
        self._networks[peer_id] = MemoryNetwork(self, peer_id)
        return self._networks[peer_id]

    def kill(self, peer: PeerId) -> None:
        """End `peer` without warning: all its streams break and nothing it does leaves it any more."""
        self.dead.add(peer)
        network = self._networks.pop(peer, None)
        if network is not None:
            network.cancel_handlers()
        for stream in list(self._streams.pop(peer, ())):
            stream._break("this peer was killed")
            if stream._twin is not None:
                self.later(peer, stream.remote, stream._twin._break, "stream broke")

    def hang(self, peer: PeerId) -> None:
        """Stop delivering anything to or from `peer` until `resume`, like a stopped process."""
        self.hung.add(peer)

    def resume(self, peer: PeerId) -> None:
        """Deliver what waited while `peer` hung, in order."""
        self.hung.discard(peer)
        for act in self._waiting.pop(peer, []):
            self._act((peer,), act)

    def sever(self, a: PeerId, b: PeerId) -> None:
        """Cut the link between two peers as networks do: silently. What is sent vanishes, dials hang."""
        self.cut.add(frozenset((a, b)))

    def heal(self, a: PeerId, b: PeerId) -> None:
        """Let new streams pass again; those that have lost frames stay silent."""
        self.cut.discard(frozenset((a, b)))

    def later(self, source: PeerId, target: PeerId, act: Callable[..., None], *arguments: object) -> None:
        """Do `act` at the target's end once the link's latency has passed."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # the loop has ended, and what its tasks leave behind concerns nobody
        delay_s = self.link(source, target).latency_s
        loop.call_later(delay_s, self._act, (source, target), lambda: act(*arguments))

    def _act(self, ends: tuple[PeerId, ...], act: Callable[[], None]) -> None:
        for peer in ends:
            if peer in self.hung:
                self._waiting.setdefault(peer, []).append(lambda: self._act(ends, act))
                return
        act()

    async def carry(self, sender: MemoryStream, receiver: MemoryStream, frame: Frame | None) -> None:
        source, target = sender._local, sender.remote
        if source in self.dead:  # a killed process does nothing more
            await self._never.wait()
        sender._mute |= frozenset((source, target)) in self.cut
        if sender._mute:
            return
        fate: Fate = (
            "deliver" if frame is None else self.fate(source, target, sender._service, sender.from_dialer)
        )
        link = self.link(source, target)
        loop = asyncio.get_running_loop()
        size = 0 if frame is None else len(frame.header) + len(frame.payload)
        sender._sent_bytes += size
        sender._free_at_s = max(loop.time(), sender._free_at_s) + size / link.bytes_per_s
        arrives_s = max(sender._free_at_s + link.latency_s, sender._arrival_s + 1e-9)
        sender._arrival_s = arrives_s
        ends = (source, target)
        if fate != "break_before":
            loop.call_at(arrives_s, self._act, ends, lambda: receiver._deliver(frame))
        if fate == "twice" and sender.from_dialer and frame is not None:
            loop.call_at(arrives_s, self._act, ends, lambda: self._replay(sender, frame))
        if fate in ("break_before", "break_after"):
            loop.call_at(arrives_s, self._act, ends, lambda: receiver._break("stream broke"))
            loop.call_at(arrives_s, self._act, ends, lambda: sender._break("stream broke"))
        if size and link.bytes_per_s != float("inf"):
            await asyncio.sleep(max(0.0, sender._free_at_s - loop.time()))

    def under_way_bytes(self, sender: MemoryStream) -> float:
        """What a stream has sent and its link has not yet carried."""
        rate = self.link(sender._local, sender.remote).bytes_per_s
        left_s = sender._free_at_s - asyncio.get_running_loop().time()
        return left_s * rate if left_s > 0 else 0.0

    def _replay(self, sender: MemoryStream, frame: Frame) -> None:
        """Deliver a request again on a stream of its own whose answer nobody reads."""
        network = self._networks.get(sender.remote)
        if network is not None and sender._service in network.services:
            _, far = self._pair(sender._local, network, sender._service, 1 << 40)
            far._deliver(frame)
            network.start(far, sender._service)

    def _pair(
        self, source: PeerId, target: "MemoryNetwork", service: str, reply_limit_bytes: int
    ) -> tuple[MemoryStream, MemoryStream]:
        limit_bytes = target.services[service][1]
        near = MemoryStream(self, source, target.peer_id, service, reply_limit_bytes)
        far = MemoryStream(self, target.peer_id, source, service, limit_bytes)
        near._twin, far._twin, near.from_dialer = far, near, True
        self._streams.setdefault(source, {})[near] = None
        self._streams.setdefault(target.peer_id, {})[far] = None
        return near, far

    def streams_to(self, peer: PeerId, service: str) -> list[MemoryStream]:
        """Those that `peer` answers."""
        own = self._streams.get(peer, {})
        return [stream for stream in own if stream._service == service and not stream.from_dialer]

    def closed(self, stream: MemoryStream) -> None:
        self._streams.get(stream._local, {}).pop(stream, None)

    async def dial(
        self, source: PeerId, target: PeerId, service: str, max_payload_bytes: int
    ) -> MemoryStream:
        if source in self.dead:
            await self._never.wait()
        latency_s = self.link(source, target).latency_s
        if latency_s:
            await asyncio.sleep(2 * latency_s)
        deadline_s = asyncio.get_running_loop().time() + DIAL_S
        while source in self.hung or target in self.hung or frozenset((source, target)) in self.cut:
            if asyncio.get_running_loop().time() > deadline_s:
                raise LinkError(target, f"{service!r} did not answer within {DIAL_S:.0f} s", silent=True)
            await asyncio.sleep(0.05)
        network = self._networks.get(target)
        if network is None:
            raise LinkError(target, "nobody is there", refused=self.is_proof(source, target))
        if service not in network.services:
            raise LinkError(target, f"does not serve {service!r}")
        near, far = self._pair(source, network, service, max_payload_bytes)
        network.start(far, service)
        return near


class MemoryNetwork:
    """One peer's view of a `MemoryHub`; satisfies `averaging.network.Network`."""

    def __init__(self, hub: MemoryHub, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self.services: dict[str, tuple[Handler, int]] = {}
        self._hub = hub
        self._tasks: dict[asyncio.Task[None], None] = {}

    async def open(self, peer: PeerId, service: str, *, max_payload_bytes: int = 0) -> MemoryStream:
        return await self._hub.dial(self.peer_id, peer, service, max_payload_bytes)

    async def serve(self, service: str, handler: Handler, *, max_payload_bytes: int = 0) -> None:
        self.services[service] = (handler, max_payload_bytes)

    def unserve(self, service: str) -> None:
        self.services.pop(service, None)
        for stream in self._hub.streams_to(self.peer_id, service):
            stream.abort()

    def start(self, stream: MemoryStream, service: str) -> None:
        """Run the handler of `service` on the listening end of a new stream."""
        task = asyncio.ensure_future(self._handle(stream, self.services[service][0]))
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    async def _handle(self, stream: MemoryStream, handler: Handler) -> None:
        try:
            await handler(stream)
        except LinkError:
            pass  # the other end went away: its own business
        finally:
            if not stream.finishing:
                stream.abort()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"a stream handler of {self.peer_id} failed", "exception": error, "task": task}
            )

    def cancel_handlers(self) -> None:
        """Stop every running handler, as the death of the process would."""
        for task in list(self._tasks):
            task.cancel()
