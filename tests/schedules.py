"""Seeded schedules of faults against a whole in-memory swarm, and the invariants they must not break.

Each has joins, SIGTERMs, SIGKILLs, hangs, cut links, a stage that shrinks until others move there, and one
that loses all of its peers, in any order; processes end while others hang or do not reach each other.
Besides, streams break and requests arrive twice.

`python -m tests.schedules SEED [COUNT]` replays one schedule (or several) and prints its event log.
"""

import asyncio
import contextlib
import gc
import logging
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TypeVar

from averaging import virtual_time
from averaging.memory_network import Link
from averaging.network import PeerId
from tests.invariants import Invariants
from tests.sim import PACKAGES, Node, Sim, SimPeer, SimVolunteer, tiny_run
from trainers import events as ev
from trainers.ledger import Ledger

MODEL = "model.factory=tests.tiny:build"
# Every schedule has one of each kind.
ENDS = [["kill", "kill two"], ["terminate"], ["shrink"], ["lose stage"]]
LAPSES = [["hang", "hang long"], ["cut", "cut trainer"]]
FAULTS = [fault for kind in [*ENDS, *LAPSES] for fault in kind]
CROWD, SETS_OUT_S = 2, 3.0
TURNS_UP_S = 5.0  # that a mover may take to serve
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112 - a disk would only be slower
S = TypeVar("S", bound="Schedule")


def profile(seed: int) -> list[str]:
    """The configuration of a schedule: delayed updates, codecs and kept graphs vary."""
    rng = random.Random(f"profile {seed}")
    return [
        MODEL,
        f"training.delayed_updates={rng.choice(['true', 'false'])}",
        f"pipeline.keep_graphs={rng.choice([0, 2, 8])}",
        f"averaging.codec={rng.choice(['float32', 'int8'])}",
        f"archive.every_steps={rng.choice([2, 4])}",
        "rebalancing.period_s=1",
        *("network.announce_s=0.5", "network.expire_s=3", "network.lease_s=2"),
        *("averaging.progress_deadline_s=2", "averaging.grace_s=0.3", "pipeline.hop_deadline_s=10"),
    ]


