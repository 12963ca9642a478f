"""Launches under the other configs, and evaluation in them."""

import shutil
from collections.abc import Callable

import icl_eval
import in_step
import lora_sft
import pytest
from launching import CONFIGS, Launched, command, finish, free_port, start
from recipe_runs import write_rows
from transformers import AutoTokenizer

from recipelib.encoding import ensure_chat_template

# What icl_eval.py is told beside what all of its runs have.
EVALUATIONS = {
    "labels": {},
    "nearest": {"sampler": "nearest", "nearest_by": "embedding", "draws": 1},
    "written": {
        "template": "gsm8k",
        "dataset": "sums",
        "shots": 1,
        "max_new_tokens": 6,
        "samples": 2,
        "max_length": 256,
    },
    "turns": {
        "template": "conversations",
        "model_name_or_path": "chat",
        "predict": "turns.jsonl",
        "shots": 0,
        "draws": 1,
        "max_new_tokens": 6,
    },
}


@pytest.fixture(scope="session")
def evaluation(root) -> Callable[[str, str], dict]:
    """Gives what icl_eval.py is told for an evaluation of a kind, and where to leave it."""
    shutil.copytree(root / "model", root / "chat")
    tokenizer = AutoTokenizer.from_pretrained(root / "chat")
    ensure_chat_template(tokenizer)
    tokenizer.save_pretrained(root / "chat")
    turns = [{"role": "user", "content": "a film?"}, {"role": "assistant", "content": "a fine one"}]
    write_rows(root, turns=[{"messages": turns * count + turns[:1]} for count in range(5)])

    def make(kind: str, name: str) -> dict:
        shared = {"max_length": 128, "shots": 2, "draws": 2, "eval_batch_tokens": 150}
        given = {"dataset": "reviews", **shared, **EVALUATIONS[kind]}
        given = {"model_name_or_path": "model", **given, "output_dir": name}
        places = given.keys() & {"dataset", "model_name_or_path", "predict", "output_dir"}
        return given | {place: root / given[place] for place in places}

    return make


@pytest.fixture(scope="session")
def evaluations(evaluation) -> Callable[[str], dict[str, list[str]]]:
    """Gives an evaluation of every kind, to be launched."""

    def make(prefix: str) -> dict[str, list[str]]:
        names = {kind: f"{prefix}_{kind}" for kind in EVALUATIONS}
        return {name: command(icl_eval, evaluation(kind, name)) for kind, name in names.items()}

    return make


@pytest.fixture(scope="session")
def data_parallel(root, options, evaluations) -> Launched:
    """Two processes under ddp.yaml."""
    runs = {"ddp": command(lora_sft, options("ddp")), **evaluations("ddp")}
    file, processes = root / "runs" / "ddp.json", ("--num_processes", "2")
    launched = finish(start(CONFIGS / "ddp.yaml", file, runs, *processes))
    assert launched.failed == [], launched.errors
    return launched


@pytest.fixture(scope="session")
def machines(root, options, evaluations) -> tuple[Launched, Launched]:
    """Two machines with a process each, which share a model under FSDP2."""
    words = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", str(free_port())]
    runs = {"machines": command(lora_sft, options("machines")), **evaluations("machines")}
    runs |= in_step.runs(root / "in_step")
    file = root / "runs" / "machines.json"
    started = [
        start(CONFIGS / "multi_node.yaml", file, runs, *words, "--machine_rank", str(rank))
        for rank in (0, 1)
    ]
    first, second = [finish(process) for process in started]
    assert first.failed == second.failed == [], first.errors + second.errors
    return first, second


@pytest.fixture(scope="session")
def small(options, launch) -> dict[str, Launched]:
    """One process under each of the configs that need no second or end at once."""

    def run(config: str) -> Launched:
        changes = {"gradient_accumulation_steps": 4} if config == "one_gpu" else {}
        runs = {config: command(lora_sft, options(config, **changes))}
        return launch(CONFIGS / f"{config}.yaml", 1, runs)

    return {config: run(config) for config in ("one_gpu", "fsdp2_offload", "fsdp1")}
