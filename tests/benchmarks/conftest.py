"""What the tests of several benchmarks share."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path
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


@pytest.fixture
def recipes_here(monkeypatch):
    """Makes a benchmark run its recipes in this process, with more words on their command lines
    if need be; gives the folders that runs were made in.
    """
    made = []

    def install(module, *more: str) -> list[Path]:
        def run(command, **options):
            from recipelib.cli import parse_arguments

            recipe = importlib.import_module(Path(command[1]).stem)
            kind = next(
                one
                for name, one in vars(recipe).items()
                if name.endswith("Arguments") and one.__module__ == recipe.__name__
            )
            recipe.main(*parse_arguments(kind, "", recipe.DEFAULTS, [*command[2:], *more]))
            made.append(Path(command[command.index("--output_dir") + 1]))
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(
            module, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL)
        )
        return made

    return install
