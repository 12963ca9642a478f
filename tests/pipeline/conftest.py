"""Two launches of pipelines, of two and of four processes, and the same runs in one process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gpipe_sft
import pytest
import torch
from launching import CONFIGS, SAVING, UNSAVED, Launched, command, free_port, words_of
from recipe_runs import QUESTIONS, run_recipe
from run_files import read_json
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

CONFIG = CONFIGS / "pipeline.yaml"
IN_STAGES = Path(__file__).with_name("in_stages.py")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """The folder of everything: a model whose head is its embeddings, another with a head of its
    own, a template, and a folder for each run.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    for name, tied in (("tied", True), ("untied", False)):
        save_tiny_llama(folder / name, num_hidden_layers=4, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():  # weights so large that a prompt's tokens show in its score
            for weight in model.parameters():
                weight *= 4 if weight.dim() > 1 else 1
        model.save_pretrained(folder / name)
    (folder / "questions.yaml").write_text(QUESTIONS)
    return folder


@pytest.fixture(scope="session")
def options(root, reviews, sums) -> Callable[..., dict]:
    """Gives what a run is told: its folder's name, and what differs from 8 steps of 4 rows."""
    defaults = {
        "model_name_or_path": root / "tied",
        "dataset": reviews,
        "max_length": 128,
        "max_steps": 8,
        "micro_batches": 4,
        "per_device_train_batch_size": 1,
        # constant, so that a shorter run makes the same steps
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "eval_batch_tokens": 300,
        "disable_tqdm": True,
    }
    written = {"template": "gsm8k", "dataset": sums, "max_new_tokens": 6, "max_steps": 2}
    loss = {"template": root / "questions.yaml", "dataset": sums, "max_steps": 2}
    lora = {"model_name_or_path": root / "untied", "peft": "lora", "r": 4}
    kinds = {
        "full": {**SAVING, "eval_strategy": "steps", "eval_steps": 4},
        "lora": {**lora, **SAVING, "schedule": "interleaved", "train_sampling_strategy": "random"},
        "written": {**written, "model_name_or_path": root / "untied", "schedule": "1f1b"},
        "written_lora": {**written, "peft": "lora"},
        "loss": loss,
        "half": {**loss, "bf16": True},
        "half_lora": {**loss, "bf16": True, "peft": "lora"},
    }

    def make(name: str, kind: str | None = None, **changes: Any) -> dict:
        given = {**defaults, "output_dir": root / name, **kinds[kind or name], **changes}
        return {key: value for key, value in given.items() if value is not None}

    return make


@pytest.fixture(scope="session")
def alone(root, options) -> Callable[..., Path]:
    """Runs a kind in one process; each once, unless something changes."""

    @cache
    def kept(kind: str) -> Path:
        return run(kind, f"single_{kind}")

    def run(kind: str, name: str = "", **changes: Any) -> Path:
        if not name:
            return kept(kind)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on so small a model a second one only waits
        try:
            return run_recipe(gpipe_sft, **options(name, kind, use_cpu=True, **changes))
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.fixture(scope="session")
def two(root, options, alone, fork_server) -> Launched:
    """Two processes, a pipeline; a run of a kind leaves `two_KIND`."""
    kinds = ("full", "lora", "written", "written_lora", "loss", "half", "half_lora")
    told = {f"two_{kind}": options(f"two_{kind}", kind) for kind in kinds}
    recomputed = {"activation_checkpointing": True}  # which changes nothing but the memory
    told["two_written_lora"] |= recomputed
    for kind, schedule in (("full", "1f1b"), ("lora", "gpipe")):
        checkpoint = {"resume_from_checkpoint": root / f"two_{kind}" / "checkpoint-4"}
        told[f"two_{kind}_resumed"] = options(
            f"two_{kind}_resumed", kind, schedule=schedule, **checkpoint, **recomputed
        )
        checkpoint = {"resume_from_checkpoint": alone(kind) / "checkpoint-4"}
        told[f"one_{kind}_then_two"] = options(f"one_{kind}_then_two", kind, **checkpoint)
    return _launch(fork_server, root, 2, told)


@pytest.fixture(scope="session")
def four(root, options, fork_server) -> Launched:
    """Four processes: two pipelines of two, or one of four."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    changes = {"lora": {"stages": 2, "max_steps": 4, **evaluated}, "written": {"stages": 4}}
    told = {f"four_{kind}": options(f"four_{kind}", kind, **changes[kind]) for kind in changes}
    return _launch(fork_server, root, 4, told)


def _launch(fork_server, root: Path, processes: int, told: dict[str, dict]) -> Launched:
    runs = {name: command(gpipe_sft, options) for name, options in told.items()}
    runs["in_stages"] = [str(IN_STAGES), str(root / f"in_stages_{processes}.json")]
    launched = fork_server.runs(root / "runs", CONFIG, processes, runs)
    assert launched.failed == [], launched.errors[-5000:] + launched.said[launched.failed[0]]
    return launched


@pytest.fixture(scope="session")
def machines(root, options, fork_server) -> Launched:
    """Two machines with a process each."""
    runs = {"machines": command(gpipe_sft, options("machines", "lora", max_steps=4, **UNSAVED))}
    words = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", str(free_port())]
    file = root / "runs" / "machines.json"
    launched = fork_server.launch(
        *(words_of(CONFIG, file, runs, *words, "--machine_rank", rank) for rank in ("0", "1"))
    )
    assert launched.failed == [], launched.errors[-5000:]
    return launched


@pytest.fixture(scope="session")
def apart(root, request) -> Callable[[int], dict]:
    """Gives what a number of processes found of the cases of `in_stages.py`."""

    def read(processes: int) -> dict:
        request.getfixturevalue({2: "two", 4: "four"}[processes])
        return read_json(root / f"in_stages_{processes}.json")

    return read
