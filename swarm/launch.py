"""The processes that `swarm run` starts on its own machine: peers and trainers, and the chaos among them.

Each child is a real operating-system process in a session of its own, so a Ctrl-C in the terminal reaches
the organizer alone; it then ends its children and nothing else. What a child prints goes to a file in
the run's folder; the last line of one that fails is shown to the user.

I/O: starts and signals processes.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.config import LocalConfig, RunConfig
from swarm.leftovers import end_processes, left_running, note_process

STATES = "states"  # where local peers keep theirs for a restart
STOP_S = 4.0  # beyond what a peer may take to leave


@dataclass(slots=True)
class Child:
    name: str
    kind: str  # "peer" or "trainer"
    stage: int | None
    process: asyncio.subprocess.Process
    log: Path
    started: float

    @property
    def running(self) -> bool:
        return self.process.returncode is None


@dataclass(frozen=True, slots=True)
class Living:
    """Who takes part in the run already, wherever it was started."""

    peers: Mapping[int, Sequence[str]]  # stage -> their names
    trainers: int

    @property
    def names(self) -> list[str]:
        return [name for names in self.peers.values() for name in names]

    @property
    def next_peer(self) -> int:
        """From this number on no `peer-NUMBER` lives."""
        numbers = (re.fullmatch(r"peer-(\d{1,9})", name) for name in self.names)
        return max((int(number[1]) + 1 for number in numbers if number), default=0)


NOBODY = Living(defaultdict(tuple), 0)


@dataclass(frozen=True, slots=True)
class Kill:
    name: str
    stage: int
    time: float  # wall clock


class LocalRun:
    """Starts, watches, kills and ends the local processes of one run."""

    def __init__(
        self,
        config: RunConfig,
        join: str,
        folder: Path,
        *,
        listen: str = "127.0.0.1",
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        """`listen`: where the children can be dialled; volunteers elsewhere must reach them, too."""
        self._config, self._folder = config, folder
        self.join = [join]  # what children are told; one of these addresses must live when they start
        self._listen, self._verbose = listen, verbose
        self._rng = random.Random(seed)
        self._numbers = {"peer": 0, "trainer": 0}
        self.children: list[Child] = []
        self.kills: list[Kill] = []
        self._killed_by_others: set[str] = set()
        self.left = left_running(folder)  # by an organizer that died: they end with these
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    async def start(self, *, minutes: float | None, living: Living = NOBODY) -> None:
        """What the run file asks for, but for what lives already."""
        local = self._config.local
        if local is None:
            return
        counts = local.peers(self._config.model.stages)
        self._numbers = {"peer": living.next_peer, "trainer": living.trainers}
        for round_number in range(max(counts)):
            for stage, count in enumerate(counts):
                if round_number < count - len(living.peers[stage]):
                    await self.start_peer(stage)
        for _ in range(local.trainers - living.trainers):
            await self.start_trainer(minutes)

    async def start_peer(self, stage: int | None) -> Child:
        """One of `stage`; None: of whichever needs it."""
        local = self._config.local or LocalConfig()
        chosen = "auto" if stage is None else str(stage)
        arguments = ["swarm.cli", "--stage", chosen, "--threads", str(local.threads)]
        arguments += ["--device-share", str(local.device_share)]
        arguments += ["--state-folder", str(self._folder / STATES)]
        arguments += ["--name", f"peer-{self._numbers['peer']}", *(["--verbose"] if self._verbose else [])]
        return await self._start("peer", stage, arguments)

    async def start_trainer(self, minutes: float | None) -> Child:
        """One that ends after so many minutes, or with the run."""
        bound = () if minutes is None else ("--minutes", f"{minutes:.3f}")
        number = str(self._numbers["trainer"])
        return await self._start("trainer", None, ["trainers.cli", "trainer", "--number", number, *bound])

    async def _start(self, kind: str, stage: int | None, arguments: Sequence[str]) -> Child:
        name = f"{kind}-{self._numbers[kind]}"
        self._numbers[kind] += 1
        log = self._folder / "logs" / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        joining = [part for address in self.join for part in ("--join", address)]
        command = [sys.executable, "-m", *arguments, *joining, "--listen", self._listen]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
            )
        child = Child(name, kind, stage, process, log, time.time())
        self.children.append(child)
        note_process(self._folder, process.pid)
        return child

    def dispensable(self, serving: Sequence[str]) -> list[Child]:
        """Peers of these names whose stage has another one."""
        peers = [c for c in self.children if c.kind == "peer" and c.running and c.name in serving]
        return [c for c in peers if sum(other.stage == c.stage for other in peers) > 1]

    def kill_one(self, serving: Sequence[str]) -> Kill | None:
        """SIGKILL a random peer among those that serve, never the last of a stage (its state is there)."""
        able = self.dispensable(serving)
        if not able:
            return None
        victim = self._rng.choice(able)
        assert victim.stage is not None
        victim.process.kill()
        kill = Kill(victim.name, victim.stage, time.time())
        self.kills.append(kill)
        return kill

    @property
    def _killed(self) -> set[str]:
        """The names of all that were, by whomever."""
        return {kill.name for kill in self.kills} | self._killed_by_others

    def killed_by_others(self) -> list[Child]:
        """Whom somebody has killed since the last look: the system, if memory is short, or a user."""
        killed = self._killed
        found = [c for c in self.children if c.name not in killed and c.process.returncode == -signal.SIGKILL]
        self._killed_by_others.update(child.name for child in found)
        return found

    def failed(self) -> Child | None:
        """A child that ended by itself with an error."""
        killed = self._killed
        return next(
            (c for c in self.children if c.process.returncode not in (None, 0) and c.name not in killed), None
        )

    @property
    def has_trainers(self) -> bool:
        return any(c.kind == "trainer" for c in self.children)

    def trainers_done(self) -> bool:
        return all(not c.running for c in self.children if c.kind == "trainer")

    async def stop(self) -> None:
        """End every child, and what is left: SIGTERM, and SIGKILL for those that do not listen."""
        limit_s = self._config.network.leave_s + STOP_S
        ending_left = asyncio.create_task(asyncio.to_thread(end_processes, self.left, within_s=limit_s))
        running = [c for c in self.children if c.running]
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        waiting = [asyncio.ensure_future(c.process.wait()) for c in running]
        if waiting:
            await asyncio.wait(waiting, timeout=limit_s)
        for child in running:
            if child.running:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
                await child.process.wait()
        await ending_left


def last_line(log: Path) -> str:
    """What a failed child had to say."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(it printed nothing)"
