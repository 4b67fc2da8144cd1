"""Seeded schedules of faults against a whole in-memory swarm, and the invariants they must not break.

`python -m tests.schedules SEED [COUNT]` replays one schedule (or several) and prints its event log.
"""

import asyncio
import gc
import logging
import random
import re
import sys
import time
from collections import Counter
from typing import TypeVar

from averaging import virtual_time
from averaging.memory_network import Link
from tests.sim import PACKAGES, Sim, tiny_run
from trainers import events as ev
from trainers.ledger import Ledger

MICROBATCHES = 40
MODEL = "model.factory=tests.tiny:build"
FAULTS = ["kill", "kill", "kill two", "terminate", "terminate", "hang", "hang long", "cut", "cut trainer"]
S = TypeVar("S", bound="Schedule")


def profile(seed: int) -> list[str]:
    """The configuration of a schedule: delayed updates, codecs and kept graphs vary."""
    rng = random.Random(f"profile {seed}")
    return [
        MODEL,
        f"training.delayed_updates={rng.choice(['true', 'false'])}",
        f"pipeline.keep_graphs={rng.choice([0, 2, 8])}",
        f"averaging.codec={rng.choice(['float32', 'int8'])}",
    ]


class Schedule:
    """One run: faults by the seed until every microbatch is settled, then the invariants."""

    command = "python -m tests.schedules"

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.log: list[str] = []
        self.faults = Counter[str]()  # dealt so far
        self.reached = [0, 0, 0]  # the version that all peers of a stage had, as the trainer knew them

    def spy(self, ledger: Ledger) -> None:
        """Note which version the trainer has seen every stage reach, and trace a microbatch (-t NUMBER)."""
        traced = int(sys.argv[sys.argv.index("-t") + 1]).to_bytes(16, "big") if "-t" in sys.argv else None
        handle = ledger.handle

        def spying(event: ev.LedgerEvent, now_s: float) -> list[ev.Command]:
            commands = handle(event, now_s)
            for stage in range(3):
                self.reached[stage] = max(self.reached[stage], ledger.floor(stage))
            if traced is not None:
                for thing, sign in [(event, "->"), *((c, "<-") for c in commands)]:
                    if repr(traced) in repr(thing):
                        self.note(f"{sign} {brief(thing, traced)[:300]}")
            return commands

        ledger.handle = spying
        if traced is not None:
            self.sim.on_log = self.note

    def note(self, what: str) -> None:
        self.log.append(f"{self.sim.clock():8.3f}  {what}")

    async def run(self) -> None:
        sim = self.sim = Sim(tiny_run(*profile(self.seed)), self.seed)
        sim.hub.link = self.link
        sim.hub.fate = self.fate
        self.trouble = self.rng.choice([0.0, 0.01, 0.03])
        for stage in range(3):
            for _ in range(self.rng.choice([2, 2, 3])):
                await sim.start_peer(stage)
        await sim.start_trainer()
        self.spy(sim.pipeline.ledger)
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        feeding = asyncio.create_task(self.feed())
        breaking = asyncio.create_task(self.break_things())
        try:
            await sim.until(lambda: self.issued_all and self.all_settled(), 400)
        except TimeoutError:
            self.dump()
            raise
        finally:
            feeding.cancel()
            breaking.cancel()
        self.trouble = 0.0
        for peer in list(sim.hub.hung):
            sim.hub.resume(peer)
        sim.hub.cut.clear()
        self.note("all settled; waiting for retained bytes")
        await sim.until(lambda: sim.retained_bytes(below=MICROBATCHES) == 0, 60)
        self.note("the trainer leaves")
        sim.pipeline_task.cancel()
        await sim.until(lambda: sim.retained_bytes() == 0, 60)
        self.check()

    def dump(self) -> None:
        """Note what hangs: the microbatches that are not settled and the peers' steps."""
        for flight in list(self.sim.pipeline.ledger._flights.values()):
            if int.from_bytes(flight.id, "big") < MICROBATCHES:
                self.note(f"{int.from_bytes(flight.id, 'big')} attempt {flight.attempt} {flight.unplaced}")
                for hop in flight.hops:
                    self.note(f"    {brief(hop, b'')}")
        for p in self.sim.peers.values():
            if hasattr(p.peer, "updater"):
                updater, stage = p.peer.updater, p.peer.stage
                self.note(f"{p.id} version {stage.version}, {stage.accumulator.tokens} tokens")
                participant = updater.participant
                self.note(
                    f"    reports to {participant.reporting_to or 'nobody'}, dead {participant._dead_s}"
                )
                for ballot in participant.coordinator._ballots:
                    self.note(f"    ballot {ballot.step}: {ballot.reason}, {sorted(ballot.reports)}")
        self.note(str(self.sim.pipeline.ledger.counters))

    def all_settled(self) -> bool:
        """The first microbatches count; later ones only keep the steps closing."""
        return all(self.sim.pipeline.ledger.is_settled(i.to_bytes(16, "big")) for i in range(MICROBATCHES))

    issued_all = False

    async def feed(self) -> None:
        """Issue as fast as the pipeline takes, and go on until the counted ones are settled."""
        number, sim = 0, self.sim
        while True:
            if sim.pipeline.ledger.in_flight < 8:
                sim.issue(number)
                number += 1
                self.issued_all = number >= MICROBATCHES
            await asyncio.sleep(self.rng.uniform(0.01, 0.1))

    def link(self, a: str, b: str) -> Link:
        # Late events: now and then a frame takes long, and everything behind it on its stream, too.
        slow = self.rng.random() < 0.02
        return Link(latency_s=self.rng.uniform(0.2, 0.8) if slow else self.rng.uniform(0.001, 0.02))

    def fate(self, a: str, b: str, service: str, request: bool) -> str:
        if self.rng.random() >= self.trouble:
            return "deliver"
        fate = self.rng.choice(["break_before", "break_after", "twice"])
        if fate == "twice" and (not service.startswith("hop/") or not request):
            return "deliver"
        self.faults[fate] += 1
        return fate

    async def break_things(self) -> None:
        """Kill, hang, and cut off, each followed by a repair, one after the other."""
        sim = self.sim
        for _ in range(self.rng.randint(1, 4)):
            await asyncio.sleep(self.rng.uniform(0.1, 4))
            what = self.rng.choice(FAULTS)
            self.faults[what] += 1
            match what:
                case "kill" | "kill two" | "terminate":
                    for _ in range(1 + (what == "kill two")):
                        await self.end_one(what)
                case "hang" | "hang long":
                    peer = self.rng.choice(sorted(sim.peers))
                    self.note(f"{what} {peer}")
                    sim.hub.hang(peer)
                    await asyncio.sleep(
                        self.rng.uniform(0.2, 2) if what == "hang" else self.rng.uniform(5, 9)
                    )
                    sim.hub.resume(peer)
                    self.note(f"resume {peer}")
                case "cut" | "cut trainer":
                    a, b = self.rng.sample(sorted(sim.peers), 2)
                    a = "trainer" if what == "cut trainer" else a
                    self.note(f"cut {a} {b}")
                    sim.hub.sever(a, b)
                    await asyncio.sleep(self.rng.uniform(0.5, 8))
                    sim.hub.heal(a, b)
                    self.note(f"heal {a} {b}")

    async def end_one(self, what: str) -> None:
        """End a peer if another one holds all that its stage has settled; a fresh one comes later."""
        sim, known = self.sim, self.sim.pipeline.ledger.peers
        holders = [
            peer
            for peer in sim.peers.values()
            if peer.id in known and peer.peer.stage.version >= self.reached[peer.stage]
        ]
        pools = Counter(peer.stage for peer in holders)
        candidates = sorted(peer.id for peer in sim.peers.values() if pools[peer.stage] > (peer in holders))
        if candidates:
            victim = self.rng.choice(candidates)
            stage = sim.peers[victim].stage
            self.note(f"{what} {victim}")
            if what == "terminate":
                await sim.terminate(victim)
                self.note(f"{victim} has left")
            else:
                sim.kill(victim)
            await asyncio.sleep(self.rng.uniform(0, 1))
            self.note(f"start {await sim.start_peer(stage)}")

    def check(self) -> None:
        """Every microbatch completed once; each stage applied its gradient exactly once."""
        sim = self.sim
        assert not sim.errors, sim.errors
        assert not sim.abandoned, sim.abandoned
        for (stage, version), hashes in sim.hashes.items():
            self.note(f"stage {stage} version {version}: {len(hashes)} states") if len(hashes) > 1 else None
        training = sim.config.training
        least = training.target_batch_tokens // training.microbatch_tokens
        short = [node[:2] for node, inside in sim.contents.items() if len(inside) < least]
        assert not short, f"steps (stage, version) closed with less than {least} gradients: {short}"
        gradients = [Counter(microbatch for microbatch, _ in sim.lineage(stage)) for stage in range(3)]
        for number in range(MICROBATCHES):
            microbatch = number.to_bytes(16, "big")
            completed = sim.completed[microbatch]
            assert completed == 1, f"microbatch {number} completed {completed} times"
            for stage in range(3):
                times = gradients[stage][microbatch]
                assert times == 1, f"microbatch {number} is {times} times in stage {stage}"


