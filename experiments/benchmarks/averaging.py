"""Time to average a vector among processes: ours against hivemind's `DecentralizedAverager`.

    python -m experiments.benchmarks.averaging [--peers 2 4 8] [--values 10000000] [--rounds 5] [--json]
    python -m experiments.benchmarks.averaging --faults [--rounds 3]    four peers, one killed or stopped

Every peer is a process with its own libp2p daemon. A round's time is from the moment the last peer is ready
to the moment the last one has the mean: finding each other, deciding and committing included. Ours and
hivemind's take turns, round by round; median of `--rounds` after two to warm up. Every worker checks that it
got the mean. Errors are relative: of the first round, of one with error feedback under way, and of the mean
over all rounds so far.
hivemind's 8-bit codec does not decode with present numpy: `_mend_hivemind` repairs that here.

With `--faults` one of four is sent SIGKILL or SIGSTOP in the middle of a round, and the time counts from then
until the last survivor returns; the error is that to the nearer of the means with and without the victim.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import select
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from averaging.averager import Averager
from averaging.codecs import CODECS
from experiments.benchmarks.report import report
from experiments.benchmarks.workers import end_workers, start_worker

SIDES = {
    "ours float32": ("ours", "float32"),
    "hivemind float32": ("hivemind", "none"),
    "ours int8": ("ours", "int8"),
    "hivemind 8 bit": ("hivemind", "uniform8"),
}
PAIRS = (("ours float32", "hivemind float32"), ("ours int8", "hivemind 8 bit"))


FAULT_LIMIT_S = 90.0  # a survivor that has not returned by then is not waited for


def worker_commands(side: str, codec: str, peers: int, values: int) -> list[list[str]]:
    """How to start the processes of one side."""
    command = [sys.executable, "-m", "experiments.benchmarks.averaging", "--worker", side, codec]
    sizes = ["--values", str(values), "--peers", str(peers)]
    return [[*command, *sizes, "--index", str(index)] for index in range(peers)]


class WorkerDied(SystemExit):
    """Ends the benchmark, unless it was asked for."""


class Workers:
    """The processes of one side, driven line by line through their pipes."""

    def __init__(self, commands: list[list[str]]) -> None:
        self._processes = [start_worker(command) for command in commands]
        self._living = list(self._processes)
        addresses = self.hear()
        self.tell(addresses)
        self.hear()
        self.tell("begin")
        self.hear()

    def hear(self, limit_s: float = 600.0) -> list[Any]:
        """One line of JSON from each that has not been struck. Raises TimeoutError, WorkerDied."""
        end_s, lines = time.monotonic() + limit_s, dict[int, str]()
        pipes = {process.stdout: number for number, process in enumerate(self._living)}
        while len(lines) < len(pipes):
            waiting = [pipe for pipe, number in pipes.items() if number not in lines]
            ready = select.select(waiting, [], [], max(0.0, end_s - time.monotonic()))[0]
            if not ready:
                raise TimeoutError
            for pipe in ready:
                if not (line := pipe.readline()):  # the others may wait for it in vain
                    raise WorkerDied(f"worker {pipes[pipe]} died: {self._living[pipes[pipe]].args}")
                lines[pipes[pipe]] = line
        return [json.loads(lines[number]) for number in range(len(pipes))]

    def tell(self, what: Any) -> None:
        for process in self._living:
            assert process.stdin is not None
            process.stdin.write(json.dumps(what) + "\n")
            process.stdin.flush()

    def round(self) -> dict[str, float]:
        self.tell("go")
        times = self.hear()
        self.tell("check")
        said = [time | check for time, check in zip(times, self.hear(), strict=True)]
        figures = {
            "s": max(each["end"] for each in said) - max(each["begin"] for each in said),
            "identical": float(len({each["hash"] for each in said}) == 1),
        }
        worst = said[0].keys() - {"begin", "end", "hash", "error without the last"}
        return figures | {name: max(each[name] for each in said) for name in sorted(worst)}

    def faulty_round(self, fault: signal.Signals, after_s: float) -> dict[str, float]:
        """Send `fault` to the last worker `after_s` into a round."""
        self.tell("go")
        time.sleep(after_s)
        os.killpg(self._living.pop().pid, fault)
        struck = time.monotonic()
        try:
            ended = max(each["end"] for each in self.hear(FAULT_LIMIT_S))
        except (TimeoutError, WorkerDied):
            return {"s": FAULT_LIMIT_S, "identical": 0.0, "error": math.inf}
        self.tell("check")
        said = self.hear()
        return {
            "s": ended - struck,
            "identical": float(len({each["hash"] for each in said}) == 1),
            "error": max(min(each["error"], each["error without the last"]) for each in said),
        }

    def close(self) -> None:
        end_workers(self._processes)


def measure(peers: int, values: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of every side with so many peers."""
    found: dict[str, list[dict[str, float]]] = {}
    for pair in PAIRS:
        workers: dict[str, Workers] = {}
        try:
            for name in pair:
                workers[name] = Workers(worker_commands(*SIDES[name], peers, values))
            said = [{name: workers[name].round() for name in pair} for _ in range(2 + rounds)][2:]
        finally:
            for each in workers.values():
                each.close()
        for name in pair:
            found[name] = [each[name] for each in said]
            print(peers, name, [round(each["s"], 3) for each in found[name]], file=sys.stderr)
    return {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def measure_fault(side: str, fault: signal.Signals, values: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of four peers, in the middle of each of which the last one is lost."""
    runs = []
    for _ in range(rounds):
        workers = Workers(worker_commands(*SIDES[side], 4, values))
        try:
            usual_s = [workers.round()["s"] for _ in range(3)][-1]
            runs.append(workers.faulty_round(fault, 0.4 * usual_s))
        finally:
            workers.close()
        print(side, fault.name, runs[-1], file=sys.stderr)
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


# a worker


class _Vector:
    """This peer's part, and the check of what came out of it."""

    def __init__(self, index: int, peers: int, values: int) -> None:
        self.values, self.peers = values, peers
        self._base_bytes, self._copies = _memory_bytes("VmRSS"), 0.0
        self._first_error, self._sum, self._rounds = -1.0, torch.zeros(0), 0
        self.own = self._of(index)

    def _of(self, index: int) -> torch.Tensor:
        return torch.randn(self.values, generator=torch.Generator().manual_seed(index))

    def check(self, mean: torch.Tensor) -> dict[str, Any]:
        """Is it the mean? And what did the first round need beyond what was there before, in vectors?"""
        if not self._copies:  # before the first check, whose memory would count
            self._copies = (_memory_bytes("VmHWM") - self._base_bytes) / (4 * self.values)
        parts = torch.zeros(self.values)
        for index in range(self.peers - 1):
            parts += self._of(index)
        without = parts / (self.peers - 1)
        exact = parts.add_(self._of(self.peers - 1)).div_(self.peers)
        error = float((mean - exact).norm() / exact.norm())
        if self._first_error < 0:
            self._first_error, self._sum = error, torch.zeros(self.values)
        self._sum, self._rounds = self._sum.add_(mean), self._rounds + 1
        lasting = float((self._sum / self._rounds - exact).norm() / exact.norm())
        error_without = float((mean - without).norm() / without.norm())
        digest = hashlib.sha256(mean.numpy().tobytes()).hexdigest()
        errors = {
            "error": error,
            "error without the last": error_without,
            "first error": self._first_error,
            "lasting error": lasting,
        }
        return errors | {"hash": digest, "copies": self._copies}


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def _say(what: Any) -> None:
    print(json.dumps(what), flush=True)


async def _hear() -> Any:
    return json.loads(await asyncio.to_thread(sys.stdin.readline))


async def work_ours(
    codec: str,
    index: int,
    peers: int,
    values: int,
    *,
    listen: str = "127.0.0.1",
    bandwidth: float = 0.0,
) -> None:
    """Rounds of our own averager whenever a line comes in."""
    from swarm.allocator import keep_freed_memory
    from swarm.process import joined

    keep_freed_memory()
    async with joined([], listen=listen) as here:
        _say([here.network.peer_id, *here.addresses])
        known = {peer: addresses for peer, *addresses in await _hear()}

        async def addresses_of(peer: str) -> list[str]:
            return known[peer]

        here.network.use_addresses(addresses_of)
        others = [peer for peer in known if peer != here.network.peer_id]
        target = max(1.0, peers - 1.0)  # one may be lost; live ones are waited for
        averager = Averager(
            here.network, peers=lambda: others, target=target, codec=codec, bandwidth=bandwidth
        )
        await averager.start()
        _say("started")
        await _hear()
        await averager.average(torch.ones(1000))  # loading code takes memory, but is no copy of a vector
        vector = _Vector(index, peers, values)
        _say("ready")
        while await _hear() == "go":
            began = time.monotonic()
            mean = await averager.average(vector.own)
            _say({"begin": began, "end": time.monotonic()})
            await _hear()  # when all are done: the check takes the cores
            ideal_bytes = 2 * (peers - 1) / peers * CODECS[codec].size_bytes(values)
            _say(vector.check(mean.vector) | {"wire": mean.sent_bytes / ideal_bytes})
            del mean


def work_hivemind(codec: str, index: int, peers: int, values: int) -> None:
    """The same with hivemind's averager, as its documentation sets it up."""
    _mend_hivemind()
    from hivemind import DHT
    from hivemind.averaging import DecentralizedAverager
    from hivemind.compression import NoCompression, Uniform8BitQuantization

    first = DHT(start=True) if index == 0 else None
    _say([str(address) for address in first.get_visible_maddrs()] if first else [])
    addresses = json.loads(sys.stdin.readline())[0]
    dht = first or DHT(initial_peers=addresses, start=True)
    _say("started")
    sys.stdin.readline()
    vector = _Vector(index, peers, values)
    own = vector.own.clone()
    averager = DecentralizedAverager(
        [own],
        dht,
        start=True,
        prefix="benchmark",
        target_group_size=peers,
        min_group_size=peers,
        compression=NoCompression() if codec == "none" else Uniform8BitQuantization(),
    )
    _say("ready")
    while json.loads(sys.stdin.readline()) == "go":
        with averager.get_tensors() as tensors:
            tensors[0][...] = vector.own
        began = time.monotonic()
        averager.step(timeout=60)
        _say({"begin": began, "end": time.monotonic()})
        sys.stdin.readline()
        with averager.get_tensors() as tensors:
            _say(vector.check(tensors[0].clone()))


def _mend_hivemind() -> None:
    """numpy 2.4 no longer makes an int of an array of one element, as hivemind's 8-bit codec asks it to.

    The name is looked up in the codec's module first: there it gets one that does.
    """
    import numpy
    from hivemind.compression import quantization

    vars(quantization)["int"] = lambda value: int(numpy.asarray(value).reshape(-1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CODEC"), help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, codec = options.worker
        torch.set_num_threads(1)
        if side == "ours":
            import uvloop

            return uvloop.run(work_ours(codec, options.index, options.peers[0], options.values))
        return work_hivemind(codec, options.index, options.peers[0], options.values)
    rows, ratios = [], {}
    if options.faults:
        for side in options.sides:
            for fault in (signal.SIGKILL, signal.SIGSTOP):
                found = measure_fault(side, fault, options.values, options.rounds)
                rows.append({"fault": fault.name, "side": side} | found)
        return report("averaging under faults", rows, ratios, options.json)
    for peers in options.peers:
        found = measure(peers, options.values, options.rounds)
        for name, figures in found.items():
            rows.append({"peers": peers, "side": name} | figures)
        ratios["wire_overhead"] = max(ratios.get("wire_overhead", 0.0), found["ours int8"]["wire"])
        ratios[f"speedup_{peers}peers_none"] = found["hivemind float32"]["s"] / found["ours float32"]["s"]
        ratios[f"speedup_{peers}peers_8bit"] = found["hivemind 8 bit"]["s"] / found["ours int8"]["s"]
    report("averaging", rows, ratios, options.json)


if __name__ == "__main__":
    main()
