"""The run's folder: one organizer at a time, nothing overwritten."""

import os
import subprocess
import sys

import pytest

from swarm.errors import UserError
from swarm.folder import LOCK, _opened, _take, claimed


def test_only_one_organizer_at_a_time_has_a_folder(tmp_path):
    folder = tmp_path / "run"
    with claimed(folder):
        (folder / "metrics").write_text("first")
        busy = pytest.raises(UserError, match=f"another organizer is at work here, process {os.getpid()}")
        with busy, claimed(folder):
            pass
        assert (folder / "metrics").read_text() == "first" and len(list(tmp_path.iterdir())) == 1
    with claimed(folder):
        assert not (folder / "metrics").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_to_be_kept_stays_and_the_rest_is_moved_aside(tmp_path):
    folder = tmp_path / "run"
    for number in range(3):
        with claimed(folder, keep=["identity"]):
            assert (folder / "identity").exists() == (number > 0)
            (folder / "identity").write_text("me")
            (folder / "metrics").write_text(str(number))
    older = sorted(path for path in tmp_path.iterdir() if path != folder)
    assert sorted((path / "metrics").read_text() for path in older) == ["0", "1"]
    assert not any((path / LOCK).exists() or (path / "identity").exists() for path in older)


def test_the_lock_of_a_killed_organizer_is_gone_with_it(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import os, pathlib, sys; from swarm.folder import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -9
    with claimed(folder):
        pass


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"), claimed(tmp_path / "file" / "run"):
        pass


def test_a_lock_on_a_folder_that_another_one_has_moved_aside_is_none(tmp_path):
    folder = tmp_path / "run"
    with claimed(folder):
        pass
    with _opened(folder) as slow, claimed(folder), pytest.raises(UserError, match="another organizer"):
        _take(folder, slow)
