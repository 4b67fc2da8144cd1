"""The commands in deploy/ and the example model, run as they are written, as real processes."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.leftovers import PROCESSES, end_processes, left_running
from tests.test_deploy import BIN, ROOT, compose
from tests.test_optimizer import OTHER_PROCESSOR

BIN_PATH = {**os.environ, "PATH": f"{BIN}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.2)


def steps(folder: Path) -> int:
    """The newest step in a run's metrics."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["progress/steps"] for line in lines if line.endswith("}")), default=0)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Processes:
    """Started in a folder, each in a session of its own; all ended afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        log = (self.folder / f"{len(self.all)}.log").open("wb")
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**BIN_PATH, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.all.append(process)
        return process

    def end(self) -> None:
        for process in self.all:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for noted in self.folder.rglob(PROCESSES):  # by an organizer that was killed
            end_processes(left_running(noted.parent), within_s=0.5)

    def logs(self) -> str:
        logs = [path for path in sorted(self.folder.rglob("*.log")) if "wandb" not in path.parts]
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in logs)


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    yield started
    started.end()


@pytest.mark.real
@pytest.mark.timeout(240)
def test_the_compose_services_and_the_systemd_unit_train_together(processes):
    folder, services = processes.folder, compose()["services"]
    run = folder / "runs" / "quickstart"

    def shell(service: str) -> list[str]:
        text = services[service]["command"][-1].replace("$$", "$")
        text = text.replace("/swarm/experiments", str(ROOT / "experiments")).replace("31337", free_port())
        return ["sh", "-c", text]

    organizer = shell("organizer")
    organizer[-1] += " --steps 3 --set training.eval_microbatches=1 --set training.target_batch_tokens=1024"
    organizing = processes.start(organizer)
    for stage in range(3):
        processes.start(shell(f"peer{stage}"), STAGE=str(stage))
    until(lambda: (run / "address").exists(), 60, "the organizer's address")
    unit = (ROOT / "deploy" / "swarm-peer.service").read_text()
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).removeprefix(
        "ExecStart="
    )
    command = command.replace("/opt/swarm/.venv/bin", str(BIN)).replace("/var/lib/swarm-peer", str(folder))
    command = command.replace("${SWARM_JOIN}", (run / "address").read_text().strip())
    volunteer = processes.start(shlex.split(command))
    trainer = processes.start(shell("trainer"))
    try:
        assert trainer.wait(180) == 0
    except (subprocess.TimeoutExpired, AssertionError):
        pytest.fail(processes.logs())
    until(lambda: steps(run) >= 2, 10, "the monitor writes the last steps")
    assert organizing.wait(30) == 0, processes.logs()  # by itself: the steps are done
    volunteer.send_signal(signal.SIGTERM)
    assert volunteer.wait(15) == 0, processes.logs()
    assert json.loads((run / "summary.json").read_text())["steps"] >= 3


@pytest.mark.real
@pytest.mark.timeout(200)
def test_the_data_parallel_run_file_trains_one_stage_on_unequal_peers_and_an_auxiliary_helps(processes):
    run = processes.folder / "runs" / "data-parallel"
    shortened = ["training.target_batch_tokens=2048", "training.eval_microbatches=1"]
    organizing = processes.start(
        [
            *["swarm", "run", str(ROOT / "experiments" / "data_parallel.yaml"), "--steps", "20"],
            *[word for override in shortened for word in ("--set", override)],
        ]
    )
    until(lambda: (run / "address").exists(), 60, "the organizer's address")
    join = ["--join", (run / "address").read_text().strip(), "--listen", "127.0.0.1"]
    auxiliary = processes.start(["swarm-peer", "--aggregate-only", *join])
    # A volunteer whose processor rounds in other ways: by its steps' bits nobody can tell.
    processes.start(["swarm-peer", "--stage", "0", "--verbose", *join], **OTHER_PROCESSOR)

    def volunteered() -> int:
        return (processes.folder / "2.log").read_text().count("applied step")

    until(
        lambda: (steps(run) >= 5 and volunteered() >= 3) or organizing.poll() is not None,
        150,
        "steps with an auxiliary and a volunteer",
    )
    assert volunteered() >= 3, processes.logs()
    auxiliary.send_signal(signal.SIGTERM)
    assert auxiliary.wait(15) == 0, processes.logs()
    helped = re.search(r"leaving: reduced in (\d+) steps", (processes.folder / "1.log").read_text())
    assert helped and int(helped[1]) >= 1, processes.logs()
    assert organizing.wait(120) == 0, processes.logs()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] >= 20, processes.logs()
    assert summary["drifted_states"] == summary["microbatches"]["lost"] == 0, processes.logs()
    peers = [(run / "logs" / f"peer-{number}.log").read_text() for number in range(4)]
    assert all("serving stage 0" in log for log in peers), processes.logs()


@pytest.mark.real
@pytest.mark.timeout(200)
def test_ctrl_c_ends_a_run_of_the_example_model_with_all_its_processes(processes):
    run = processes.folder / "runs" / "custom-model"
    command = ["swarm", "run", str(ROOT / "experiments" / "custom_model.yaml"), "--host", "0.0.0.0"]
    command += ["--set", "monitor.wandb=disabled", "--set", "training.steps=1000"]
    organizing = processes.start(command, PYTHONPATH=str(ROOT))

    def began() -> bool:
        log, peers = run / "logs" / "trainer-0.log", run / "peers"
        lines = peers.read_text().splitlines() if peers.exists() else []
        return (
            len({line.rpartition("/")[2] for line in lines}) == 4
            and log.exists()
            and "held-out loss" in log.read_text()
        )

    until(
        lambda: began() or organizing.poll() is not None,
        120,
        "it begins, and the organizer knows whose peers",
    )
    assert organizing.poll() is None, processes.logs()
    address = (run / "address").read_text().strip()
    peer = (run / "logs" / "peer-0.log").read_text()
    here = re.search("join through (/ip4/[^/]+)/", peer)
    assert here and address.startswith(here[1] + "/"), peer  # local peers can be dialled from elsewhere, too

    def members() -> int:
        return sum(address.encode() in _command_line(pid) for pid in Path("/proc").glob("[0-9]*"))

    assert members() >= 5  # four peers and a trainer, and their daemons
    organizing.kill()  # before the others know each other well
    organizing.wait()
    organizing = processes.start([*command, "--resume"], PYTHONPATH=str(ROOT))
    resumed = processes.folder / "1.log"
    until(lambda: "it lives: 4 peers, 1 trainers" in resumed.read_text(), 60, "it finds its run again")
    assert members() >= 5
    assert (run / "address").read_text().strip() == address, "it is not found where it was"
    until(lambda: steps(run) >= 2 or organizing.poll() is not None, 60, "two steps of the example model")
    os.killpg(organizing.pid, signal.SIGINT)  # as a terminal does
    organizing.wait(30)
    assert " ERROR " not in resumed.read_text(), "an end that was asked for is no error"
    assert list((run / "checkpoints").glob("step-*")), "nothing to go on from: " + resumed.read_text()
    until(lambda: members() == 0, 10, "every process of the run has ended, whoever started it")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] >= 2 and (run / "loss.png").exists()


def test_a_local_peer_or_trainer_that_a_user_kills_is_replaced_and_the_run_goes_on(processes):
    run = processes.folder / "runs" / "custom-model"
    command = ["swarm", "run", str(ROOT / "experiments" / "custom_model.yaml")]
    command += ["--set", "monitor.wandb=disabled", "--set", "training.steps=1000"]
    organizing = processes.start(command, PYTHONPATH=str(ROOT))
    until(lambda: steps(run) >= 2 or organizing.poll() is not None, 120, "two steps of the example model")
    address = (run / "address").read_text().strip().encode()
    for victim, name, fresh, does in [
        (b"\0peer-0\0", "peer-0", "peer-4", "serving stage"),
        (b"\0trainer\0", "trainer-0", "trainer-1", "held-out loss"),
    ]:
        lines = {int(pid.name): _command_line(pid) for pid in Path("/proc").glob("[0-9]*")}
        (found,) = [pid for pid, line in lines.items() if address in line and victim in line]
        os.kill(found, signal.SIGKILL)
        log = run / "logs" / f"{fresh}.log"
        until(lambda log=log, does=does: log.exists() and does in log.read_text(), 60, f"{fresh} takes part")
        before = steps(run)
        until(lambda n=before: steps(run) > n + 2 or organizing.poll() is not None, 60, "the run goes on")
        assert organizing.poll() is None, processes.logs()
        assert f"{name} was killed" in (processes.folder / "0.log").read_text()
    os.killpg(organizing.pid, signal.SIGINT)
    organizing.wait(30)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
