"""The process of one peer: join the network, learn the run, serve a stage, leave on a signal."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from averaging.bandwidth import BYTES_PER_MEGABIT, UplinkMeter
from averaging.network import Network
from swarm.allocator import keep_freed_memory
from swarm.assignment import choose_assisted
from swarm.auxiliary import Auxiliary
from swarm.compute import ComputeThread, spread_over
from swarm.config import RunConfig
from swarm.directory import Directory, all_rosters
from swarm.errors import UserError
from swarm.last_state import LastState
from swarm.loading import shown_loading
from swarm.manifest import Manifest
from swarm.metrics import MetricsSender
from swarm.peer import Peer
from swarm.process import Joined, best_address, joined, watch_daemon
from swarm.volunteer import Volunteer

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
    device_share: float = 1.0  # part of the time for which the device may compute
    bandwidth: float = 0.0  # Mbit/s of the uplink, until it has been measured; 0 if unknown
    aggregate_only: bool = False
    state_folder: Path | None = None  # where its state is kept for a restart


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
        if options.stage is not None and options.stage >= config.model.stages:
            raise UserError(
                f"--stage {options.stage} is out of range: the run has stages 0 to {config.model.stages - 1}"
            )
        about: _Place = {
            "network": here.network,
            "directory": here.directory,
            "config": config,
            "run": manifest.run,
            "name": options.name,
            "addresses": here.addresses,
            "uplink": UplinkMeter(options.bandwidth * BYTES_PER_MEGABIT),
        }
        work = "averaging for others" if options.aggregate_only else f"serving on {device}"
        log.info("run %s (%s), %s", config.name, manifest.run, work)
        peer: Volunteer | Auxiliary
        last_state: LastState | None = None
        with contextlib.ExitStack() as compute_open, contextlib.ExitStack() as bar:
            if options.aggregate_only:
                stage = await _assisted_stage(options.stage, here.directory, config)
                peer = Auxiliary(**about, stage=stage)
            else:
                show = bar.enter_context(shown_loading())
                compute = ComputeThread(
                    threads, device_share=options.device_share, elsewhere=not device.startswith("cpu")
                )
                compute_open.callback(compute.close)
                # Strict runs go on only where all stages stand at one step: from the archive's.
                if options.state_folder is not None and not config.training.strict:
                    last_state = LastState(options.state_folder, config, manifest.run)

                def make_peer(stage: int) -> Peer:
                    return Peer(
                        **about,
                        stage=stage,
                        fixed=options.stage is not None,
                        compute=compute,
                        device=device,
                        archivist=manifest.organizer,
                        last_state=last_state,
                        on_loading=show,
                    )

                peer = Volunteer(
                    me=here.network.peer_id,
                    directory=here.directory,
                    config=config,
                    make_peer=make_peer,
                    stage=options.stage,
                )
            try:
                await _take_part(peer, here, manifest, on_joined=bar.close)
            finally:
                if last_state is not None:
                    await asyncio.shield(last_state.close())
    return 0


async def _take_part(
    peer: Volunteer | Auxiliary, here: Joined, manifest: Manifest, *, on_joined: Callable[[], None]
) -> None:
    """Join, and serve until cancelled; leave in any case, while it still serves."""
    serving: asyncio.Task[None] | None = None
    try:
        await peer.join()
        on_joined()
        log.info("others may also join through %s", best_address(here.addresses))
        serving = asyncio.create_task(_serve(peer, here, manifest))
        await asyncio.shield(serving)
    finally:
        log.info("leaving")
        await asyncio.shield(peer.leave())
        if serving is not None:
            serving.cancel()
            await asyncio.wait([serving])


async def _serve(peer: Volunteer | Auxiliary, here: Joined, manifest: Manifest) -> None:
    sender = MetricsSender(here.network, manifest.organizer, kind="peer", values=peer.metrics)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(peer.run())
        tasks.create_task(sender.run(manifest.config.monitor.period_s))
        tasks.create_task(watch_daemon(here.network))


class _Place(TypedDict):
    """What a peer of either kind is made of."""

    network: Network
    directory: Directory
    config: RunConfig
    run: str
    name: str
    addresses: tuple[str, ...]
    uplink: UplinkMeter


async def _assisted_stage(stage: int | None, directory: Directory, config: RunConfig) -> int:
    if stage is None:
        stage, reason = choose_assisted(await all_rosters(directory, config.model.stages))
        log.info("stage %d: %s", stage, reason)
    return stage


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
