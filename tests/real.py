"""Real processes over hivemind for tests: peers as subprocesses, the trainer in the test's own loop."""

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from averaging.errors import AveragingError
from averaging.network import PeerId
from swarm.archive import Archive
from swarm.checkpoint import Checkpoint
from swarm.compute import ComputeThread
from swarm.config import RunConfig, dump_run
from swarm.launch import Child, LocalRun
from swarm.manifest import pack_manifest
from swarm.model import build_stage
from swarm.process import Joined, joined
from swarm.scope import at_stage
from swarm.stage import Stage
from swarm.state import StateLoader
from trainers.trainer import Trainer

FOUND_S = 20.0
STEPPED = re.compile(r"applied step (\d+) with .*, state (\w+)")


@dataclass(slots=True)
class RealSwarm:
    config: RunConfig
    here: Joined
    local: LocalRun
    trainer: Trainer | None = None

    @property
    def peers(self) -> list[Child]:
        return self.local.children

    async def start_peer(self, stage: int | None) -> Child:
        return await self.local.start_peer(stage)

    def living(self, stage: int | None = None) -> list[Child]:
        return [p for p in self.peers if p.running and is_serving(p) and (stage is None or p.stage == stage)]

    def kill(self, peer: Child, number: signal.Signals = signal.SIGKILL) -> None:
        peer.process.send_signal(number)

    async def parameters(self, version: int) -> dict[str, torch.Tensor]:
        """The whole model, each stage's part from one of its living peers at `version`."""
        whole: dict[str, torch.Tensor] = {}
        for stage in range(self.config.model.stages):
            state = await self._state_of(stage, version)
            prefix = "parameter/"
            whole |= {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        return whole

    async def archive(self, folder: Path, newest: Checkpoint | None = None) -> Archive:
        """In this process; `newest` is there for peers from now on."""
        archive = Archive(
            network=self.here.network,
            directory=self.here.directory,
            config=self.config,
            folder=folder,
            newest=newest,
            addresses=self.here.addresses,
        )
        await archive.start()
        return archive

    async def _state_of(self, stage: int, version: int) -> dict[str, torch.Tensor]:
        end = time.monotonic() + FOUND_S
        while time.monotonic() < end:  # a roster shows after a while what is
            for record in await self.here.directory.roster(stage):
                state = await self._state(record.peer, stage, version)
                if state is not None:
                    return state
            await asyncio.sleep(0.5)
        raise AssertionError(f"no peer of stage {stage} has version {version}\n{self.logs()}")

    async def _state(self, peer: PeerId, stage: int, version: int) -> dict[str, torch.Tensor] | None:
        """As a newcomer would load it; None if the peer is at another version or does not answer."""
        module = build_stage(self.config.model, stage, seed=self.config.training.seed)
        copy = Stage(module, self.config.training, stage=stage, stages=self.config.model.stages)
        compute = ComputeThread(1)
        loader = StateLoader(at_stage(self.here.network, stage), copy, compute, replay=copy.replay)
        try:
            loaded = await loader.load([peer])
        except AveragingError as error:
            print(f"no state from {peer[-8:]}: {error}")
            return None
        finally:
            loader.release()
            compute.close()
        if not loaded or copy.version != version:
            print(f"{peer[-8:]}: loaded {loaded}, version {copy.version}")
            return None
        return copy.state()

    async def until(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {limit_s:.0f} s\n{self.logs()}"
            await asyncio.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"== {p.name} (stage {p.stage})\n{text(p)[-1500:]}" for p in self.peers)


def text(peer: Child) -> str:
    return peer.log.read_text(errors="replace")


def is_serving(peer: Child) -> bool:
    return "serving stage" in text(peer)


def hashes(peer: Child) -> dict[int, str]:
    """State hash after every step that this process applied."""
    return {int(step): state for step, state in STEPPED.findall(text(peer))}


@contextlib.asynccontextmanager
async def real_swarm(config: RunConfig, folder: Path) -> AsyncIterator[RealSwarm]:
    """An announced run with nobody in it yet; ends every process it started."""
    async with joined([], identity=folder / "identity") as here:
        text = dump_run(config)
        await here.directory.publish_manifest(pack_manifest(text))
        await here.directory.manifest(here.network.peer_id)
        local = LocalRun(config, here.addresses[0], folder, verbose=True)
        try:
            yield RealSwarm(config, here, local)
        finally:
            await local.stop()
