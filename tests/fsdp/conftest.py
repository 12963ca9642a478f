"""A tiny model, its data, and recipes that train it: in this process, or launched."""

import json
from collections.abc import Callable
from pathlib import Path

import full_tuning
import lora_sft
import pytest
import torch
from launching import (
    CONFIGS,
    FULL,
    OPTIONS,
    RECIPE,
    SAVING,
    adapter_runs,
    finish,
    icl_runs,
    in_step_runs,
    option_runs,
    prompt_runs,
    start,
    ten_steps,
)
from optional_packages import HAS_BITSANDBYTES
from tiny_bert import save_tiny_bert
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.cli import parse_arguments
from recipelib.prompts.values import as_list

# 40 rows of many lengths: five steps of 8 rows each.
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
QUESTIONS = """\
name: questions
form: generative
dataset: {path: nowhere, train: train, eval: test}
prompt: |-
  Question: {{ question }}
  Answer:
answer: " {{ answer }}"
metric: loss
"""


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
    (folder / "in_step").mkdir()
    _write(folder / "reviews" / "train.jsonl", REVIEWS)
    seen = [{**row, "sentence": f"seen: {row['sentence']}"} for row in REVIEWS[:7]]
    _write(folder / "reviews" / "validation.jsonl", seen)
    _write(folder / "sums" / "train.jsonl", SUMS[:16])
    _write(folder / "sums" / "test.jsonl", SUMS[16:])
    (folder / "questions.yaml").write_text(QUESTIONS)
    return folder


@pytest.fixture(scope="session")
def arguments(root) -> Callable[..., list[str]]:
    """Gives a run's command line: its folder's name, and what differs from 20 steps of 8 rows that
    two processes share.
    """

    def make(name: str, **options) -> list[str]:
        defaults = {
            "model_name_or_path": root / "model",
            "dataset": root / "reviews",
            "output_dir": root / name,
            "max_length": 128,
            "max_steps": 20,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "random",
            # constant, so that a shorter run makes the same steps
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "learning_rate": 5e-3,
            "save_strategy": "no",
            "eval_batch_tokens": 300,
            "disable_tqdm": "true",
        }
        given = {key: value for key, value in (defaults | options).items() if value is not None}
        pairs = [(f"--{key}", *as_list(value)) for key, value in given.items()]
        return [str(part) for pair in pairs for part in pair]

    return make


@pytest.fixture(scope="session")
def alone(root, arguments) -> Callable[..., Path]:
    """Runs a recipe here, in one process that nothing launched, with as many rows in each step."""

    def run(name: str, recipe=lora_sft, **options) -> Path:
        argv = arguments(name, **{"gradient_accumulation_steps": 4, "use_cpu": "true", **options})
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on so small a model a second one only waits
        try:
            if recipe is full_tuning:
                full_tuning.main(argv)
            else:
                kind = recipe.main.__annotations__["args"]
                recipe.main(*parse_arguments(kind, "", recipe.DEFAULTS, argv))
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
def launch(root) -> Callable:
    """Launches runs under a config, one after another in the same processes, and waits."""

    def run(config: Path, processes: int, runs: dict[str, list[str]]):
        file = root / "runs" / f"{next(iter(runs))}_and_{len(runs) - 1}_more.json"
        return finish(start(config, file, runs, "--num_processes", str(processes)))

    return run


@pytest.fixture(scope="session")
def single_full(alone) -> Path:
    """The same where all parameters are tuned."""
    return alone("single_full", full_tuning)


@pytest.fixture(scope="session")
def packed(root) -> dict:
    """What a run on a base in 4 bits has beside the others' options."""
    wide = save_tiny_llama(root / "wide", hidden_size=64)
    return {"model_name_or_path": wide, "load_in_4bit": "true"}


