"""Seeded deaths and departures in a strict in-memory swarm, aimed at the moments that matter, and the outcome
compared with plain single-process training.

`python -m tests.strict_schedules SEED [COUNT]` replays one schedule (or several).
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable

from averaging.memory_network import Link
from swarm.mailbox import Phase
from tests.plain import train_plain, worst_difference
from tests.schedules import MODEL, Schedule, main
from tests.sim import Sim, SimPeer, tiny_run

STEPS, MICROBATCHES = 6, 8  # per step
STRICT = (
    MODEL,
    "training.strict=true",
    "training.delayed_updates=false",
    f"training.steps={STEPS}",
    "training.optimizer.clip_norm=null",
    "training.optimizer.warmup_steps=2",
    "training.optimizer.lr=1.0e-2",
)


def is_computing(peer: SimPeer) -> bool:
    """It works on hops but has accumulated nothing: all that dies with it is under way."""
    hops = list(peer.peer.server.mailbox)
    return bool(hops) and not any(s.tokens for s in peer.peer.stage.sums) and not is_averaging(peer)


def has_accumulated(peer: SimPeer) -> bool:
    return any(hop.phase is Phase.ACCUMULATED for hop in peer.peer.server.mailbox) and not is_averaging(peer)


def is_averaging(peer: SimPeer) -> bool:
    """Between the plan and the verdict."""
    return peer.compute.held


MOMENTS: dict[str, Callable[[SimPeer], bool]] = {
    "before it accumulated": is_computing,
    "after it accumulated": has_accumulated,
    "during averaging": is_averaging,
}


class StrictSchedule(Schedule):
    """One strict run: peers are killed or asked to stop at chosen moments of its steps, fresh ones take their
    place."""

    command = "python -m tests.strict_schedules"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.rng = random.Random(f"strict {seed}")

    async def run(self) -> None:
        sim = self.sim = Sim(tiny_run(*STRICT), self.seed, compute_s=0.05)
        sim.hub.link = lambda a, b: Link(latency_s=self.rng.uniform(0.001, 0.02))
        for stage in range(3):
            for _ in range(self.rng.choice([2, 2, 3])):
                await sim.start_peer(stage)
        await sim.start_trainer()
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        self.spy(sim.pipeline.ledger)
        killing = asyncio.create_task(self.kill_some())
        try:
            await self.train()
        finally:
            killing.cancel()
        await sim.until(
            lambda: all(p.peer.stage.version == STEPS for p in sim.peers.values() if ready(p)), 60
        )
        self.check()

    async def train(self) -> None:
        """What the trainer does in strict mode: a whole step, then wait until it is settled everywhere."""
        ledger = self.sim.pipeline.ledger
        for step in range(STEPS):
            for number in range(step * MICROBATCHES, (step + 1) * MICROBATCHES):
                self.sim.issue(number, step=step)
            await self.sim.until(lambda: not ledger.unsettled and ledger.version > step, 400)  # noqa: B023
            self.note(f"step {step} is settled")

    async def kill_some(self) -> None:
        for _ in range(self.rng.randint(2, 5)):
            moment = self.rng.choice(sorted(MOMENTS))
            victim = await self.candidate(MOMENTS[moment])
            how = self.rng.choice(["kill", "terminate"])
            self.faults[f"{how} {moment}"] += 1
            self.note(f"{how} {victim.id} {moment}")
            if how == "kill":
                self.sim.kill(victim.id)
            else:
                await self.sim.terminate(victim.id)
                self.faults["handed over"] += victim.peer.counters["handed_over"]
            await asyncio.sleep(self.rng.uniform(0, 0.5))
            self.note(f"start {await self.sim.start_peer(victim.stage)}")
            await asyncio.sleep(self.rng.uniform(0, 3))

    async def candidate(self, condition: Callable[[SimPeer], bool]) -> SimPeer:
        """Wait for a peer in the chosen condition; another one of its stage must hold the same state."""
        while True:
            peers = [p for p in self.sim.peers.values() if ready(p)]
            states = Counter((p.stage, p.peer.stage.version) for p in peers)
            found = [p for p in peers if states[p.stage, p.peer.stage.version] > 1 and condition(p)]
            if found:
                return self.rng.choice(found)
            await asyncio.sleep(0.001)

    def check(self) -> None:
        """The parameters are those of plain training, at every living peer."""
        sim = self.sim
        assert not sim.errors, sim.errors
        plain = train_plain(sim.config, map(sim.tokens, itertools.count()), STEPS)
        for peer in [p for p in sim.peers.values() if ready(p)]:
            ours = {name: parameter.detach() for name, parameter in peer.peer.stage.module.named_parameters()}
            worst, name = worst_difference(ours, {n: plain[n] for n in ours})
            assert worst <= 1e-5, f"{name} of {peer.id} is off by {worst:.1e}"


def ready(peer: SimPeer) -> bool:
    return hasattr(peer.peer, "updater") and bool(peer.peer.updater.state_hash)


if __name__ == "__main__":
    main(StrictSchedule)
