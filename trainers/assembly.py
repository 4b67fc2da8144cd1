"""What a trainer decides with, by the run's settings; the same for a real trainer and a simulated one.

Pure.
"""

import random
from collections.abc import Sequence

from averaging.network import PeerId
from swarm.config import RunConfig
from swarm.wiring import StageWiring
from trainers.events import Command, LedgerEvent, PeerReady
from trainers.ledger import Ledger
from trainers.throttle import Throttle

VERDICT_DEADLINES = 4  # that a step may take to close around a member that has fallen silent


def wirings_of(config: RunConfig, rng: random.Random) -> list[StageWiring]:
    """One for every stage."""
    prior_s = config.pipeline.wiring_prior_s / config.training.microbatch_tokens
    return [StageWiring(stage=stage, rng=rng, prior_cost_s=prior_s) for stage in range(config.model.stages)]


def ledger_of(
    config: RunConfig, wirings: Sequence[StageWiring], *, trainer: PeerId, session: bytes, strict: bool
) -> Ledger:
    return Ledger(
        trainer=trainer,
        session=session,
        wirings=wirings,
        hop_deadline_s=config.pipeline.hop_deadline_s,
        retain_until_step=config.retains_until_step,
        verdict_s=VERDICT_DEADLINES * config.averaging.progress_deadline_s,
        strict=strict,
    )


def throttle_of(config: RunConfig) -> Throttle:
    return Throttle(most=config.pipeline.in_flight, stages=config.model.stages)


def take(ledger: Ledger, throttle: Throttle, event: LedgerEvent, now_s: float) -> list[Command]:
    """Give the ledger an event, and tell the throttle of a stage that has one peer more, or had no room.

    Returns what to do.
    """
    refusals = ledger.counters["no_room"]
    commands = ledger.handle(event, now_s)
    if ledger.counters["no_room"] > refusals:
        throttle.refused()
    elif isinstance(event, PeerReady):
        throttle.came(ledger.pool(event.stage))
    return commands
