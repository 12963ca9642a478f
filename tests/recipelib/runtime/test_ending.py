"""A process ends when its launcher does, and when another process of the launch has died."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from recipelib.runtime import ending

# A launcher that starts a worker, says its number and waits, or leaves it at once.
LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stderr=sys.stderr)
print(worker.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""
WORKER = """
import os, time
from recipelib.runtime.ending import end_with_launcher, heeding_sigterm, terminating
if "LEFT" in os.environ:
    time.sleep(1)
with heeding_sigterm(steps="STEPS" in os.environ):
    end_with_launcher()
    print("ready", flush=True)
    while not terminating():
        time.sleep(0.1)
    time.sleep(0.2)
    print("saved", flush=True)
"""


def launch(wait: float, **environment: str) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER, str(wait)],
        env={
            **{name: value for name, value in os.environ.items() if name != "LOCAL_RANK"},
            "PYTHONPATH": str(Path(ending.__file__).parents[2]),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, "error: the launcher of this process"),
        # `accelerate launch` of one process does not pass on its SIGTERM: the step is saved
        ({"ACCELERATE_MIXED_PRECISION": "no", "STEPS": "1"}, "saved"),
    ],
    ids=["torchrun", "alone"],
)
def test_a_worker_ends_when_its_launcher_is_killed(environment, said):
    process, worker = launch(60, **environment)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert said in process.stdout.read()  # to the end: the worker has closed it
    process.wait()
    for _ in range(50):
        time.sleep(0.1 if ending._lives(worker) else 0)
    assert not ending._lives(worker)


def test_a_run_of_a_shell_lives_on_when_that_ends():
    process, worker = launch(0.3)
    assert process.stdout.readline() == "ready\n"
    process.wait()
    time.sleep(0.8)
    assert ending._lives(worker)
    os.kill(worker, signal.SIGKILL)
    process.stdout.read()


def test_a_worker_whose_launcher_died_before_it_looked_ends(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for command, left in ((b"/sbin/init", True), (b"python3 accelerate launch", False)):
        monkeypatch.setattr(Path, "read_bytes", lambda self, command=command: command)
        assert ending._is_left(1) == left
        assert not ending._is_left(77)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"/sbin/init")
    assert not ending._is_left(1)


@pytest.mark.parametrize("closed", [True, False], ids=["its connection is closed", "it hangs"])
def test_the_process_that_has_died_is_named(monkeypatch, capfd, closed):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    host, ended = ending.socket.gethostname(), []

    def gather(all_of_them, own):
        # The third one is of a container that cannot be seen.
        all_of_them[:] = [own, (1, host, other.pid), (2, host, 2**22 + 1)]

    for name, value in (("is_initialized", True), ("get_world_size", 3)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(ending, "_end_now", lambda code: (ended.append(code), sys.exit()))
    with (
        pytest.raises(SystemExit) if closed else pytest.raises(KeyboardInterrupt),
        ending.ending_with_others(),
    ):
        other.kill()
        if closed:
            raise RuntimeError("Connection closed by peer")
        for _ in range(100):
            time.sleep(0 if ended else 0.1)
        raise KeyboardInterrupt
    assert f"error: process 1 (pid {other.pid}) has died; the others end" in capfd.readouterr().err
    assert closed or ended == [1]
    other.wait()


def test_an_error_of_ones_own_stays():
    with pytest.raises(RuntimeError, match="own"), ending.ending_with_others():
        raise RuntimeError("own")
