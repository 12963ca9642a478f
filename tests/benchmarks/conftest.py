"""What the tests of benchmarks share: each is run whole, at its smallest, in this process."""

import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_llama import save_tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its scripts import each other

import measuring


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny model."""
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(monkeypatch) -> list[list[str]]:
    """What a benchmark starts in processes of their own, recipes or its own arms, runs in this one,
    where the libraries are imported; the command lines stay as they are, and are given. What it
    launches in several processes is run in this one, too.
    """
    commands = []

    def run(command, **options):
        from recipelib.cli import parse_arguments

        commands.append(command)
        place = next(at for at, word in enumerate(command) if word.endswith(".py"))
        path, words = Path(command[place]), command[place + 1 :]
        script = importlib.import_module(path.stem)
        gc.collect()  # else what earlier tests left is freed while the arm's memory grows
        if path.parent.name == "recipes":
            kind = script.main.__annotations__["args"]
            script.main(*parse_arguments(kind, "", script.DEFAULTS, words))
        else:
            script.main(words)
        return subprocess.CompletedProcess(command, 0, "", "")

    fake = SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(measuring, "subprocess", fake)
    return commands


@pytest.fixture
def start(here, model_folder, capsys) -> Callable[..., tuple[dict, str]]:
    """Runs a benchmark on the tiny model; gives what its last line holds, and what it printed."""

    def run(benchmark, *words: object) -> tuple[dict, str]:
        benchmark.main([*map(str, words), "--model_name_or_path", str(model_folder)])
        shown = capsys.readouterr().out
        return json.loads(shown.splitlines()[-1]), shown

    return run
