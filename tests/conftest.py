"""Shared by all tests."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

from tests.background import SEEDS, Sweep

torch.set_num_threads(1)  # the peers of a test share the machine; one thread also keeps sums in order
# What peers keep for a restart is not to outlive the tests, nor to be found by them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="swarm-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
SWEEPS = pytest.StashKey[dict[str, Sweep]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the sweeps that will be asked for: they run behind the tests before."""
    sweeps = session.config.stash[SWEEPS] = {name: Sweep(name, seeds) for name, seeds in SEEDS.items()}
    wanted = any("sweeps" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        for sweep in sweeps.values():
            sweep.start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    for sweep in session.config.stash.get(SWEEPS, {}).values():
        sweep.stop()


@pytest.fixture
def sweeps(request: pytest.FixtureRequest) -> dict[str, Sweep]:
    """The sweeps of this test session, by module."""
    return request.config.stash[SWEEPS]
