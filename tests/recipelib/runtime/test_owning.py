"""One run at a time writes into a folder, and a process that has died keeps nobody out."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipelib.cli import owns_output_dir
from recipelib.runtime import owning
from recipelib.runtime.errors import UserError
from recipelib.runtime.owning import LOCK, sole_run

HOLD = """
import sys, time
from recipelib.runtime.owning import say_that_the_run_ends, sole_run
with sole_run(sys.argv[1]):
    if "forks" in sys.argv:
        import os
        if not os.fork():
            time.sleep(60)
    if "ends" in sys.argv:
        say_that_the_run_ends()
    print("held", flush=True)
    if "ends" in sys.argv:
        time.sleep(1)
    else:
        sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Lets another process own a folder."""
    started = []

    def start(folder: Path, *how: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *how],
            env={**os.environ, "PYTHONPATH": str(Path(owning.__file__).parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_told_whose_the_folder_is_and_a_killed_one_keeps_nobody_out(tmp_path, hold):
    folder = tmp_path / "runs" / "one"
    other = hold(folder, "forks")  # whose worker lives on
    with (
        pytest.raises(UserError, match=f"process {other.pid} on {socket.gethostname()} is writing"),
        sole_run(str(folder)),
    ):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with sole_run(str(folder)):
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert not list(folder.iterdir())
    os.killpg(other.pid, signal.SIGKILL)  # the worker


def test_a_run_that_is_ending_is_waited_for(tmp_path, hold):
    hold(tmp_path, "ends")
    with sole_run(str(tmp_path)):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} ")


def test_two_runs_after_one_another_and_one_in_another_are_one_process_s_own(tmp_path):
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        with sole_run(str(folder)), sole_run(f"{folder}/../one"):
            assert (folder / LOCK).exists()
        assert not (tmp_path / "runs").exists()  # nothing was written, so nothing stays
    (folder / "kept").mkdir(parents=True)
    with sole_run(str(folder)):
        pass
    assert [file.name for file in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize("preview", [0, 2])
def test_main_owns_its_folder_and_gives_it_back_when_it_fails(tmp_path, preview):
    folder = tmp_path / "out"

    @owns_output_dir
    def main(args, training):
        assert (folder / LOCK).exists() == (not preview)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main(SimpleNamespace(preview=preview), SimpleNamespace(output_dir=str(folder)))
    assert not folder.exists()


def test_a_folder_that_vanishes_is_no_error_and_a_file_is_one_line(tmp_path):
    with sole_run(str(tmp_path / "out")):
        (tmp_path / "out" / LOCK).unlink()
        (tmp_path / "out").rmdir()
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="is a file; name a folder"), sole_run(tmp_path / name):
            pass


def test_without_rights_or_locks_one_line_says_so(tmp_path, monkeypatch, capsys):
    def fail(error: OSError):
        def call(*_):
            raise error

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail(PermissionError(13, "Permission denied")))
        with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\); name"):
            sole_run(str(tmp_path)).__enter__()
    monkeypatch.setattr(owning.fcntl, "lockf", fail(OSError(37, "No locks available")))
    with sole_run(str(tmp_path)):
        assert "its file system has no locks" in capsys.readouterr().out
