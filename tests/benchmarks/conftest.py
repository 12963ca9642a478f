"""What the tests of several benchmarks share."""

import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def arms_here(monkeypatch):
    """Makes a benchmark run its arms in this process and not in processes of their own, in which
    importing the libraries takes longer than the arms; their command lines stay as they are. The
    memory that an arm reports then depends on what this process freed meanwhile.
    """

    def install(module) -> None:
        def run(command, **options):
            assert command[:2] == [sys.executable, module.__file__]
            gc.collect()  # else what earlier tests left is freed while the arm's memory grows
            module.main(command[2:])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(
            module, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL)
        )

    return install