class Schedule:
    """One run: faults by the seed until every microbatch is settled, then the invariants."""

    command = "python -m tests.schedules"

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.log: list[str] = []
        self.faults = Counter[str]()  # dealt so far
        self.counted = self.settled_below = 0  # microbatches issued while things break; all below are settled
        self.is_over = False  # nothing more will be broken
        self.shrunk = 0  # peers that nobody has replaced yet
        self.lost: list[set[Node]] = [set(), set(), set()]  # states that there were when a stage was lost
        self.born_s: dict[Node, float] = {}  # when each state was stepped to
        self.turns_up: dict[int, float] = {}  # stages that were lost while a mover had their state, and when
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
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            await self.run_in(Path(folder))

    async def run_in(self, folder: Path) -> None:
        sim = self.sim = Sim(tiny_run(*profile(self.seed)), self.seed)
        self.invariants = Invariants(sim)
        sim.on_stepped = lambda node: self.born_s.setdefault(node, sim.clock())
        sim.hub.link = self.link
        sim.hub.fate = self.fate
        self.trouble = self.rng.choice([0.0, 0.01, 0.03])
        for stage in range(3):
            for _ in range(self.rng.choice([1, 2, 2])):
                await sim.start_peer(stage)
        await sim.start_archive(folder)
        for _ in range(self.rng.choice([1, 2])):
            await sim.start_volunteer()
        await sim.start_trainer()
        self.spy(sim.pipeline.ledger)
        await sim.until(lambda: sim.pipeline.ready_stages == 3 and sim.all_acquainted())
        self.invariants.start()
        feeding = asyncio.create_task(self.feed())
        breaking = asyncio.create_task(self.break_things())
        try:
            await sim.until(lambda: breaking.done() and self.all_settled() and self.all_served(), 400)
        finally:
            feeding.cancel()
            breaking.cancel()
        breaking.result()
        self.trouble = 0.0
        self.note("all settled; waiting for retained bytes")
        await sim.until(lambda: sim.retained_bytes(below=self.counted) == 0, 60)
        self.note("the trainer leaves")
        self.invariants.stop()
        self.faults["move"] += self.moves()
        sim.pipeline_task.cancel()
        await sim.until(lambda: sim.retained_bytes() == 0, 60)
        self.check()

    def dump(self) -> None:
        """Note what hangs: the microbatches that are not settled and the peers' steps."""
        if not hasattr(self.sim, "pipeline"):
            return
        for flight in list(self.sim.pipeline.ledger._flights.values()):
            if int.from_bytes(flight.id, "big") < self.counted:
                self.note(f"{int.from_bytes(flight.id, 'big')} attempt {flight.attempt} {flight.unplaced}")
                for hop in flight.hops:
                    self.note(f"    {brief(hop, b'')}")
        for p in self.sim.peers.values():
            if hasattr(p.peer, "updater"):
                updater, stage = p.peer.updater, p.peer.stage
                self.note(f"{p.id} version {stage.version}, {stage.accumulator.tokens} tokens")
                participant = updater.participant
                self.note(
                    f"    reports to {participant.reporting_to or 'nobody'}, dead {participant.mates._dead_s}"
                )
                for ballot in participant.coordinator._ballots:
                    self.note(f"    ballot {ballot.step}: {ballot.reason}, {sorted(ballot.reports)}")
        self.note(str(self.sim.pipeline.ledger.counters))

    def all_settled(self) -> bool:
        """Those issued while things break count; later ones only keep the steps closing."""
        settled = self.sim.pipeline.ledger.is_settled
        while self.settled_below < self.counted and settled(self.settled_below.to_bytes(16, "big")):
            self.settled_below += 1
        return self.settled_below == self.counted

    def all_served(self) -> bool:
        """Has every stage a peer with its state? One that was lost may have had nothing left to settle."""
        known = self.sim.pipeline.ledger.peers
        return len({peer.stage for peer in self.sim.peers.values() if peer.id in known}) == 3

    async def feed(self) -> None:
        """In bursts, for as long as this lasts."""
        number, sim = 0, self.sim
        while True:
            for _ in range(self.rng.randint(2, 8)):
                if sim.pipeline.ledger.in_flight < sim.config.pipeline.in_flight:
                    sim.issue(number)
                    number += 1
            if not self.is_over:
                self.counted = number
            await asyncio.sleep(self.rng.uniform(0.2, 1))

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
        """Faults of every kind: processes end, one after the other, beside lapses of those that live."""
        await asyncio.gather(self.break_one_by_one(ENDS), self.break_one_by_one(LAPSES))
        self.is_over = True

    async def break_one_by_one(self, kinds: list[list[str]]) -> None:
        faults = [self.rng.choice(kind) for kind in kinds]
        self.rng.shuffle(faults)
        for what in faults:
            await asyncio.sleep(self.rng.uniform(0.1, 1.5))
            await self.deal(what)

    async def deal(self, what: str) -> None:
        sim, rng = self.sim, self.rng
        self.faults[what] += 1
        match what:
            case "kill" | "kill two" | "terminate":
                for _ in range(1 + (what == "kill two")):
                    await self.end_one(what)
            case "shrink":
                self.shrunk += 1
                await self.end_one("kill", replaced=False)
                await self.crowd()
            case "lose stage":
                await self.lose_stage(rng.randrange(3))
            case "hang" | "hang long":
                # For long it counts as dead: somebody else must have what it holds.
                dispensable = self.dispensable() if what == "hang long" else []
                peer = rng.choice(dispensable or sorted(sim.peers))
                self.note(f"{what} {peer}")
                sim.hub.hang(peer)
                await asyncio.sleep(rng.uniform(2, 5) if dispensable else rng.uniform(0.2, 1))
                self.invariants.hurt(peer)
                sim.hub.resume(peer)
                self.note(f"resume {peer}")
            case "cut" | "cut trainer":
                a, b = rng.sample(sorted(sim.peers), 2)
                a = "trainer" if what == "cut trainer" else a
                self.note(f"cut {a} {b}")
                sim.hub.sever(a, b)
                await asyncio.sleep(rng.uniform(0.3, 4))
                self.invariants.hurt(a, b)
                sim.hub.heal(a, b)
                self.note(f"heal {a} {b}")

    def dispensable(self) -> list[PeerId]:
        """Peers of whose stage another one, that goes on, holds all that is settled."""
        sim, known = self.sim, self.sim.pipeline.ledger.peers
        holders = [
            peer
            for peer in sim.peers.values()
            if peer.id in known
            and peer.peer.stage.version >= self.reached[peer.stage]
            and stays(peer)
            and peer.id not in sim.hub.hung
        ]
        pools = Counter(peer.stage for peer in holders)
        return sorted(peer.id for peer in sim.peers.values() if pools[peer.stage] > (peer in holders))

    async def end_one(self, what: str, *, replaced: bool = True) -> None:
        """End a peer whose stage can do without it; a fresh one comes later."""
        sim, candidates = self.sim, self.dispensable()
        if what == "terminate":
            candidates = [peer for peer in candidates if peer not in sim.hub.hung]
        if not candidates:
            return
        victim = self.rng.choice(candidates)
        stage = None if isinstance(sim.peers[victim], SimVolunteer) else sim.peers[victim].stage
        self.note(f"{what} {victim}")
        self.invariants.hurt(victim)
        if what == "terminate":
            await sim.terminate(victim)
            self.note(f"{victim} has left")
        else:
            sim.kill(victim)
        if replaced:
            await asyncio.sleep(self.rng.uniform(0, 1))
            await self.start_one(stage)

    async def crowd(self) -> None:
        """Peers insist on the stage of a volunteer, so that it is needed elsewhere, and sets out."""
        sim, before = self.sim, self.moves()
        volunteers = [peer for peer in sim.peers.values() if isinstance(peer, SimVolunteer)]
        if not volunteers:
            return
        crowded = self.rng.choice(volunteers).stage
        for _ in range(CROWD):
            self.note(f"start {await sim.start_peer(crowded)}")
        with contextlib.suppress(TimeoutError):
            await sim.until(lambda: self.moves() > before or not all(map(stays, volunteers)), SETS_OUT_S)

    def moves(self) -> int:
        return sum(p.volunteer.moves for p in self.sim.peers.values() if isinstance(p, SimVolunteer))

    async def start_one(self, stage: int | None) -> None:
        """In the place of one that has ended; None: of a volunteer."""
        if stage is None or (self.shrunk and self.rng.random() < 0.5):
            self.shrunk -= stage is not None
            self.note(f"start {await self.sim.start_volunteer()}")
        else:
            self.note(f"start {await self.sim.start_peer(stage)}")

    async def lose_stage(self, stage: int) -> None:
        """All of its peers at once; fresh ones come, to whatever the archive has."""
        sim = self.sim
        self.lost[stage] |= {node for node in sim.contents if node[0] == stage}
        if any(peer.peer.membership.heading == stage for peer in sim.peers.values()):
            self.turns_up[stage] = sim.clock()
        for peer in [p for p in sim.peers.values() if p.stage == stage]:
            self.note(f"kill {peer.id}, and with it stage {stage}")
            self.invariants.hurt(peer.id)
            sim.kill(peer.id)
        for _ in range(self.rng.choice([1, 2])):
            await asyncio.sleep(self.rng.uniform(0, 1))
            self.note(f"start {await sim.start_peer(stage)}")
        self.reached[stage] = 0

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
        gone = [self.gone_with_its_peers(stage) for stage in range(3)]
        for number in range(self.counted):
            microbatch = number.to_bytes(16, "big")
            completed = sim.completed[microbatch]
            assert completed == 1, f"microbatch {number} completed {completed} times"
            for stage in range(3):
                times = gradients[stage][microbatch]
                least = microbatch not in gone[stage]
                assert least <= times <= 1, f"microbatch {number} is {times} times in stage {stage}"

    def gone_with_its_peers(self, stage: int) -> set[bytes]:
        """What a stage may have taken in and have no more: if it was lost, the steps since the archive's.

        If a mover turned up with a newer state, instead those that newcomers had taken from the archive's.
        """
        lost_s, sim = self.turns_up.get(stage, float("inf")), self.sim
        brought = self.lost[stage].intersection(sim.steps_to(sim.newest(stage)))
        meanwhile = {
            node
            for node, at_s in self.born_s.items()
            if node[0] == stage and 0 <= at_s - lost_s < TURNS_UP_S and brought.difference(sim.steps_to(node))
        }
        return {m for node in self.lost[stage] | meanwhile for m, _ in sim.contents[node]}


def stays(peer: SimPeer | SimVolunteer) -> bool:
    """Is it not about to serve another stage?"""
    return peer.peer.membership.heading is None


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
        schedule.dump()
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
