"""What an organizer that died has left running is found again, and nothing else is ended."""

import subprocess
import sys

import psutil
import pytest

from swarm.leftovers import PROCESSES, end_processes, left_running, note_process

SLEEPS = "import time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


@pytest.fixture
def started():
    processes = []

    def start(text: str) -> subprocess.Popen:
        processes.append(subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"up\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_what_still_runs_is_ended_even_if_it_does_not_listen(tmp_path, started):
    ended, listens, deaf = started(SLEEPS), started(SLEEPS), started(DEAF)
    for process in (ended, listens, deaf):
        note_process(tmp_path, process.pid)
    ended.kill()
    ended.wait()
    found = left_running(tmp_path)
    assert [process.pid for process in found] == [listens.pid, deaf.pid]
    end_processes(found, within_s=0.5)
    assert not psutil.pid_exists(listens.pid)
    assert deaf.wait(10) == -9
    assert not left_running(tmp_path)


def test_another_process_with_the_number_of_an_ended_one_is_left_alone(tmp_path, started):
    bystander = started(SLEEPS)
    began_s = psutil.Process(bystander.pid).create_time()
    (tmp_path / PROCESSES).write_text(f"{bystander.pid} {began_s - 1}\n{bystander.pid}\nhalf a li")
    assert not left_running(tmp_path)


def test_a_run_without_processes_has_left_none(tmp_path):
    assert not left_running(tmp_path)
