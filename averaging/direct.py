"""Direct links: TLS between the processes of two peers, past both of their daemons.

    A asks B for an offer, through the daemons: a port, a token for A alone, the hash of B's certificate
    A connects there, checks the certificate, says the token and a service, and is greeted as by the daemon
    whoever cannot connect stays with the daemons, and asks again after a while

The daemons know each other by their identities: so the certificate proves B to A, and the token A to B. What
else they give, relays and hole punching, is still there for whoever needs it; they take as much of the
processor for every byte as both peers together.

I/O: one asyncio loop.
"""

import asyncio
import datetime
import hashlib
import logging
import secrets
import socket
import ssl
import struct
import tempfile
import weakref
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from averaging.bounded import forget_oldest
from averaging.network import PeerId

OFFER = struct.Struct("<H16s32s")  # port, token, SHA-256 of the certificate
HELLO = struct.Struct("<16s32s")  # token, service
HELLO_S = 5.0  # from the connection to the hello
FIND_S = 3.0  # to see whether an offer can be taken up
ACCEPT_AGAIN_S = 1.0
SHUTDOWN_S = 1.0  # for the other end to agree that a connection is over
AGAIN_S = 30.0  # after a path was not found, or broke
MOST_HOSTS = 4  # tried for one peer
MOST_PEERS = 16_384  # of whom anything is remembered
MOST_WAITING, MOST_WAITING_EACH = 256, 32  # connections of which nobody knows yet whose they are; of one host
# A machine that has vanished says nothing: after some 35 s its connections are over.
KEEPALIVE = {
    "TCP_KEEPIDLE": 20,
    "TCP_KEEPALIVE": 20,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 35_000,
}
YEARS = datetime.timedelta(days=3650)

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Answer = Callable[[PeerId, str, asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]
log = logging.getLogger(__name__)


class DirectListener:
    """Where others may connect to this process."""

    def __init__(self, answer: Answer) -> None:
        """`answer` is given the peer, the service, and both ends of a stream on which nothing is unread."""
        self._answer = answer
        self._tokens: dict[PeerId, bytes] = {}
        self._peers: dict[bytes, PeerId] = {}
        self._waiting: dict[asyncio.Task[None], str] = {}  # for a hello, from which host
        self._answering: set[asyncio.Task[None]] = set()
        self._open: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._accepting: asyncio.Task[None] | None = None
        self._port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen, at any free port if it is 0. Raises OSError."""
        self._context, self._certificate = _own_context()
        listening = socket.create_server((host, port))
        listening.setblocking(False)
        self._port = listening.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(listening))

    def offer_to(self, peer: PeerId) -> bytes:
        """How `peer`, and nobody else, may connect."""
        token = self._tokens.setdefault(peer, secrets.token_bytes(16))
        self._peers[token] = peer
        if len(self._tokens) > MOST_PEERS:
            del self._peers[self._tokens.pop(next(iter(self._tokens)))]
        return OFFER.pack(self._port, token, self._certificate)

    def close(self) -> None:
        """Accept nobody any more, and break what is open."""
        for task in (self._accepting, *self._waiting):
            if task is not None:
                task.cancel()
        _abort_all(self._open)

    async def _accept(self, listening: socket.socket) -> None:
        with listening:
            while True:
                try:
                    connection, address = await asyncio.get_running_loop().sock_accept(listening)
                except OSError as error:  # no more files, or whoever came has gone already
                    log.info("a direct connection could not be accepted: %s", error)
                    await asyncio.sleep(ACCEPT_AGAIN_S)
                    continue
                host, waiting = address[0], list(self._waiting.values())
                if len(waiting) >= MOST_WAITING or waiting.count(host) >= MOST_WAITING_EACH:
                    connection.close()
                    continue
                task = asyncio.create_task(self._welcome(connection))
                self._waiting[task] = host
                task.add_done_callback(self._waiting.pop)

    async def _welcome(self, connection: socket.socket) -> None:
        """Hear who has connected, and for what."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(HELLO_S):
                reader, writer = await self._encrypted(connection)
                token, service = HELLO.unpack(await reader.readexactly(HELLO.size))
        except (OSError, EOFError, TimeoutError) as error:
            log.debug("somebody came without a hello: %r", error)
            return connection.close() if writer is None else writer.transport.abort()
        if token not in self._peers:
            return writer.transport.abort()
        peer, name = self._peers[token], service.rstrip(b"\0").decode(errors="replace")
        self._open.add(writer)
        task = asyncio.create_task(self._answer(peer, name, reader, writer))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _encrypted(self, connection: socket.socket) -> Ends:
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        _keep_alive(connection)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=self._context,
            ssl_handshake_timeout=HELLO_S,
            ssl_shutdown_timeout=SHUTDOWN_S,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


@dataclass(frozen=True, slots=True)
class _Path:
    host: str
    port: int
    token: bytes
    certificate: bytes


class DirectPaths:
    """To which peers this process can connect."""

    def __init__(self) -> None:
        self._paths: dict[PeerId, _Path] = {}
        self._not_before_s: dict[PeerId, float] = {}  # peers for which a path was looked for
        self._open: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE  # `_connect` checks

    def knows(self, peer: PeerId) -> bool:
        return peer in self._paths

    def wants(self, peer: PeerId) -> bool:
        """Is it time to look for a path? Whoever is told so looks for one."""
        now_s = asyncio.get_running_loop().time()
        if peer in self._paths or now_s < self._not_before_s.get(peer, now_s):
            return False
        self._not_before_s[peer] = now_s + AGAIN_S
        forget_oldest(self._not_before_s, MOST_PEERS)
        return True

    async def find(self, peer: PeerId, offer: bytes, hosts: Iterable[str]) -> None:
        """Try the offer of `peer` at the hosts it was met at."""
        port, token, certificate = OFFER.unpack(offer)
        for host in sorted(set(hosts))[:MOST_HOSTS]:
            path = _Path(host, port, token, certificate)
            try:
                async with asyncio.timeout(FIND_S):
                    _, writer = await self._connect(path)
            except (OSError, EOFError, TimeoutError) as error:
                log.debug("no direct path to %s at %s:%d: %s", peer[-8:], host, port, error)
                continue
            writer.transport.abort()
            self._paths[peer] = path
            forget_oldest(self._paths, MOST_PEERS)
            return

    async def open(self, peer: PeerId, service: str) -> Ends:
        """A stream that waits for its greeting. Raises OSError or EOFError."""
        path = self._paths[peer]
        reader, writer = await self._connect(path)
        writer.write(HELLO.pack(path.token, service.encode()))
        self._open.add(writer)
        return reader, writer

    def forget(self, peer: PeerId, why: str) -> None:
        """It does not answer there; no-op without a path."""
        if self._paths.pop(peer, None) is not None:
            log.info("the direct path to %s broke: %s", peer[-8:], why)
            self._not_before_s[peer] = asyncio.get_running_loop().time() + AGAIN_S

    def close(self) -> None:
        """Break what is open."""
        _abort_all(self._open)

    async def _connect(self, path: _Path) -> Ends:
        """Raises OSError or EOFError."""
        reader, writer = await asyncio.open_connection(
            path.host, path.port, ssl=self._context, ssl_shutdown_timeout=SHUTDOWN_S
        )
        _keep_alive(writer.get_extra_info("socket"))
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if hashlib.sha256(shown or b"").digest() != path.certificate:
            writer.transport.abort()
            raise ConnectionError("somebody else's certificate")
        return reader, writer


def _keep_alive(connection: socket.socket) -> None:
    """Notice when the other machine has vanished; systems differ in what can be set."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _abort_all(writers: Iterable[asyncio.StreamWriter]) -> None:
    for writer in list(writers):
        writer.transport.abort()


def _own_context() -> tuple[ssl.SSLContext, bytes]:
    """A server's side of TLS with a certificate of its own, and that certificate's SHA-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "swarm")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - YEARS)
        .not_valid_after(now + YEARS)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.NamedTemporaryFile() as file:  # readable by its owner only; the library takes no bytes
        file.write(secret + certificate.public_bytes(pem))
        file.flush()
        context.load_cert_chain(file.name)
    return context, certificate.fingerprint(hashes.SHA256())
