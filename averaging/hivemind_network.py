"""The real network: hivemind's libp2p daemon behind the `Network` Protocol.

Identities, relays and hole punching are the engine's; on each raw binary stream it opens we speak our own
frames (`averaging.framing`). The listener speaks first: a greeting of six bytes (magic, protocol version).
The dialer reads it before it sends anything, so that on both ends nothing is left in a reader when
`FrameProtocol` takes the transport over. Peers that can connect to each other without their daemons do so
from the second stream on (`averaging.direct`).

I/O: one asyncio loop owns it, and the daemon of `averaging.daemon`.
"""

import asyncio
import logging
import re
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, cast

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from averaging.bounded import forget_oldest
from averaging.daemon import connect
from averaging.direct import MOST_PEERS, OFFER, DirectListener, DirectPaths, Ends
from averaging.errors import LinkError, VersionMismatchError
from averaging.flow import Window
from averaging.framing import FramedStream, FrameProtocol
from averaging.memory_network import MemoryHub
from averaging.network import PROTOCOL_VERSION, Handler, PeerId, Stream

GREETING = struct.Struct("<4sH")
MAGIC = b"SWRM"
DIAL_S = 10.0
DIRECT_S = 1.5  # for a greeting where one was heard before; then there is time to try the daemons
PROBE_S = 1.0
PROGRESS_S = 5.0
OFFERS = "direct"  # the service that tells how to connect without the daemons
FIRST_FRAME_S = 10.0
STREAMS_EACH = 256  # that one peer may have open here

_TCP = re.compile(r"/ip[46]/([^/]+)/tcp/(\d+)")
_UNANSWERED = (P2PDaemonError, OSError, EOFError)
Addresses = Callable[[PeerId], Awaitable[Sequence[str]]]
Host = tuple[str, int]
log = logging.getLogger(__name__)


