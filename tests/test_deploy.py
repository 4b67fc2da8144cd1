"""The files under deploy/ hold together, and the commands in them exist."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def compose():
    return yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


def options_of(*command: str) -> str:
    # Wide, or the help wraps its options.
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:], "--help"],
        capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return result.stdout


def test_compose_runs_an_organizer_two_peers_per_stage_and_a_trainer():
    services = compose()["services"]
    assert set(services) == {"organizer", "peer0", "peer1", "peer2", "trainer"}
    assert [services[f"peer{i}"]["environment"]["STAGE"] for i in range(3)] == ["0", "1", "2"]
    assert all(services[f"peer{i}"]["deploy"]["replicas"] == 2 for i in range(3))
    dockerfile = ROOT / "deploy" / services["organizer"]["build"]["dockerfile"].split("/")[-1]
    assert dockerfile.exists()


@pytest.mark.parametrize(
    "program, service",
    [(("swarm", "run"), "organizer"), (("swarm-peer",), "peer0"), (("swarm", "trainer"), "trainer")],
)
def test_the_options_in_compose_exist(program, service):
    command = " ".join(compose()["services"][service]["command"])
    assert " ".join(program) in command
    used = set(re.findall(r"--[a-z]+", command))
    assert used and used <= set(re.findall(r"--[a-z-]+", options_of(*program)))


def test_everything_the_dockerfile_copies_exists():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]]
    assert {"averaging", "swarm", "trainers", "requirements.lock"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    packages = set(
        re.findall(
            r'"([a-z.]+)"', re.search(r"packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
        )
    )
    assert {name.split(".")[0] for name in packages} <= set(copied)


def test_the_systemd_unit_starts_a_peer_with_options_that_exist():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(ROOT / "deploy" / "swarm-peer.service")
    command = unit["Service"]["ExecStart"]
    assert "swarm-peer --join" in command
    assert set(re.findall(r"--[a-z-]+", command)) <= set(re.findall(r"--[a-z-]+", options_of("swarm-peer")))
