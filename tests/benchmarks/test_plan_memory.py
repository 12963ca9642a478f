"""The benchmark that holds plans against runs."""

from collections import Counter
from types import SimpleNamespace

import plan_memory
import pytest


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Instead of fake steps, which take long, some activations."""
    for module in ("recipelib.planning.memory", "recipelib.training.memory"):
        monkeypatch.setattr(f"{module}.step_peaks", lambda *args: [Counter(activations=2**20)])


def test_a_run_is_held_against_its_plan(start, here):
    result, _ = start(plan_memory, "--length", 60, "--arms", "full_fsdp2")
    (case,) = result["cases"]
    assert case["planned"] > 0 < case["measured"]
    assert result["largest_error"] == abs(case["ratio"] - 1)
    (command,) = here
    assert command[command.index("--num_processes") + 1] == "2"


def test_every_arm_has_a_plan(model_folder):
    args = SimpleNamespace(model_name_or_path=str(model_folder), micro_batch=2, length=20)
    metrics = {"train_examples": 8, "supervised_tokens": 16}
    for arm in plan_memory.ARMS.values():
        assert plan_memory.planned(arm, args, metrics) > 0
