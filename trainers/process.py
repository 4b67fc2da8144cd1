"""The process of one trainer: join the network, learn the run, open the data, train, report."""

import asyncio
import logging
from dataclasses import dataclass

from swarm.directory import all_rosters
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
        rosters = await all_rosters(here.directory, config.model.stages)
        since = max((record.version for roster in rosters for record in roster), default=0)
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
