"""Messages and time that averaging takes per peer as a stage grows: whole averagers in virtual time.

    python -m experiments.benchmarks.scaling [--peers 8 64 512] [--group-size 8] [--json]

All peers are on one in-memory network with links of 20 ms and 10 MB/s. Counted are the frames that are not
pieces of the vector: reports, plans, verdicts, greetings, signs of life. A grid of groups of 8 has 1, 2, 3
dimensions for 8, 64, 512 peers: per peer, messages and time should grow as those.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from typing import Any

import torch

from averaging import virtual_time
from averaging.allreduce import SERVICE
from averaging.averager import Averager
from averaging.grid import grid_sides
from averaging.memory_network import Link, MemoryHub, MemoryStream
from averaging.network import Frame
from experiments.benchmarks.report import report

VALUES, STEPS = 8192, 3
LINK = Link(latency_s=0.02, bytes_per_s=10e6)


class Counting(MemoryHub):
    """Counts the frames that carry no values, by who sends them."""

    def __init__(self) -> None:
        super().__init__(rng=random.Random(0), link=lambda a, b: LINK)
        self.control: Counter[str] = Counter()

    async def carry(self, sender: MemoryStream, receiver: MemoryStream, frame: Frame | None) -> None:
        piece = frame is not None and sender._service == SERVICE and len(frame.payload) > 0
        if not piece:
            self.control[sender._local] += 1
        await super().carry(sender, receiver, frame)


async def steps(peers: int, group_size: int) -> dict[str, Any]:
    hub, names = Counting(), [f"peer{index:04d}" for index in range(peers)]
    averagers = {
        name: Averager(
            hub.network(name),
            peers=lambda: names,
            target=peers,
            codec="float32",
            group_size=group_size,
            rng=random.Random(name),
        )
        for name in names
    }
    for averager in averagers.values():
        await averager.start()
    vectors = torch.randn(peers, VALUES, generator=torch.Generator().manual_seed(0))
    exact, loop = vectors.double().mean(0), asyncio.get_running_loop()
    took_s = []
    for _ in range(STEPS):
        began_s = loop.time()
        calls = (averagers[name].average(vector) for name, vector in zip(names, vectors, strict=True))
        means = await asyncio.gather(*calls)
        took_s.append(loop.time() - began_s)
        assert all(torch.equal(mean.vector, means[0].vector) for mean in means)
        assert (means[0].vector - exact).norm() < 1e-4 * exact.norm()
    each = [hub.control[name] / STEPS for name in names]
    return {
        "dimensions": len(grid_sides(peers, group_size)),
        "control frames per peer": statistics.mean(each),
        "of the busiest": max(each),
        "virtual s per step": statistics.median(took_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--group-size", type=int, default=8)
    options = parser.parse_args()
    rows, ratios = [], {}
    for peers in options.peers:
        began_s = time.perf_counter()
        found = virtual_time.run(steps(peers, options.group_size))
        cpu_s = (time.perf_counter() - began_s) / STEPS / peers
        rows.append({"peers": peers} | found | {"CPU ms per peer and step": 1000 * cpu_s})
        ratios[f"frames_per_dimension_{peers}"] = found["control frames per peer"] / found["dimensions"]
        ratios[f"seconds_per_dimension_{peers}"] = found["virtual s per step"] / found["dimensions"]
    report("scaling of averaging", rows, ratios, options.json)


if __name__ == "__main__":
    main()
