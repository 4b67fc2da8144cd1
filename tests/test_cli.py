"""Bad input gets one clear line and exit code 2: the real commands, as real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def command(*arguments, timeout=110, cwd=None):
    return subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, timeout=timeout, cwd=cwd, check=False
    )


def assert_one_line(result, *says):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for words in says:
        assert words in lines[0], lines[0]


def run_file(tmp_path, text="name: x\n"):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_wrong_yaml(tmp_path):
    result = command(BIN / "swarm", "run", run_file(tmp_path, "name: x\nmodel:\n  widht: 3\n"), cwd=tmp_path)
    assert_one_line(result, "run.yaml:3", "widht", "did you mean 'width'")
    assert not (tmp_path / "runs").exists()


def test_missing_file(tmp_path):
    assert_one_line(command(BIN / "swarm", "run", "nowhere.yaml", cwd=tmp_path), "nowhere.yaml: no such file")


def test_wrong_override(tmp_path):
    result = command(BIN / "swarm", "run", run_file(tmp_path), "--set", "model.width=abc", cwd=tmp_path)
    assert_one_line(result, "--set model.width=abc")


@pytest.mark.real
def test_port_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = command(BIN / "swarm", "run", run_file(tmp_path), "--port", port, cwd=tmp_path)
    assert_one_line(result, f"port {port}", "taken", "--port")


@pytest.mark.parametrize("program", [["swarm-peer"], ["swarm", "trainer"]])
def test_an_address_that_is_none(program):
    result = command(BIN / program[0], *program[1:], "--join", "localhost:1234")
    assert_one_line(result, "localhost:1234", "/ip4/HOST/tcp/PORT/p2p/PEER")


@pytest.mark.real
def test_an_address_that_does_not_answer_is_tried_for_a_while_and_the_error_says_how_long():
    address = "/ip4/127.0.0.1/tcp/1/p2p/QmNvKxFYBNVeWoKv1xXcYFRzTpPhHbPvTvDsuTAzRvDpKp"
    result = command(BIN / "swarm-peer", "--join", address, "--listen", "127.0.0.1")
    tries, error = result.stderr.strip().splitlines()
    assert f"no answer from {address}: trying for 20 s" in tries
    assert result.returncode == 2 and error.startswith(f"error: no answer from {address} within 20 s: check")


def test_a_stage_that_is_no_number():
    address = "/ip4/127.0.0.1/tcp/1/p2p/QmNvKxFYBNVeWoKv1xXcYFRzTpPhHbPvTvDsuTAzRvDpKp"
    assert_one_line(command(BIN / "swarm-peer", "--join", address, "--stage", "three"), "three", "auto")


class Organizer:
    """A real run without local processes."""

    def __init__(self, folder, text="name: x\nmonitor: {wandb: disabled}\n"):
        environment = {**os.environ, "COLUMNS": "400"}
        self.process = subprocess.Popen(
            [str(BIN / "swarm"), "run", str(run_file(folder, text))],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert "--join" in line, line + self.process.stderr.read()
        self.address = line.split("--join")[1].strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(2)
        self.output = self.process.communicate(timeout=60)


@pytest.mark.real
def test_a_stage_out_of_range_and_an_unknown_device(tmp_path):
    with Organizer(tmp_path) as organizer:
        join = ["--join", organizer.address, "--listen", "127.0.0.1"]
        assert_one_line(command(BIN / "swarm-peer", *join, "--stage", "9"), "--stage 9", "0 to 2")
        assert_one_line(command(BIN / "swarm-peer", *join, "--device", "cuda:77"), "--device cuda:77")


@pytest.mark.real
def test_ctrl_c_ends_an_organizer_cleanly_and_keeps_what_it_wrote(tmp_path):
    with Organizer(tmp_path) as organizer:
        pass
    assert organizer.process.returncode == 0, organizer.output
    folder = tmp_path / "runs" / "x"
    assert {"config.yaml", "metrics.jsonl", "summary.json", "loss.png"} <= {p.name for p in folder.iterdir()}


@pytest.mark.real
def test_an_older_run_of_the_same_name_is_kept(tmp_path):
    for _ in range(2):
        with Organizer(tmp_path):
            pass
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.real
def test_a_second_organizer_of_the_same_run_is_refused(tmp_path):
    with Organizer(tmp_path) as organizer:
        again = command(BIN / "swarm", "run", tmp_path / "run.yaml", "--folder", tmp_path / "runs")
        assert_one_line(again, "another organizer is at work here")
        assert organizer.process.poll() is None


@pytest.mark.real
def test_empty_data_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    text = f"name: x\ndata: {{source: text, path: {tmp_path}/empty.txt}}\nmonitor: {{wandb: disabled}}\n"
    with Organizer(tmp_path, text) as organizer:
        join = ["--join", organizer.address, "--listen", "127.0.0.1"]
        assert_one_line(command(BIN / "swarm", "trainer", *join), "is it empty")


@pytest.mark.real
def test_an_address_without_a_run_is_a_mismatch(tmp_path):
    import asyncio

    import uvloop

    from averaging.network import PROTOCOL_VERSION
    from swarm.manifest import pack_manifest
    from swarm.process import joined

    async def main():
        async with joined([]) as here:
            join = ["--join", here.addresses[0], "--listen", "127.0.0.1"]
            nothing = await asyncio.to_thread(command, BIN / "swarm-peer", *join)
            ours = f'"protocol": {PROTOCOL_VERSION}'.encode()
            newer = pack_manifest("name: x\n").replace(ours, b'"protocol": 999')
            await here.directory.publish_manifest(newer)
            other = await asyncio.to_thread(command, BIN / "swarm-peer", *join)
            return nothing, other

    nothing, other = uvloop.run(main())
    assert_one_line(nothing, "no run is announced")
    assert_one_line(other, "protocol version 999", "install the version")
