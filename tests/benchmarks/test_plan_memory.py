"""The benchmark that holds plans against runs."""

import importlib
import json
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import plan_memory
import pytest

from recipelib.cli import parse_arguments


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """Recipes run in this process; the command lines are given."""
    commands = []

    def run(command, **options):
        commands.append(command)
        (place,) = [at for at, word in enumerate(command) if word.endswith("_sft.py")]
        recipe = importlib.import_module(Path(command[place]).stem)
        kind = recipe.main.__annotations__["args"]
        recipe.main(*parse_arguments(kind, "", recipe.DEFAULTS, command[place + 1 :]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(plan_memory, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    return commands


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Instead of fake steps, which take long, some activations."""
    for module in ("recipelib.planning.memory", "recipelib.training.memory"):
        monkeypatch.setattr(f"{module}.step_peaks", lambda *args: [Counter(activations=2**20)])


def test_a_run_is_held_against_its_plan(launched, model_folder, capsys):
    words = ["--model_name_or_path", str(model_folder), "--length", "60", "--arms", "full_fsdp2"]
    plan_memory.main(words)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (case,) = result["cases"]
    assert case["planned"] > 0 < case["measured"]
    assert result["largest_error"] == abs(case["ratio"] - 1)
    (command,) = launched
    assert command[command.index("--num_processes") + 1] == "2"


def test_every_arm_has_a_plan(model_folder):
    args = SimpleNamespace(model_name_or_path=str(model_folder), micro_batch=2, length=20)
    metrics = {"train_examples": 8, "supervised_tokens": 16}
    for arm in plan_memory.ARMS.values():
        assert plan_memory.planned(arm, args, metrics) > 0
