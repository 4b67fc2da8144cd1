"""Starting hivemind's libp2p daemon, the only child process of a peer, and connecting it with others.

It ends with us, also when we are killed: it exits when its control connection closes.

I/O: starts a process.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from averaging.errors import NoAnswerError, PortTakenError, UserError
from averaging.network import PeerId

# Read by the daemon: one core carries 600 MB/s, and more would only take them from training.
os.environ.setdefault("GOMAXPROCS", "1")
log = logging.getLogger(__name__)
DAEMON_START_S = 90.0  # the engine's own 15 s is too short on loaded machines


async def start_daemon(
    *, join: Sequence[str] = (), listen: str = "127.0.0.1", port: int = 0, identity: Path
) -> P2P:
    """Start the libp2p daemon. Raises UserError with one clear line when the address or port is wrong."""
    for address in join:
        check_address(address)
    try:
        p2p = await _InItsOwnSession.create(
            initial_peers=list(join) or None,
            host_maddrs=[f"/ip4/{listen}/tcp/{port}"],
            identity_path=str(identity),
            check_if_identity_free=False,
            startup_timeout=DAEMON_START_S,
            nat_port_map=listen not in ("127.0.0.1", "localhost"),
            auto_nat=listen not in ("127.0.0.1", "localhost"),
        )
    except P2PDaemonError as error:
        text = str(error)
        if port and not port_is_free(listen, port):
            raise PortTakenError(
                f"port {port} on {listen} is taken by another process; choose another with --port"
            ) from None
        if join:
            raise no_answer(join, DAEMON_START_S) from None
        raise UserError(f"the libp2p daemon did not start: {text}") from None
    _let_it_end(p2p)
    return p2p


async def connect(p2p: P2P, peer: PeerId, addresses: Sequence[str]) -> None:
    """Connect the daemons where `peer` says that it may be dialled. Raises P2PDaemonError."""
    known = []
    for text in addresses:
        with contextlib.suppress(ValueError, LookupError):  # a stranger may announce anything
            # Without the peer id at its end: the engine encodes that part wrongly for its daemon.
            known.append(Multiaddr(text.rsplit("/p2p/", 1)[0]))
    if not known:
        raise P2PDaemonError(f"no address in {', '.join(addresses)[:100]!r}")
    try:
        await p2p._client.connect(PeerID.from_base58(peer), known)
    except (OSError, EOFError) as error:
        raise P2PDaemonError(f"the daemon here does not answer: {error}") from None


class _InItsOwnSession(P2P):
    """A Ctrl-C in a terminal is for us alone: we need the daemon to leave in order. Needs util-linux."""

    def _make_process_args(self, *args: object, **kwargs: object) -> list[str]:
        command: list[str] = super()._make_process_args(*args, **kwargs)
        setsid = shutil.which("setsid")
        return command if setsid is None else [setsid, *command]


def _let_it_end(p2p: P2P) -> None:
    """Whoever needs the daemon watches its process; its control connection need not print a traceback.

    If somebody kills the daemon, what it had not read by then resets the connection; the engine's two tasks
    there expect an orderly end only.
    """
    control = p2p._client.control
    for task in (control._read_task, control._write_task):
        task.add_done_callback(_look_at_error)


def _look_at_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("the libp2p daemon's control connection ended: %r", error)


def no_answer(join: Sequence[str], within_s: float) -> NoAnswerError:
    """What a user can do about it."""
    return NoAnswerError(
        f"no answer from {', '.join(join)} within {within_s:.0f} s: check that the organizer runs, that the "
        "address is copied whole, and that its port is reachable from here"
    )


def check_address(address: str) -> None:
    """Raises UserError if it is none of a peer."""
    try:
        parsed = Multiaddr(address)
        parsed["p2p"]
    except (ValueError, KeyError, LookupError):
        raise UserError(
            f"--join {address!r} is not a peer's address; it looks like /ip4/HOST/tcp/PORT/p2p/PEER"
        ) from None
    except Exception as error:  # the address library raises types of its own; any of them is a bad address
        raise UserError(f"--join {address!r} is not a peer's address: {error}") from None


def port_is_free(host: str, port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
