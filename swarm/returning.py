"""An organizer that is started again finds its run: where peers could be dialled lately, and who lives.

I/O: a file, and the directory.
"""

import asyncio
import contextlib
import time
from pathlib import Path

from averaging.errors import LinkError
from swarm.directory import Directory, read_rosters
from swarm.launch import Living
from swarm.metrics import MOST_PAUSE_S
from swarm.monitor import Monitor

REMEMBER_S, REMEMBERED = 5.0, 32
HEARD_S = MOST_PAUSE_S + 3.0


async def remember_peers(directory: Directory, stages: int, path: Path) -> None:
    """Write down where peers are, every now and then, until cancelled."""
    while True:
        await asyncio.sleep(REMEMBER_S)
        with contextlib.suppress(LinkError):
            rosters = await read_rosters(directory, stages)
            serving = (record for roster in rosters for record in roster if record.serves)
            found = [record.addresses[0] for record in serving if record.addresses]
            if found:
                await asyncio.to_thread(path.write_text, "\n".join(found[:REMEMBERED]) + "\n")


def read_addresses(path: Path) -> list[str]:
    """What was written down; nothing if that was never done."""
    return path.read_text().split() if path.exists() else []


async def who_lives(directory: Directory, monitor: Monitor) -> Living:
    """Who takes part already; trainers are heard of before long. Raises LinkError."""
    rosters = await read_rosters(directory, monitor.config.model.stages)
    peers = {stage: sum(record.serves for record in roster) for stage, roster in enumerate(rosters)}
    end_s = time.monotonic() + (HEARD_S if any(peers.values()) else 0)
    while not monitor.trainers and time.monotonic() < end_s:  # noqa: ASYNC110 - once in a run
        await asyncio.sleep(0.2)
    return Living(peers, monitor.trainers)
