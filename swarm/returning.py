"""An organizer that is started again finds its run: where peers could be dialled lately, and who lives.

I/O: a file, and the directory.
"""

import asyncio
import contextlib
import re
from pathlib import Path

from averaging.errors import LinkError
from swarm.directory import Directory, read_rosters
from swarm.launch import Living
from swarm.metrics import MOST_PAUSE_S
from swarm.monitor import Monitor

REMEMBER_S, REMEMBERED = 2.0, 32
HEARD_S = MOST_PAUSE_S + 3.0
ANNOUNCED_PERIODS = 1.5  # after which everybody has announced itself
LOOK_AGAIN_S = 0.3


async def remember_peers(directory: Directory, stages: int, path: Path) -> None:
    """Write down where peers are, every now and then, until cancelled."""
    while True:
        await asyncio.sleep(REMEMBER_S)
        with contextlib.suppress(LinkError):
            rosters = await read_rosters(directory, stages)
            serving = (record for roster in rosters for record in roster if record.serves)
            found = [record.addresses[0] for record in serving if record.addresses]
            if found:
                await asyncio.to_thread(_write, path, "\n".join(found[:REMEMBERED]) + "\n")


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
    found = re.search(r"/tcp/(\d+)/", path.read_text()) if path.exists() else None
    return int(found[1]) if found else 0


async def who_lives(directory: Directory, monitor: Monitor) -> Living:
    """Who takes part already: what the run file asks for, or whoever is heard of before long.

    Trainers report to the organizer. A peer may be missing for a while in a DHT that has just lost its first
    node, until it announces itself again. Raises LinkError.
    """
    config, time_s = monitor.config, asyncio.get_running_loop().time
    began_s = time_s()
    wanted = config.local.peers(config.model.stages) if config.local else ()
    trainers = config.local.trainers if config.local else 1
    while True:
        rosters = await read_rosters(directory, config.model.stages)
        waited_s = time_s() - began_s
        found = [[record for record in roster if record.computes] for roster in rosters]
        peers = {stage: len(records) for stage, records in enumerate(found)}
        all_peers = all(peers[stage] >= count for stage, count in enumerate(wanted))
        if (monitor.trainers >= trainers or waited_s > HEARD_S) and (
            all_peers or waited_s > ANNOUNCED_PERIODS * config.network.announce_s
        ):
            return Living(
                peers, monitor.trainers, tuple(record.name for records in found for record in records)
            )
        await asyncio.sleep(LOOK_AGAIN_S)
