"""An organizer that is started again finds its run: where peers could be dialled lately, and who lives.

I/O: a file, and the directory.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from averaging.errors import LinkError
from swarm.directory import Directory, read_rosters
from swarm.launch import Living
from swarm.metrics import MOST_PAUSE_S
from swarm.monitor import Monitor
from swarm.process import best_address
from swarm.reach import tcp_place

REMEMBER_S, REMEMBERED = 2.0, 32
HEARD_S = MOST_PAUSE_S + 3.0
ANNOUNCED_PERIODS = 1.5  # after which everybody has announced itself
LOOK_AGAIN_S = 0.3
log = logging.getLogger(__name__)


async def remember_peers(directory: Directory, stages: int, path: Path) -> None:
    """Write down where peers are, every now and then, until cancelled."""
    while True:
        await asyncio.sleep(REMEMBER_S)
        with contextlib.suppress(LinkError):
            rosters = await read_rosters(directory, stages)
            found = (record.addresses for roster in rosters for record in roster if record.serves)
            known = [addresses for addresses in found if addresses][:REMEMBERED]
            # The first may be a loopback's: that is the one that stays, if the peer is on this machine.
            written = dict.fromkeys([*map(best_address, known), *(addresses[0] for addresses in known)])
            if written:
                await asyncio.to_thread(_write, path, "\n".join(written) + "\n")


def _write(path: Path, text: str) -> None:
    """All of it or nothing: the organizer may be killed at any moment."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def read_addresses(path: Path) -> list[str]:
    """What was written down; nothing if that was never done."""
    return path.read_text().split() if path.exists() else []


def port_before(path: Path) -> int:
    """The port in the address that was written down there; 0 if there is none."""
    place = tcp_place(path.read_text().strip()) if path.exists() else None
    return place[1] if place else 0


async def who_lives(directory: Directory, monitor: Monitor) -> Living:
    """Who takes part already: what the run file asks for, or whoever is heard of before long.

    Trainers report to the organizer. A peer may be missing for a while in a DHT that has just lost its first
    node, until it announces itself again.
    """
    config, time_s = monitor.config, asyncio.get_running_loop().time
    began_s = time_s()
    wanted = config.local.peers(config.model.stages) if config.local else ()
    trainers = config.local.trainers if config.local else 1
    peers: dict[int, tuple[str, ...]] = dict.fromkeys(range(config.model.stages), ())
    while True:
        waited_s = time_s() - began_s
        try:
            rosters = await read_rosters(directory, config.model.stages)
            found = ((record.name for record in roster if record.computes) for roster in rosters)
            peers = dict(enumerate(map(tuple, found)))
        except LinkError as error:  # too many peers are better than none: those who live go on
            log.warning("%s", error)
        has_peers = all(len(peers[stage]) >= count for stage, count in enumerate(wanted))
        if (monitor.trainers >= trainers or waited_s > HEARD_S) and (
            has_peers or waited_s > ANNOUNCED_PERIODS * config.network.announce_s
        ):
            return Living(peers, monitor.trainers)
        await asyncio.sleep(LOOK_AGAIN_S)