class HivemindNetwork:
    """Streams to and from other peers; satisfies `averaging.network.Network`."""

    def __init__(self, p2p: P2P, *, progress_s: float = PROGRESS_S) -> None:
        self.peer_id: PeerId = p2p.peer_id.to_base58()
        self._p2p, self._progress_s = p2p, progress_s
        self._loopback = MemoryHub().network(self.peer_id)  # the daemon cannot dial itself
        self._addresses: Addresses = _no_addresses
        self._served: Counter[PeerId] = Counter()  # streams that each peer has open here
        self._windows: dict[PeerId, Window] = {}
        self._reached: dict[PeerId, set[Host]] = {}  # where the daemon has been connected with each
        self._handlers: dict[str, tuple[Handler, int]] = {}  # of each service, and its largest payload
        self._known: set[str] = set()  # services that the daemon has been told of
        self._answered: dict[str, set[FramedStream]] = {}  # open streams to each service
        self._listener, self._paths = DirectListener(self._answer), DirectPaths()
        self._looking: set[asyncio.Task[None]] = set()

    def use_addresses(self, addresses: Addresses) -> None:
        """Where to dial a peer that the daemon's own routing does not find."""
        self._addresses = addresses

    async def listen(self, host: str, port: int = 0) -> None:
        """Let others connect without the daemons. Raises OSError."""
        await self._listener.start(host, port)
        await self._p2p.add_binary_stream_handler(_protocol_name(OFFERS), self._offer)

    def close(self) -> None:
        """No more direct connections; the daemon is its owner's."""
        self._listener.close()
        self._paths.close()
        for task in self._looking:
            task.cancel()

    async def open(self, peer: PeerId, service: str, *, max_payload_bytes: int = 0) -> Stream:
        if peer == self.peer_id:
            return await self._loopback.open(peer, service, max_payload_bytes=max_payload_bytes)
        try:
            async with asyncio.timeout(DIAL_S):
                return await self._dial(peer, service, max_payload_bytes)
        except TimeoutError:
            what = f"{service!r} did not answer within {DIAL_S:.0f} s"
            raise LinkError(peer, what, silent=True) from None
        except (*_UNANSWERED, ValueError) as error:
            raise LinkError(peer, f"cannot open {service!r}: {_first_line(error)}") from None

    async def _dial(self, peer: PeerId, service: str, max_payload_bytes: int) -> Stream:
        opened = await self._opened_directly(peer, service)
        if opened is not None:
            return self._framed(peer, *opened, max_payload_bytes)
        opened = await self._opened_by_daemons(peer, service)
        if self._paths.wants(peer):
            task = asyncio.create_task(self._find_path(peer))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)
        return self._framed(peer, *opened, max_payload_bytes, lambda: self._paths.knows(peer))

    async def _opened_by_daemons(self, peer: PeerId, service: str) -> Ends:
        try:
            return await self._opened_where_known(peer, service)
        except _UNANSWERED:
            await self._connect(peer)
        try:
            return await self._opened_where_known(peer, service)
        except _UNANSWERED as error:  # it starts or ends, or the link broke again: no proof of an end
            raise LinkError(peer, f"serves no {service!r}: {_first_line(error)}") from None

    async def _opened_where_known(self, peer: PeerId, service: str) -> Ends:
        _, reader, writer = await self._p2p.call_binary_stream_handler(
            PeerID.from_base58(peer), _protocol_name(service)
        )
        await _greeted(peer, reader, writer)
        await self._note_path(peer)
        return reader, writer

    async def _opened_directly(self, peer: PeerId, service: str) -> Ends | None:
        """None if there is no path past the daemons, or nobody answers there any more."""
        if not self._paths.knows(peer):
            return None
        time_s = asyncio.get_running_loop().time
        began_s = time_s()
        try:
            async with asyncio.timeout(DIRECT_S):
                opened = await self._paths.open(peer, service)
                await _greeted(peer, *opened)
                return opened
        except (OSError, EOFError, TimeoutError) as error:
            self._paths.forget(peer, str(error) or "no answer")
            return None
        except asyncio.CancelledError:
            if time_s() - began_s > DIRECT_S / 2:  # the caller has lost patience
                self._paths.forget(peer, "no answer")
            raise

    async def _find_path(self, peer: PeerId) -> None:
        """Ask a peer how to connect to it without the daemons, and see whether that works from here."""
        try:
            async with asyncio.timeout(DIAL_S):
                reader, writer = await self._opened_where_known(peer, OFFERS)
                try:
                    offer = await reader.readexactly(OFFER.size)
                finally:
                    writer.transport.abort()
                hosts = (await self._connected()).get(peer, set())
                await self._paths.find(peer, offer, [host for host, _ in hosts])
        except (*_UNANSWERED, LinkError, TimeoutError) as error:
            log.debug("no direct path to %s: %s", peer[-8:], error)

    async def _offer(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer `_find_path` of another peer."""
        offer = self._listener.offer_to(info.peer_id.to_base58())
        writer.write(GREETING.pack(MAGIC, PROTOCOL_VERSION) + offer)
        await writer.drain()
        writer.close()

    async def _note_path(self, peer: PeerId) -> None:
        """Remember at which address this peer is what answers."""
        if peer in self._reached:
            return
        for other, hosts in (await self._connected()).items():
            self._reached.setdefault(other, set()).update(hosts)
        self._reached.setdefault(peer, set())
        forget_oldest(self._reached, MOST_PEERS)

    async def _connected(self) -> dict[PeerId, set[Host]]:
        """Where the daemon is connected with each peer now."""
        found: dict[PeerId, set[Host]] = {}
        for info in await self._p2p.list_peers():
            hosts = _hosts(str(address) for address in info.addrs)
            found.setdefault(info.peer_id.to_base58(), set()).update(hosts)
        return found

    async def _connect(self, peer: PeerId) -> None:
        """Connect the daemons at the addresses that `peer` has announced. Raises LinkError."""
        addresses = await self._addresses(peer)
        if not addresses:
            raise LinkError(peer, "is not found, and has announced no address")
        try:
            await connect(self._p2p, peer, addresses)
        except P2PDaemonError as error:
            # Elsewhere an answer proves nothing: a private address may be somebody else's machine here.
            refused = await _nobody_listens(self._reached.get(peer, set()) & _hosts(addresses))
            raise LinkError(peer, f"cannot connect: {_first_line(error)}", refused=refused) from None

    async def serve(self, service: str, handler: Handler, *, max_payload_bytes: int = 0) -> None:
        await self._loopback.serve(service, handler, max_payload_bytes=max_payload_bytes)
        self._handlers[service] = handler, max_payload_bytes
        if service in self._known:
            return
        self._known.add(service)

        async def answer(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._answer(info.peer_id.to_base58(), service, reader, writer)

        await self._p2p.add_binary_stream_handler(_protocol_name(service), answer)

    def unserve(self, service: str) -> None:
        self._loopback.unserve(service)
        self._handlers.pop(service, None)
        for stream in self._answered.pop(service, ()):
            stream.abort()

    async def _answer(
        self, remote: PeerId, service: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A stream to one of the services has come in."""
        cast(asyncio.Transport, writer.transport).pause_reading()
        if service not in self._handlers:
            return writer.transport.abort()
        handler, max_payload_bytes = self._handlers[service]
        if self._served[remote] >= STREAMS_EACH:
            writer.transport.write(GREETING.pack(MAGIC, PROTOCOL_VERSION))  # busy, not gone
            return writer.transport.close()
        self._served[remote] += 1
        stream = self._framed(remote, reader, writer, max_payload_bytes)
        self._answered.setdefault(service, set()).add(stream)
        writer.transport.write(GREETING.pack(MAGIC, PROTOCOL_VERSION))
        asyncio.get_running_loop().call_later(FIRST_FRAME_S, stream.abort_if_silent)
        try:
            await handler(stream)
        except LinkError:
            pass  # the other end went away: its own business
        finally:
            self._served -= Counter((remote,))
            self._answered.get(service, set()).discard(stream)
            stream.abort_unless_finished()

    def _framed(
        self,
        peer: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        max_payload_bytes: int,
        superseded: Callable[[], bool] = lambda: False,
    ) -> FramedStream:
        window = self._windows.setdefault(peer, Window())
        forget_oldest(self._windows, MOST_PEERS)
        protocol = FrameProtocol(peer, max_payload_bytes, self._progress_s, window)
        protocol.attach(cast(asyncio.Transport, writer.transport))
        return FramedStream(protocol, (reader, writer), superseded)

    async def addresses(self) -> list[str]:
        """The addresses under which others may dial this process, each ending in its peer id."""
        return [str(address) for address in await self._p2p.get_visible_maddrs()]

    async def daemon_ended(self) -> None:
        """Wait until the daemon has died."""
        child = self._p2p._child
        assert child is not None, "the daemon is always this process's own child"
        await child.wait()


async def _no_addresses(peer: PeerId) -> Sequence[str]:
    return ()


async def _greeted(peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read who answers. Raises one of `_UNANSWERED`, or VersionMismatchError."""
    try:
        magic, version = GREETING.unpack(await reader.readexactly(GREETING.size))
        if magic != MAGIC or version != PROTOCOL_VERSION:
            theirs = version if magic == MAGIC else None
            raise VersionMismatchError(peer, theirs=theirs, ours=PROTOCOL_VERSION)
    except BaseException:
        writer.transport.abort()
        raise


def _hosts(addresses: Iterable[str]) -> set[Host]:
    matches = (_TCP.fullmatch(text.rsplit("/p2p/", 1)[0]) for text in addresses)
    return {(match[1], int(match[2])) for match in matches if match}


async def _nobody_listens(hosts: Collection[Host]) -> bool:
    """Do the machines at all these addresses answer that no process is there?

    Only that is proof of an end: a machine that cannot be reached from here may be alive.
    """
    answers = await asyncio.gather(*(_is_refused(host, port) for host, port in hosts))
    return bool(answers) and all(answers)


async def _is_refused(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _protocol_name(service: str) -> str:
    return f"/swarm/{PROTOCOL_VERSION}/{service}"
