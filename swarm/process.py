"""What every process of a run shares: joining the network, signals, logging, and ending cleanly.

`joined` gives the parts of a process that takes part in a run: the network, the directory, the manifest.
`run_until_signal` runs a coroutine until it ends or the user (or the cloud) asks to stop; then what it
started is closed, and nothing else.

I/O: starts the libp2p daemon; uvloop.
"""

import asyncio
import contextlib
import gc
import logging
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from averaging.daemon import check_address, start_daemon
from averaging.hivemind_network import HivemindNetwork
from swarm.dht import HivemindDirectory, make_identity
from swarm.reach import MOST_PORT, some_reachable

DIRECT_PORT = 10_000  # is added to the daemon's
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joined:
    network: HivemindNetwork
    directory: HivemindDirectory
    addresses: tuple[str, ...]


@contextlib.asynccontextmanager
async def joined(
    join: Sequence[str], *, listen: str = "127.0.0.1", port: int = 0, identity: Path | None = None
) -> AsyncIterator[Joined]:
    """Start the daemon, enter the DHT, and leave both at the end. Raises UserError."""
    folder = Path(tempfile.mkdtemp(prefix="swarm-"))
    p2p = network = None
    try:
        path = identity or folder / "identity"
        key = make_identity(path)
        for address in join:
            check_address(address)
        join = await some_reachable(join)
        p2p = await start_daemon(join=join, listen=listen, port=port, identity=path)
        network = HivemindNetwork(p2p)
        await _listen(network, listen, port)
        directory = await HivemindDirectory.join(p2p, key, join)
        network.use_addresses(directory.addresses)
        yield Joined(network, directory, tuple(await network.addresses()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                await directory.close()
    finally:
        if network is not None:
            network.close()
        if p2p is not None:
            _quiet_engine()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await p2p.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


async def _listen(network: HivemindNetwork, host: str, port: int) -> None:
    """For direct links: at a port that follows from the daemon's, so that a firewall can let it through."""
    wanted = port + DIRECT_PORT if 0 < port <= MOST_PORT - DIRECT_PORT else 0
    try:
        await network.listen(host, wanted)
    except OSError as error:
        log.info("port %d cannot be had for direct links (%s): taking any", wanted, error)
        await network.listen(host)


def _quiet_engine() -> None:
    """From now on its daemon's end is wanted, and what it leaves behind is no error to the user."""
    logging.getLogger("hivemind").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_no_leftover)


def best_address(addresses: tuple[str, ...]) -> str:
    """One address to print: a public or local-network one if there is any."""
    usable = [a for a in addresses if "/tcp/" in a and "/p2p-circuit" not in a] or list(addresses)
    return next((a for a in usable if not a.startswith(("/ip4/127.", "/ip6/"))), usable[0])


async def watch_daemon(network: HivemindNetwork) -> None:
    """Return when the libp2p daemon has died: without it every call would hang."""
    await network.daemon_ended()
    raise RuntimeError("the libp2p daemon died; start this process again")


def run_until_signal(main: Coroutine[Any, Any, int]) -> int:
    """Run `main` on uvloop; SIGINT and SIGTERM cancel it, a second one is ignored. Returns its exit code."""

    async def guarded() -> int:
        task = asyncio.ensure_future(main)
        asked = False

        def stop() -> None:
            nonlocal asked
            if not asked:  # a second Ctrl-C must not cut the clean-up short
                asked = True
                _quiet_engine()  # without setsid a Ctrl-C reaches the daemon, too
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            return await task
        except asyncio.CancelledError:
            return 0

    gc.freeze()  # what was imported lives for good: looking through it takes a sixth of a second each time
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(guarded())


def set_up_logging(name: str, *, verbose: bool) -> None:
    """Log lines to stderr."""
    level = logging.DEBUG if verbose else logging.INFO
    handler = logging.StreamHandler()
    handler.addFilter(_is_news)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("swarm", "averaging", "trainers"):
        logging.getLogger(package).setLevel(level)
    hivemind = logging.getLogger("hivemind")  # it installs a handler of its own on import
    hivemind.handlers, hivemind.propagate = [], True
    hivemind.setLevel(logging.ERROR)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what the engine's daemon says of its own end: `watch_daemon` does, if that was not wanted."""
    return "use of closed network connection" not in record.getMessage()


def _is_no_leftover(record: logging.LogRecord) -> bool:
    """Reads of the DHT that were under way leave tasks of the engine's, which nobody awaits."""
    return "Task was destroyed but it is pending" not in record.getMessage()
