"""`swarm run`: validate, start the first DHT peer, publish the run, watch it, end it.

    run folder: the resolved config beside everything that follows
    first DHT peer and signed manifest; the command with which others join
    with `local:` also peers and trainers as processes, and chaos among them
    every period: a line of metrics.jsonl, the live table; now and then a checkpoint
    at the end: children stopped, summary.json, loss.png, W&B closed

I/O: all of it. The run goes on without this process; its own children end with it.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from averaging.daemon import port_is_free
from averaging.errors import AveragingError, LinkError
from swarm.archive import Archive
from swarm.checkpoint import Checkpoint, CheckpointError, checkpoints_in, read_checkpoint
from swarm.config import RunConfig, dump_run
from swarm.dht import HivemindDirectory
from swarm.errors import UserError
from swarm.folder import claimed
from swarm.launch import NOBODY, STATES, LocalRun, last_line
from swarm.leftovers import PROCESSES
from swarm.manifest import pack_manifest
from swarm.metrics import serve_metrics
from swarm.monitor import Monitor
from swarm.process import best_address, joined
from swarm.reach import reachable
from swarm.returning import port_before, read_addresses, remember_peers, who_lives

REPUBLISH_S = 3600.0
CHECKPOINTS = "checkpoints"
ADDRESS = "address"  # of the organizer
PEERS = "peers"  # where some could be dialled lately
# Of a run that is resumed; with its identity it is the same to those who have joined it.
KEPT = (ADDRESS, CHECKPOINTS, PEERS, STATES, PROCESSES, "identity")
LAST_CHECKPOINT_S, STOPPED_CHECKPOINT_S = 120.0, 20.0  # at the run's own end, and when it is stopped before
log = logging.getLogger(__name__)
PLAIN_LINE_S = 10.0  # period of progress lines when the output is no terminal


@dataclass(frozen=True, slots=True)
class RunOptions:
    folder: Path
    host: str = "127.0.0.1"
    port: int = 0
    minutes: float | None = None
    chaos_s: float | None = None
    resume: bool = False


async def organize(config: RunConfig, options: RunOptions) -> int:
    """Carry out one run. Raises UserError; returns the process's exit code."""
    console = Console()
    newest = await _newest_checkpoint(options.folder, config) if options.resume else None
    if options.resume and not options.port:
        # Volunteers have its address in their commands, and some may know nobody else.
        port = port_before(options.folder / ADDRESS)
        if not port or port_is_free(options.host, port):
            options = replace(options, port=port)
        else:
            log.warning("port %d is taken now: volunteers need the new command", port)
    with claimed(options.folder, keep=KEPT if options.resume else ()):
        return await _organize(config, options, console, newest)


async def _organize(
    config: RunConfig, options: RunOptions, console: Console, newest: Checkpoint | None
) -> int:
    folder = options.folder
    (folder / "config.yaml").write_text(dump_run(config))
    identity = folder / "identity"
    join = await reachable(read_addresses(folder / PEERS))
    async with joined(join, listen=options.host, port=options.port, identity=identity) as here:
        await here.directory.publish_manifest(pack_manifest(dump_run(config)))
        republishing = asyncio.create_task(_republish(here.directory, config))
        await here.directory.manifest(here.network.peer_id)
        (folder / ADDRESS).write_text(best_address(here.addresses) + "\n")
        command = f"swarm-peer --join {best_address(here.addresses)}"
        monitor = Monitor(config, folder)
        await serve_metrics(here.network, monitor.take)
        remembering = asyncio.create_task(remember_peers(here.directory, config.model.stages, folder / PEERS))
        archive = Archive(
            network=here.network,
            directory=here.directory,
            config=config,
            folder=folder / CHECKPOINTS,
            newest=newest,
            addresses=here.addresses,
        )
        await archive.start()
        archiving = asyncio.create_task(archive.run())
        address, seed = best_address(here.addresses), config.training.seed
        local = LocalRun(config, address, folder, listen=options.host, seed=seed)
        watching = _Watch(console, monitor, local, options, command)
        patience_s = STOPPED_CHECKPOINT_S
        try:
            console.print(f"others join with:  [bold]{command}[/]", soft_wrap=True)
            if newest is not None:
                console.print(f"going on from step {newest.step}: {newest.folder}", soft_wrap=True)
            living = await who_lives(here.directory, monitor) if join else NOBODY
            if living.trainers or living.names:
                console.print(f"it lives: {len(living.names)} peers, {living.trainers} trainers")
            await local.start(minutes=options.minutes, living=living)
            await asyncio.get_running_loop().run_in_executor(None, monitor.open_wandb)
            await watching.until_the_end(archiving)
            patience_s = LAST_CHECKPOINT_S
        finally:
            for task in (republishing, archiving, remembering):
                task.cancel()
            console.print("ending what this run has started ...")
            await asyncio.wait([archiving])
            await asyncio.shield(_archive_the_end(archive, monitor.step(), console, patience_s))
            await asyncio.shield(archive.leave())
            await asyncio.shield(local.stop())
            summary = monitor.close(local.kills, console)
            _print_summary(console, summary)
    return 0


