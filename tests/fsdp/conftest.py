"""A tiny model, its data, and recipes that train it: in this process, or launched. Each folder here
has launches of its own, and tests that need no others.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import full_tuning
import lora_sft
import pytest
import torch
from launching import Launched
from recipe_runs import QUESTIONS, without_slow_parts
from tiny_bert import save_tiny_bert
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.cli import arguments

# 40 rows of many lengths: five steps of 8 rows are an epoch.
REVIEWS = [
    {"sentence": f"{'so ' * (number % 7)}{word} film, number {number}", "label": label}
    for number in range(20)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
SUMS = [
    {
        "question": f"{n} {'big ' * (n % 5)}pens and {n} more?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(1, 24)
]


def _write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """The folder of everything: `model`, the data, and a folder for each run."""
    folder = tmp_path_factory.mktemp("fsdp")
    save_tiny_llama(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():  # weights so large that a prompt's tokens show in its score
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    model.save_pretrained(folder / "model")
    save_tiny_bert(folder / "masked")
    _write(folder / "reviews" / "train.jsonl", REVIEWS)
    seen = [{**row, "sentence": f"seen: {row['sentence']}"} for row in REVIEWS[:7]]
    _write(folder / "reviews" / "validation.jsonl", seen)
    _write(folder / "sums" / "train.jsonl", SUMS[:16])
    _write(folder / "sums" / "test.jsonl", SUMS[16:])
    (folder / "questions.yaml").write_text(QUESTIONS)
    return folder


@pytest.fixture(scope="session")
def options(root) -> Callable[..., dict]:
    """Gives what a run is told: its folder's name, and what differs from 8 steps of 8 rows that
    two processes share.
    """

    def make(name: str, **changes) -> dict:
        defaults = {
            "model_name_or_path": root / "model",
            "dataset": root / "reviews",
            "output_dir": root / name,
            "max_length": 128,
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "random",
            # constant, so that a shorter run makes the same steps
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "learning_rate": 5e-3,
            "save_strategy": "no",
            "eval_batch_tokens": 300,
            "disable_tqdm": True,
        }
        given = (defaults | changes).items()
        return {key: value for key, value in given if value is not None}

    return make


@pytest.fixture(scope="session")
def alone(root, options) -> Callable[..., Path]:
    """Runs a recipe here, in one process that nothing launched, with as many rows in each step."""

    def run(name: str, recipe: ModuleType = lora_sft, **changes) -> Path:
        changes = {"gradient_accumulation_steps": 4, "use_cpu": True, **changes}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on so small a model a second one only waits
        try:
            with without_slow_parts():
                recipe.main(*arguments(recipe, **options(name, **changes)))
        finally:
            torch.set_num_threads(threads)
        return root / name

    return run


@pytest.fixture(scope="session")
def single(alone) -> Path:
    """The run that the launched ones have to equal."""
    return alone("single")


@pytest.fixture(scope="session")
def initial(alone) -> Path:
    """The adapter that every run starts from: what is saved where nothing is learned."""
    return alone("initial", learning_rate=0, max_steps=1)


@pytest.fixture(scope="session")
def single_full(alone) -> Path:
    """As `single` where all parameters are tuned."""
    return alone("single_full", full_tuning)


@pytest.fixture(scope="session")
def launch(root, fork_server) -> Callable[..., Launched]:
    """Launches runs under a config, one after another in the same processes, and waits."""
    return partial(fork_server.runs, root / "runs")
