"""No process whose death stops the run: real processes of every role are killed, one by one and together."""

import itertools
import re
import signal
import subprocess

import pytest

from tests.test_deploy_runs import Processes, free_port, processes, until

__all__ = ["processes"]
STAGES = 2
RUN = """
name: roles
model: {width: 32, layers: 2, heads: 2, feed_forward: 64, stages: 2}
training:
  sequence_tokens: 32
  microbatch_sequences: 2
  target_batch_tokens: 512
  steps: 1000000
  eval_every: 1000000
  eval_microbatches: 1
pipeline: {in_flight: 4, retain_until: step}
averaging: {progress_deadline_s: 3}
network: {announce_s: 1, expire_s: 5, lease_s: 4}
archive: {every_steps: 25}
monitor: {wandb: disabled}
"""
APPLIED = re.compile(r"applied step (\d+)")
SERVING = re.compile(r"serving stage \d at version (\d+)")


class Swarm:
    """An organizer, two peers per stage and two trainers, each a process of its own."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.folder = processes, processes.folder
        (self.folder / "run.yaml").write_text(RUN)
        self.port = free_port()
        self.numbers = itertools.count()
        self.organizer = self.start_organizer()
        until(lambda: (self.run / "address").exists(), 60, "the organizer's address")
        self.join = ["--join", (self.run / "address").read_text().strip(), "--listen", "127.0.0.1"]
        self.peers: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        for stage in [*range(STAGES)] * 2:
            self.start_peer(stage)
        self.trainers = [self.start_trainer(0), self.start_trainer(1)]

    @property
    def run(self):
        return self.folder / "runs" / "roles"

    def start_organizer(self, *more: str) -> "subprocess.Popen[bytes]":
        return self.processes.start(["swarm", "run", "run.yaml", "--port", self.port, *more])

    def start_trainer(self, number: int) -> "subprocess.Popen[bytes]":
        return self.processes.start(["swarm", "trainer", "--number", str(number), *self.join])

    def start_peer(self, stage: int) -> str:
        name = f"{len(self.processes.all)}.log"
        states = str(self.folder / "states" / str(next(self.numbers)))
        options = ["--threads", "1", "--device-share", "0.2", "--state-folder", states, "--verbose"]
        command = ["swarm-peer", "--stage", str(stage), *options, *self.join]
        self.peers[name] = stage, self.processes.start(command)
        return name

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")

    def kill_peer(self, name: str) -> int:
        stage, process = self.peers.pop(name)
        process.kill()
        process.wait()
        return stage

    def version(self, stage: int) -> int:
        """The newest step that a living peer of the stage has taken."""
        logs = [self.text(name) for name, (at, _) in self.peers.items() if at == stage]
        return max((int(step) for log in logs for step in APPLIED.findall(log)[-1:]), default=-1)

    def goes_on(self, after: str) -> None:
        """Every stage takes steps from now on."""
        before = [self.version(stage) for stage in range(STAGES)]
        try:
            until(
                lambda: all(self.version(stage) >= before[stage] + 3 for stage in range(STAGES)),
                60,
                f"steps of every stage after {after}",
            )
        except AssertionError:
            pytest.fail(f"no steps after {after}; before: {before}\n{self.processes.logs()}")

    def serves(self, name: str) -> int:
        """Wait until this peer serves; the version it began with."""
        until(lambda: SERVING.search(self.text(name)), 60, f"{name} serves")
        found = SERVING.search(self.text(name))
        assert found is not None
        return int(found[1])


@pytest.mark.real
@pytest.mark.timeout(400)
def test_the_run_goes_on_whoever_is_killed(processes):
    swarm = Swarm(processes)
    swarm.goes_on("the start")

    for name in list(swarm.peers):  # one of them coordinates the step that closes, and so on around
        swarm.serves(swarm.start_peer(swarm.kill_peer(name)))
        swarm.goes_on(f"the death of {name}")

    swarm.trainers[0].kill()
    swarm.goes_on("the death of a trainer")
    swarm.trainers = [swarm.trainers[1], swarm.start_trainer(2)]
    first = len(processes.all) - 1
    until(lambda: "held-out loss" in swarm.text(f"{first}.log"), 60, "the new trainer takes part")
    swarm.trainers[0].kill()
    swarm.goes_on("the death of the other trainer")

    swarm.organizer.kill()  # with it the first DHT peer and the archive
    swarm.organizer.wait()
    swarm.goes_on("the death of the organizer")
    swarm.organizer = swarm.start_organizer("--resume")
    organized = f"{len(processes.all) - 1}.log"
    until(lambda: "it lives: 4 peers, 1 trainers" in swarm.text(organized), 60, "it finds its run again")
    until(lambda: list((swarm.run / "checkpoints").glob("step-*/checkpoint.json")), 90, "a checkpoint")

    lost = [name for name, (stage, _) in swarm.peers.items() if stage == 1]
    for name in lost:
        swarm.kill_peer(name)
    newcomers = [swarm.start_peer(1), swarm.start_peer(1)]
    assert swarm.serves(newcomers[0]) >= 25, "it goes on from the archive's newest checkpoint"
    swarm.goes_on("the death of a whole stage")

    trainer = swarm.start_trainer(3)  # now all roles at once
    swarm.trainers[-1].kill()
    swarm.organizer.kill()
    swarm.organizer.wait()
    swarm.kill_peer(newcomers[0])
    swarm.kill_peer(next(name for name, (stage, _) in swarm.peers.items() if stage == 0))
    swarm.organizer = swarm.start_organizer("--resume")
    for stage in range(STAGES):
        swarm.start_peer(stage)
    swarm.goes_on("the death of one of every role")
    assert trainer.poll() is None

    swarm.organizer.send_signal(signal.SIGINT)
    assert swarm.organizer.wait(60) == 0, processes.logs()
    assert (swarm.run / "summary.json").exists()