class _Watch:
    """The organizer's loop."""

    def __init__(
        self, console: Console, monitor: Monitor, local: LocalRun, options: RunOptions, command: str
    ) -> None:
        self._console, self._monitor, self._local = console, monitor, local
        self._options, self._command = options, command
        self._began = time.time()
        self._next_kill: float | None = None
        self._says_archive_failed = False

    async def until_the_end(self, archiving: "asyncio.Task[None]") -> None:
        """Show and record until the trainers are done, the time is over, or a child fails."""
        period_s = self._monitor.config.monitor.period_s
        with Live(console=self._console, auto_refresh=False, transient=False) as live:
            while True:
                await self._replace_the_killed()  # or without its only trainer the run would be over
                if self._is_over():
                    break
                self._monitor.record(len(self._local.kills))
                await self._chaos()
                table = self._monitor.table(self._command, self._local.kills)
                if self._console.is_terminal:
                    live.update(table, refresh=True)
                elif (time.time() - self._began) % PLAIN_LINE_S < period_s:
                    self._console.print(table)
                self._raise_if_a_child_failed()
                if archiving.done() and not self._says_archive_failed:
                    self._says_archive_failed = True  # a run without checkpoints is better than none
                    log.error("the archive failed", exc_info=archiving.exception())
                await asyncio.sleep(period_s)
            self._raise_if_a_child_failed()

    def _is_over(self) -> bool:
        if self._local.trainers_done() if self._local.has_trainers else self._monitor.finished():
            return True
        minutes = self._options.minutes
        # Local trainers know the bound themselves and end with an evaluation: give them time for it.
        allowance_s = 60 if self._local.children else 0
        return minutes is not None and time.time() > self._began + 60 * minutes + allowance_s

    async def _chaos(self) -> None:
        chaos_s = self._options.chaos_s
        if chaos_s is None or self._monitor.step() < 1:
            return
        now = time.time()
        self._next_kill = self._next_kill or now + chaos_s
        if now >= self._next_kill:
            kill = self._local.kill_one(self._monitor.serving())
            self._next_kill = now + (chaos_s if kill else 1.0)
            if kill is not None:
                await self._local.start_peer(kill.stage)

    async def _replace_the_killed(self) -> None:
        for child in self._local.killed_by_others():
            if child.kind == "peer":
                fresh = await self._local.start_peer(child.stage)
            else:
                minutes, past = self._options.minutes, (time.time() - self._began) / 60
                fresh = await self._local.start_trainer(None if minutes is None else max(0.1, minutes - past))
            log.warning(
                "%s was killed, by a user or for want of memory: %s takes its place", child.name, fresh.name
            )

    def _raise_if_a_child_failed(self) -> None:
        failed = self._local.failed()
        if failed is not None:
            raise UserError(f"{failed.name} failed: {last_line(failed.log)} (all of it: {failed.log})")


async def _republish(directory: HivemindDirectory, config: RunConfig) -> None:
    """Records of a day's life, renewed every hour: the run can be joined for a day after this process."""
    while True:
        await asyncio.sleep(REPUBLISH_S)
        try:
            await directory.publish_manifest(pack_manifest(dump_run(config)))
        except LinkError as error:
            log.warning("the run could not be announced anew: %s", error)


async def _archive_the_end(archive: Archive, step: int, console: Console, patience_s: float) -> None:
    """What the run has come to, also when Ctrl-C ends it; else one may go on from the checkpoint before."""
    has_all = step == 0 or (archive.newest is not None and archive.newest.step >= step)
    if archive.every_steps and not has_all:
        console.print(f"writing a checkpoint, for {patience_s:.0f} s at most ...")
        try:
            async with asyncio.timeout(patience_s):
                await archive.save_last()
        except (AveragingError, TimeoutError) as error:
            log.warning("no checkpoint of the end: %s", str(error) or "it took too long")
    if archive.newest is not None:
        console.print(f"checkpoint of step {archive.newest.step}: {archive.newest.folder}", soft_wrap=True)


async def _newest_checkpoint(folder: Path, config: RunConfig) -> Checkpoint | None:
    """None if there is none yet, but peers of the run live. Raises UserError."""
    found = checkpoints_in(folder / CHECKPOINTS)
    if not found:
        if await reachable(read_addresses(folder / PEERS)):
            return None
        raise UserError(
            f"{folder / CHECKPOINTS}: no checkpoint to go on from, and no peer of the run can be reached; "
            "start without --resume"
        )
    try:
        return read_checkpoint(found[-1], config)
    except CheckpointError as error:
        if len(found) == 1:
            raise
        raise UserError(f"{error}; without {found[-1].name} it goes on from {found[-2].name}") from None


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    microbatches, recovery = summary["microbatches"], summary["recovery_s"]
    said = [f"{summary['steps']} steps, {summary['tokens']:,} tokens"]
    if summary["tokens_per_s"] is not None:
        said[0] += f", {summary['tokens_per_s']} tokens/s"
    if len(summary["evaluations"]) > 1:
        said.append(f"held-out loss {summary['initial_loss']} -> {summary['final_loss']} nats per token")
    said.append(
        f"{summary['kills']} kills, {microbatches['rerouted_hops']} hops rerouted, "
        f"{microbatches['lost']} gradients lost"
    )
    if recovery["p50"] is not None:
        said[-1] += f", recovery {recovery['p50']} s (median), {recovery['max']} s (worst)"
    console.print("; ".join(said))
