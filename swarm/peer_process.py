"""The process of one peer: join the network, learn the run, serve a stage, leave on a signal."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from averaging.bandwidth import BYTES_PER_MEGABIT, UplinkMeter
from averaging.errors import LinkError
from averaging.network import Network
from swarm.allocator import keep_freed_memory
from swarm.assignment import choose_assisted, choose_stage
from swarm.auxiliary import Auxiliary
from swarm.compute import ComputeThread, spread_over
from swarm.config import RunConfig
from swarm.directory import Directory
from swarm.errors import NoAnswerError, UserError
from swarm.loading import shown_loading
from swarm.metrics import MetricsSender
from swarm.model import stage_costs
from swarm.peer import Peer
from swarm.process import best_address, joined, watch_daemon
from swarm.records import PeerRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerOptions:
    join: tuple[str, ...]
    stage: int | None  # None: choose
    device: str = "auto"
    name: str = ""
    listen: str = "0.0.0.0"
    port: int = 0
    identity: Path | None = None
    threads: int = 0
    bandwidth: float = 0.0  # Mbit/s of the uplink, until it has been measured; 0 if unknown
    aggregate_only: bool = False


async def serve(options: PeerOptions) -> int:
    """Serve until cancelled. Raises UserError."""
    device = "" if options.aggregate_only else _device(options.device)
    keep_freed_memory()
    threads = options.threads or torch.get_num_threads()
    spread_over(1)  # the event loop, whose decoding must not take cores from `compute`
    async with joined(
        options.join, listen=options.listen, port=options.port, identity=options.identity
    ) as here:
        manifest = await here.directory.manifest()
        config = manifest.config
        stage = options.stage
        if stage is None:
            rosters = await _rosters(here.directory, config.model.stages)
            if options.aggregate_only:
                stage, reason = choose_assisted(rosters)
            else:
                stage, reason = choose_stage(rosters, stage_costs(config.model))
            log.info("stage %d: %s", stage, reason)
        elif stage >= config.model.stages:
            raise UserError(
                f"--stage {stage} is out of range: the run has stages 0 to {config.model.stages - 1}"
            )
        place: _Place = {
            "network": here.network,
            "directory": here.directory,
            "config": config,
            "run": manifest.run,
            "stage": stage,
            "name": options.name,
            "addresses": here.addresses,
            "uplink": UplinkMeter(options.bandwidth * BYTES_PER_MEGABIT),
        }
        peer: Peer | Auxiliary
        work = f"averaging for stage {stage}" if options.aggregate_only else f"stage {stage} on {device}"
        log.info("run %s (%s), %s", config.name, manifest.run, work)
        with shown_loading() as show:
            if options.aggregate_only:
                peer = Auxiliary(**place)
            else:
                peer = Peer(**place, compute=ComputeThread(threads), device=device, on_loading=show)
            await peer.join()
        log.info("others may also join through %s", best_address(here.addresses))
        sender = MetricsSender(here.network, manifest.organizer, kind="peer", values=peer.metrics)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(peer.run())
                tasks.create_task(sender.run(config.monitor.period_s))
                tasks.create_task(watch_daemon(here.network))
        finally:
            log.info("leaving")
            await asyncio.shield(peer.leave())
    return 0


class _Place(TypedDict):
    """What a peer of either kind is made of."""

    network: Network
    directory: Directory
    config: RunConfig
    run: str
    stage: int
    name: str
    addresses: tuple[str, ...]
    uplink: UplinkMeter


async def _rosters(directory: Directory, stages: int) -> list[list[PeerRecord]]:
    try:
        return [await directory.roster(number) for number in range(stages)]
    except LinkError as error:
        raise NoAnswerError(
            f"cannot read who serves which stage ({error}): try again, or name one with --stage"
        ) from None


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