def brief(thing: object, traced: bytes) -> str:
    """An event or a command as one short line; the traced microbatch is M."""
    text = repr(thing).replace(repr(traced), "M")
    text = re.sub(r", b'\\x00[^']*'|b'\\x00[^']*', |-of-stage\d", "", text)
    text = re.sub(r"(, )?(session|tokens)=b('[^']*'|\"[^\"]*\")", "", text)
    text = re.sub(r", (trainer|seconds|loss|sequences|evaluate)=[^,)]*", "", text)
    return re.sub(r", (step|attempt|status)=0\b|, (target|reason)=''|, \w+=False|frozenset", "", text)


def run(seed: int, kind: type[S]) -> S:
    """One schedule. Raises AssertionError with its event log."""
    schedule = kind(seed)
    try:
        virtual_time.run(schedule.run())
    except BaseException as error:
        lines = "\n".join(schedule.log[-(100000 if "-t" in sys.argv else 40) :])
        raise AssertionError(
            f"schedule {seed} failed: {error!r}; replay it with `{kind.command} {seed}`\n{lines}"
        ) from error
    return schedule


def main(kind: type[Schedule] = Schedule) -> None:
    """Run the schedules that the command line names; exit 1 if one of them fails."""
    first, count = int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] and sys.argv[2].isdigit() else 1
    if count == 1:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        for package in PACKAGES:
            logging.getLogger(package).setLevel(logging.DEBUG if "-v" in sys.argv else logging.INFO)
    failed, began_s, faults = [], time.time(), Counter[str]()
    gc.freeze()  # what is imported stays: every run ends with a collection
    for seed in range(first, first + count):
        try:
            schedule = run(seed, kind)
            faults += schedule.faults
            if count == 1:
                print("\n".join(schedule.log))
        except AssertionError as error:
            failed.append(seed)
            print(error)
    print(
        f"{count - len(failed)} of {count} schedules hold, {time.time() - began_s:.1f} s, "
        f"{dict(faults)}, failed: {failed}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