@pytest.fixture(scope="session")
def two(root, arguments, launch, packed):
    """Two processes under fsdp2.yaml."""
    sums = {"dataset": root / "sums", "max_steps": 2}
    lora = {
        # Scored, evaluated and saved on the way: each finds the model as the other left it.
        "two": {**SAVING, "eval_strategy": "steps", "eval_steps": 5},
        "two_resumed": {"resume_from_checkpoint": root / "two" / "checkpoint-10"},
        "two_rebalanced": {"train_sampling_strategy": "batch_rebalance"},
        "two_pissa": {"pissa": "true", "merge": "true", "r": 4},
        "two_recomputed": {"activation_checkpointing": "true", "max_steps": 6},
        "two_written": {
            **sums,
            "template": "gsm8k",
            "max_new_tokens": 6,
            "eval_batch_tokens": 200,
        },
        "two_loss": {**sums, "template": root / "questions.yaml", "eval_batch_tokens": 250},
    }
    runs = {name: [RECIPE, *arguments(name, **options)] for name, options in lora.items()}
    runs["two_full"] = [FULL, *arguments("two_full")]
    for name in ("cot", "instruction"):
        script = Path(RECIPE).with_name(f"{name}_sft.py")
        runs[f"two_{name}"] = [str(script), *arguments(f"two_{name}", **ten_steps(root)[name])]
    script = Path(RECIPE).with_name("adapter_sft.py")
    for name, options in adapter_runs().items():
        runs[f"two_{name}"] = [str(script), *arguments(f"two_{name}", **options)]
    script = Path(RECIPE).with_name("prompt_tuning.py")
    for name, options in prompt_runs(root).items():
        runs[f"two_{name}"] = [str(script), *arguments(f"two_{name}", **options)]
    if HAS_BITSANDBYTES:
        resumed = {"resume_from_checkpoint": root / "two_packed" / "checkpoint-10"}
        for name, more in (("two_packed", SAVING), ("two_packed_resumed", resumed)):
            runs[name] = [RECIPE, *arguments(name, **packed, **more)]
    others = option_runs(root / "two_options"), icl_runs(root, "two_icl")
    for more in (*others, in_step_runs(root / "in_step")):
        assert not runs.keys() & more.keys()
        runs |= more
    return launch(CONFIGS / "fsdp2.yaml", 2, runs)


@pytest.fixture(scope="session")
def data_parallel(root, arguments, launch):
    """Two processes under ddp.yaml."""
    runs = {"ddp": [RECIPE, *arguments("ddp")], **icl_runs(root, "ddp_icl")}
    launched = launch(CONFIGS / "ddp.yaml", 2, runs)
    assert launched.failed == [], launched.errors
    return launched


@pytest.fixture(scope="session")
def sharded(root, arguments, launch):
    """Two processes under fsdp2_sharded.yaml."""
    resumed = {"resume_from_checkpoint": root / "sharded" / "checkpoint-10"}
    runs = {
        "sharded": [RECIPE, *arguments("sharded", **SAVING)],
        "sharded_resumed": [RECIPE, *arguments("sharded_resumed", **resumed)],
        "sharded_full": [FULL, *arguments("sharded_full", **SAVING)],
        "sharded_stopped": [OPTIONS, str(root / "sharded_options"), "full", "stopped"],
        "sharded_stopped_lora": [OPTIONS, str(root / "sharded_options"), "lora", "stopped"],
    }
    return launch(CONFIGS / "fsdp2_sharded.yaml", 2, runs)


@pytest.fixture(scope="session")
def one(root, arguments, two, sharded):
    """One process under each of the two configs, going on where two stopped."""
    started = []
    for name, config in (("two", "fsdp2.yaml"), ("sharded", "fsdp2_sharded.yaml")):
        options = {
            "gradient_accumulation_steps": 4,
            "resume_from_checkpoint": root / name / "checkpoint-10",
            **SAVING,
        }
        runs = {f"{name}_then_one": [RECIPE, *arguments(f"{name}_then_one", **options)]}
        file = root / "runs" / f"{name}_then_one.json"
        started.append(start(CONFIGS / config, file, runs, "--num_processes", "1"))
    for process in started:
        launched = finish(process)
        assert launched.failed == [], launched.errors


@pytest.fixture(scope="session")
def recomputing(root, arguments, launch, one):
    """Two processes under an fsdp2.yaml that recomputes activations; one run goes on where one
    process stopped.
    """
    config = root / "recomputing.yaml"
    text = (CONFIGS / "fsdp2.yaml").read_text()
    config.write_text(
        text.replace("fsdp_activation_checkpointing: false", "fsdp_activation_checkpointing: true")
        # the other choice that the file offers, on the way
        .replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false")
    )
    grown = {"resume_from_checkpoint": root / "two_then_one" / "checkpoint-15"}
    both = {"activation_checkpointing": "true"}
    runs = {
        "recomputing": [FULL, *arguments("recomputing", max_steps=6)],
        "recomputing_lora": [RECIPE, *arguments("recomputing_lora", max_steps=6)],
        "one_then_two": [RECIPE, *arguments("one_then_two", **grown)],
        "two_owners": [RECIPE, *arguments("two_owners", **both)],
    }
    return launch(config, 2, runs)
