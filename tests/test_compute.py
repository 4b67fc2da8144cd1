"""The compute thread: whose cores it takes, and in which order its jobs run."""

import threading

import pytest
import torch

from swarm.compute import ComputeThread, Priority, spread_over


@pytest.fixture
def compute():
    spread_over(1)
    thread = ComputeThread(2)
    yield thread
    thread.close()
    spread_over(1)  # of threads that begin later, too


def test_only_the_compute_thread_spreads_over_its_cores(compute):
    assert compute.submit(Priority.STEP, torch.get_num_threads).result(10) == 2
    assert torch.get_num_threads() == 1


def test_jobs_run_by_priority_and_hops_wait_while_a_step_closes(compute):
    order: list[Priority] = []
    gate = threading.Event()
    blocked = compute.submit(Priority.STEP, gate.wait)
    compute.hold(True)
    jobs = {p: compute.submit(p, lambda p=p: order.append(p)) for p in reversed(Priority)}
    cancelled = compute.submit(Priority.BACKWARD, lambda: order.append(None))
    assert cancelled.cancel()
    gate.set()
    blocked.result(10)
    jobs[Priority.STEP].result(10)
    assert order == [Priority.STEP]
    compute.hold(False)
    jobs[Priority.EVALUATE].result(10)
    assert order == sorted(Priority)
