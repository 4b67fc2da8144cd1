"""Processes end cleanly in the middle of what their threads compute."""

import subprocess
import sys
import time

import pytest

COMPUTING = """
import threading, torch
from swarm.compute import ComputeThread, Priority

x = torch.randn(300, 300, requires_grad=True)
began = threading.Event()

def job():
    began.set()
    for _ in range(100):
        (x @ x).sum().backward()

compute = ComputeThread(1)
for _ in range(50):
    compute.submit(Priority.FORWARD, job)
began.wait()
"""
READING = """
import torch
from trainers.data import Prefetch

def texts():
    while True:
        yield [torch.tensor(list(range(2000))) for _ in range(50)]

ahead = Prefetch(texts())
microbatches = iter(ahead)
for _ in range(12):
    next(microbatches)
"""
STUCK = """
import time
from swarm import threads

threads.LIMIT_S = 0.5
threads.Worker(lambda: time.sleep(600), name="stuck", stop=lambda: None)
"""


@pytest.mark.parametrize(
    "script", [COMPUTING, COMPUTING + "compute.close()", READING, READING + "ahead.close()"]
)
def test_a_process_that_ends_while_a_thread_computes_ends_cleanly(script):
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_thread_that_does_not_stop_delays_the_end_only_for_so_long():
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", STUCK], check=True, timeout=60)
    assert time.monotonic() - began < 40
