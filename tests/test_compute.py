"""The compute thread: whose cores it takes, and in which order its jobs run."""

import threading
import time

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


def test_a_device_that_is_shared_rests_after_its_hops_but_takes_steps_at_once():
    compute = ComputeThread(1, device_share=0.1, elsewhere=True)
    try:
        began_s = time.monotonic()
        hops = [compute.submit(Priority.FORWARD, lambda: time.sleep(0.02)) for _ in range(4)]
        hops[0].result(10)
        step = compute.submit(Priority.STEP, time.monotonic)
        hops[-1].result(10)
        took_s = time.monotonic() - began_s
        assert took_s >= 3 * 0.2, "the fourth begins when three have been rested for"
        assert step.result(0) - began_s < 0.2, "a step waits for no rest"
        compute.submit(Priority.STEP, lambda: None).result(10)  # the fourth has been counted
        assert compute.busy_s >= 4 * 0.2, "who announces its speed tells what others can have of it"
    finally:
        compute.close()


def test_a_rest_does_not_keep_a_compute_thread_from_ending():
    compute = ComputeThread(1, device_share=0.01, elsewhere=True)
    compute.submit(Priority.FORWARD, lambda: time.sleep(0.05)).result(10)  # it rests for five seconds
    began_s = time.monotonic()
    compute.close()
    while any(thread.name == "compute" for thread in threading.enumerate()):
        assert time.monotonic() - began_s < 2
        time.sleep(0.01)


def test_what_others_take_of_a_core_is_nothing_to_rest_from():
    compute = ComputeThread(1, device_share=0.01)
    try:
        began_s = time.monotonic()
        for _ in range(5):
            compute.submit(Priority.FORWARD, lambda: time.sleep(0.05)).result(10)
        assert time.monotonic() - began_s < 2, "it had waited, not computed"
    finally:
        compute.close()


def test_however_much_steps_take_hops_go_on():
    compute = ComputeThread(1, device_share=0.2, elsewhere=True)
    try:
        done = threading.Event()

        def step_again() -> None:
            time.sleep(0.05)
            if not done.is_set():
                threading.Timer(0.05, compute.submit, (Priority.STEP, step_again)).start()

        compute.submit(Priority.STEP, step_again)  # half of the time, more than the share allows
        hops = [compute.submit(Priority.FORWARD, lambda: time.sleep(0.01)) for _ in range(20)]
        hops[-1].result(10)
        assert compute.busy_s < 5
    finally:
        done.set()
        compute.close()
