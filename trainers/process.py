"""The process of one trainer: join the network, learn the run, open the data, train, report."""

import asyncio
import logging
from dataclasses import dataclass

from averaging.errors import LinkError
from swarm.directory import Directory, read_rosters
from swarm.metrics import MetricsSender
from swarm.process import joined, watch_daemon
from trainers.data import Prefetch, evaluation_microbatches, make_tokenizer, training_microbatches
from trainers.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainerOptions:
    join: tuple[str, ...]
    number: int = 0
    minutes: float | None = None
    listen: str = "0.0.0.0"
    port: int = 0


async def train(options: TrainerOptions) -> int:
    """Train to the end of the run, or until cancelled. Raises UserError."""
    async with joined(options.join, listen=options.listen, port=options.port) as here:
        manifest = await here.directory.manifest()
        config = manifest.config
        tokenizer = make_tokenizer(config.data, config.model.vocabulary)
        loop = asyncio.get_running_loop()
        held_out = await loop.run_in_executor(
            None, evaluation_microbatches, config.data, config.training, tokenizer
        )
        since = await _steps_so_far(here.directory, config.model.stages)
        texts = training_microbatches(
            config.data, config.training, tokenizer, trainer=options.number, since=since
        )
        microbatches = Prefetch(texts)
        trainer = Trainer(
            network=here.network,
            directory=here.directory,
            config=config,
            number=options.number,
            microbatches=iter(microbatches),
            held_out=held_out,
            minutes=options.minutes,
        )
        sender = MetricsSender(here.network, manifest.organizer, kind="trainer", values=trainer.metrics)
        try:
            async with asyncio.TaskGroup() as tasks:
                beside = [
                    tasks.create_task(sender.run(config.monitor.period_s)),
                    tasks.create_task(watch_daemon(here.network)),
                ]
                await trainer.run()
                await sender.send_last()
                for task in beside:
                    task.cancel()
        finally:
            microbatches.close()
    return 0


async def _steps_so_far(directory: Directory, stages: int) -> int:
    """As announced; about, for the order of the data only."""
    try:
        rosters = await read_rosters(directory, stages)
    except LinkError as error:
        log.info("how far the run is could not be read: %s", error)
        return 0
    return max((record.version for roster in rosters for record in roster), default=0)
