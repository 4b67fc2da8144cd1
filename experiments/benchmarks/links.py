"""Averaging over slow and over unequal links: peers in network namespaces, shaped by `tc`.

    python -m experiments.benchmarks.links [--values 10000000] [--rounds 3] [--json]      needs root

Slow links: every peer's link carries so many Mbit/s each way. The time of a round stands against the least
that the bytes need, 2(n-1)/n times the encoded vector over the link. Unequal links: one peer with 500 and
three with 100 Mbit/s; our shares, by what `--bandwidth` says of the links, against equal ones.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import uvloop

from averaging.codecs import CODECS
from experiments.benchmarks.averaging import Workers, work_ours
from experiments.benchmarks.report import report

BRIDGE, NETWORK = "swarmbr", "10.213.77"
BURST_BYTES = 65_536
MTU = 9_000  # two cores carry every machine: cutting smaller packets takes half of them at 4 x 200 Mbit/s
UNEQUAL = (500, 100, 100, 100)
WARM_UP = 2  # rounds


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.contextmanager
def namespaces(mbits: Sequence[int], congestion: str) -> Iterator[list[tuple[str, str]]]:
    """One namespace per link, all on one bridge: (name, address) of each."""
    names = [f"swarm{os.getpid()}-{index}" for index in range(len(mbits))]
    try:
        sh(f"ip link add {BRIDGE} type bridge")
        sh(f"ip link set {BRIDGE} up")
        for index, (name, mbit) in enumerate(zip(names, mbits, strict=True)):
            sh(f"ip netns add {name}")
            sh(f"ip link add swarmv{index} type veth peer name eth0 netns {name}")
            sh(f"ip link set swarmv{index} master {BRIDGE} up")
            sh(f"ip -n {name} addr add {NETWORK}.{index + 1}/24 dev eth0")
            sh(f"ip -n {name} link set eth0 mtu {MTU} up")
            sh(f"ip link set swarmv{index} mtu {MTU}")
            sh(f"ip -n {name} link set lo up")
            route = f"{NETWORK}.0/24 dev eth0 src {NETWORK}.{index + 1} congctl {congestion}"
            sh(f"ip -n {name} route replace {route}")
            shape = f"root tbf rate {mbit}mbit burst {BURST_BYTES} latency 50ms"
            sh(f"tc qdisc add dev swarmv{index} {shape}")  # down
            sh(f"tc -n {name} qdisc add dev eth0 {shape}")  # up
        yield [(name, f"{NETWORK}.{index + 1}") for index, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def end_unless_permitted() -> None:
    """Exit with the reason where links cannot be shaped."""
    try:
        with namespaces([100], "cubic"):
            pass
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        sys.exit(f"skipped: network namespaces and tc need root and iproute2: {said.decode().strip()}")


def seconds(mbits: Sequence[int], codec: str, options: argparse.Namespace, *, equal: bool = False) -> float:
    """Median time of a round with a peer behind each link."""
    with namespaces(mbits, options.congestion) as places:
        sizes = ["--peers", str(len(mbits)), "--values", str(options.values)]
        module = [sys.executable, "-m", "experiments.benchmarks.links"]
        commands = []
        for index, (name, address) in enumerate(places):
            worker = [
                *module,
                "--worker",
                codec,
                address,
                str(0 if equal else mbits[index]),
                "--index",
                str(index),
                *sizes,
            ]
            commands.append(["ip", "netns", "exec", name, *worker])
        workers = Workers(commands)
        try:
            rounds = [workers.round() for _ in range(WARM_UP + options.rounds)]
        finally:
            workers.close()
    assert all(each["identical"] for each in rounds)
    print(list(mbits), codec, [round(each["s"], 2) for each in rounds], file=sys.stderr)
    return statistics.median(each["s"] for each in rounds[WARM_UP:])


def work(codec: str, address: str, mbit: float, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    uvloop.run(work_ours(codec, options.index, options.peers, options.values, listen=address, bandwidth=mbit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=int, nargs="+", default=[200, 20])
    parser.add_argument("--congestion", default="cubic", help="TCP's; cubic is what Linux comes with")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        codec, address, mbit = options.worker
        return work(codec, address, float(mbit), options)
    end_unless_permitted()
    rows, ratios = [], {}
    for mbit, peers, codec in product(options.mbit, (2, 4), ("float32", "int8")):
        least_s = 2 * (peers - 1) / peers * CODECS[codec].size_bytes(options.values) / (mbit * 1e6 / 8)
        took_s = seconds([mbit] * peers, codec, options)
        row = {"links": f"{peers} x {mbit} Mbit/s", "codec": codec, "s": took_s, "least s": least_s}
        rows.append(row | {"ratio": took_s / least_s})
        ratios[f"over_limit_{peers}x{mbit}_{codec}"] = took_s / least_s
    equal_s, ours_s = (seconds(UNEQUAL, "int8", options, equal=equal) for equal in (True, False))
    for name, s in (("equal shares", equal_s), ("ours", ours_s)):
        rows.append({"links": "1 x 500, 3 x 100 Mbit/s, " + name, "codec": "int8", "s": s})
    ratios["unequal_links_speedup"] = equal_s / ours_s
    report("averaging over slow links", rows, ratios, options.json)


if __name__ == "__main__":
    main()
