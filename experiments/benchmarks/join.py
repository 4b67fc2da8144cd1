"""How soon does a newcomer help? From asking for the state to the first microbatch that counts.

    python -m experiments.benchmarks.join [--donors 2] [--mbit 200] [--joins 5] [--json]      needs root

Real processes in network namespaces shaped by `tc`: an organizer, a trainer, donors of one stage whose links
carry so many Mbit/s, and newcomers with 1,000, one after the other, while the run goes on. The state has
100 MB. It stands against the time that the state's bytes need at the sum of the donors' rates. Each peer's
device computes for a part of the time: the cores of one machine are not to be what the peers share.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from experiments.benchmarks.links import end_unless_permitted, namespaces
from experiments.benchmarks.report import report

RUN = """
name: join
model: {width: 384, layers: 4, heads: 6, feed_forward: 1252, stages: 1}
training: {sequence_tokens: 64, microbatch_sequences: 1, target_batch_tokens: 8192, steps: 100000}
pipeline: {in_flight: 4}
network: {upload_share: 1.0}
monitor: {wandb: disabled}
"""
FAST_MBIT = 1000
LOADED = re.compile(r"loaded version (\d+) \(([\d.]+) MB\) in ([\d.]+) s from (.*)")
STEPPED = re.compile(r"step [1-9]\d* of")
COUNTED = re.compile(r"first microbatch counted, ([\d.]+) s")
LIMIT_S = 120.0


class Process:
    """One process of the run behind one link; what it prints goes to a file."""

    def __init__(self, place: tuple[str, str], log: Path, *command: str) -> None:
        namespace, _ = place
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-m", *command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, said: Callable[[], object], what: str) -> None:
        """Wait for it, or exit with what the process printed."""
        end_s = time.monotonic() + LIMIT_S
        while not said():
            if time.monotonic() > end_s or self._process.poll() is not None:
                sys.exit(f"{what}: not within {LIMIT_S:.0f} s\n{self.text()[-2000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """SIGTERM, and SIGKILL for all of its session after a while."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def joins(options: argparse.Namespace, folder: Path) -> list[dict[str, float | str]]:
    """A row for every newcomer."""
    (folder / "run.yaml").write_text(RUN)
    links = [FAST_MBIT, FAST_MBIT, *[options.mbit] * options.donors]
    rows: list[dict[str, float | str]] = []
    with namespaces(links, "cubic") as (organizer_at, newcomer_at, *donors_at):
        runs, processes = folder / "runs", []

        def start(name: str, place: tuple[str, str], *command: str) -> Process:
            processes.append(Process(place, folder / f"{name}.log", *command))
            return processes[-1]

        def start_peer(name: str, place: tuple[str, str]) -> Process:
            there = ["--join", address, "--listen", place[1], "--threads", "1", "--name", name]
            there += ["--device-share", str(options.device_share), "--no-state"]
            return start(name, place, "swarm.cli", "--stage", "0", *there)

        try:
            run = ["run", str(folder / "run.yaml"), "--host", organizer_at[1], "--folder", str(runs)]
            organizer = start("organizer", organizer_at, "trainers.cli", *run)
            told = runs / "join" / "address"
            organizer.until(told.exists, "the organizer's address")
            address = told.read_text().strip()
            donors = [start_peer(f"donor{number}", place) for number, place in enumerate(donors_at)]
            for donor in donors:
                donor.until(lambda donor=donor: "serving stage" in donor.text(), "a donor serves")
            listen = ["--listen", organizer_at[1]]
            start("trainer", organizer_at, "trainers.cli", "trainer", "--join", address, *listen)
            for donor in donors:
                donor.until(lambda donor=donor: "microbatch counted" in donor.text(), "the run trains")
            # Before the first step a newcomer has the state itself, from the seed.
            organizer.until(lambda: STEPPED.search(organizer.text()), "the run takes a step")
            for number in range(options.joins):
                newcomer = start_peer(f"newcomer{number}", newcomer_at)
                newcomer.until(lambda newcomer=newcomer: COUNTED.search(newcomer.text()), "it counts")
                rows.append(measured(newcomer.text(), options))
                print(rows[-1], file=sys.stderr)
                newcomer.end()
        finally:
            for process in reversed(processes):
                process.end()
    return rows


def measured(text: str, options: argparse.Namespace) -> dict[str, float | str]:
    """What a newcomer said of its joining."""
    loaded, counted = LOADED.search(text), COUNTED.search(text)
    assert loaded is not None and counted is not None
    least_s = float(loaded[2]) * 8 / (options.donors * options.mbit)
    return {
        "version": int(loaded[1]),
        "MB": float(loaded[2]),
        "donors": loaded[4].count(",") + 1,
        "loaded s": float(loaded[3]),
        "replayed steps": text.count("replayed step"),
        "counted s": float(counted[1]),
        "least s": least_s,
        "ratio": float(counted[1]) / least_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--donors", type=int, default=2)
    parser.add_argument("--mbit", type=int, default=200)
    parser.add_argument("--joins", type=int, default=5)
    parser.add_argument("--device-share", type=float, default=0.3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    end_unless_permitted()
    with tempfile.TemporaryDirectory() as folder:
        rows = joins(options, Path(folder))
    ratio = statistics.median(float(row["ratio"]) for row in rows)
    report("joining", rows, {"first_counted_hop_over_transfer": ratio}, options.json)


if __name__ == "__main__":
    main()
