"""Starting recipes with `accelerate launch`, and reading what they leave."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launched import MARK
from run_files import read_jsonl
from with_options import OPTIONS as WAYS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
RECIPE = str(ROOT / "recipes" / "lora_sft.py")
FULL = str(Path(__file__).with_name("full_tuning.py"))
OPTIONS = str(Path(__file__).with_name("with_options.py"))
STEP = str(Path(__file__).with_name("in_step.py"))
# Of a run that leaves checkpoints 10, 15 and 20.
SAVING = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
TIMEOUT = 400  # seconds; a run that hangs has lost a process


@dataclass
class Launched:
    """A launch that has ended.

    Attributes:
        code: its exit code; 0 even where a script ended with another.
        said: what each run printed, by its name.
        errors: what all of them and the launcher wrote to stderr.
    """

    code: int
    said: dict[str, str]
    errors: str

    @property
    def failed(self) -> list[str]:
        """The runs that exited with a code of their own, or the launch as a whole."""
        if self.code:
            return ["the launch"]
        return [name for name, said in self.said.items() if "exit code " in said]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(config: Path, file: Path, runs: dict[str, list[str]], *options: str) -> subprocess.Popen:
    """Launch scripts with arguments, one after another.

    Args:
        config: the accelerate config.
        file: where to write what is to be run.
        options: of `accelerate launch`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if "--main_process_port" not in options:
        command += ["--main_process_port", str(free_port())]
    paths = [str(ROOT / "recipes"), str(Path(__file__).parent), str(ROOT / "tests")]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",  # a rehearsal, also where there are GPUs
        "OMP_NUM_THREADS": "1",  # the threads of two processes would wait for the same cores
    }
    return subprocess.Popen(
        [*command, *options, str(Path(__file__).with_name("launched.py")), str(file)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> Launched:
    """Wait for a launch."""
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends the processes that it started
        out, errors = process.communicate()
        raise AssertionError(f"a launch hung:\n{out[-3000:]}\n{errors[-3000:]}") from None
    parts = out.split(MARK)[1:]
    said = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}
    return Launched(process.returncode, said, errors)


def records(folder: Path) -> list[dict]:
    """The lines of a run's predictions.jsonl."""
    return read_jsonl(folder / "predictions.jsonl")


def ten_steps(root: Path) -> dict[str, dict]:
    """What the recipes that tune the model's text behavior are told."""
    return {
        "cot": {
            "template": "gsm8k",
            "dataset": root / "sums",
            "target": "mixed",
            "samples": 2,
            "max_new_tokens": 6,
            "max_steps": 10,
        },
        "instruction": {
            "dataset": None,
            "template": [f"movie_reviews={root / 'reviews'}", f"gsm8k={root / 'sums'}"],
            "mixing": "equal",
            "max_train_samples": 80,
            "max_new_tokens": 6,
            "max_length": 160,
            "max_steps": 10,
            "learning_rate": 1e-3,
            "packing": "true",
            "sample_steps": 5,
        },
    }


def adapter_runs() -> dict[str, dict]:
    """What adapter_sft.py is told: ten steps of all that it trains, and of what reads the residual
    where activations are recomputed.
    """
    shared = {"max_steps": 10, "bottleneck_size": 8}
    return {
        "adapter": {
            **shared,
            "scaling": "learned",
            "train_norms": "true",
            "drop_adapters_below": 1,
        },
        "adapter_top": {
            **shared,
            "adapter_input": "residual",
            "top_layers": 1,
            "activation_checkpointing": "true",
        },
    }


def prompt_runs(root: Path) -> dict[str, dict]:
    """What prompt_tuning.py is told: ten steps of every kind of weights that it trains."""
    shared = {"max_steps": 10, "virtual_tokens": 5, "max_length": 100, "learning_rate": None}
    masked = {**shared, "model_name_or_path": root / "masked"}
    network = {**masked, "tune": "p_tuning", "learning_rate": 1e-3}
    return {
        "soft_prompt": {**shared, "soft_verbalizer": "true"},
        "prompt_model": {**shared, "tune": "model", "learning_rate": 1e-3},
        "masked_p_tuning": {**network, "save_strategy": "steps", "save_steps": 5},
        "masked_both": {**masked, "tune": "both", "learning_rate": 1e-3, "combine": "mean"},
        "masked_resumed": {
            **network,
            "resume_from_checkpoint": root / "two_masked_p_tuning" / "checkpoint-5",
        },
        "few_shot": {**masked, "per_class": 4, "draws": 2, "max_steps": -1, "num_train_epochs": 3},
        "searched": {**masked, "search_label_words": "true"},
    }


def option_runs(folder: Path) -> dict[str, list[str]]:
    """Training with every option of `with_options.py`, which writes what it finds to `folder`."""
    return {
        f"{kind}-{how}": [OPTIONS, str(folder), kind, how]
        for how in WAYS
        for kind in ("full", "lora")
    }


# What icl_eval.py is told beside what all of its runs have.
ICL = {
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
}


def icl_options(root: Path, kind: str, name: str) -> list[str]:
    """The command line of icl_eval.py for a run that is named."""
    shared = {"max_length": 128, "shots": 2, "draws": 2, "eval_batch_tokens": 150}
    given = {"dataset": "reviews", **shared, **ICL[kind]}
    given["dataset"] = root / given["dataset"]
    given |= {"model_name_or_path": root / "model", "output_dir": root / name}
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)]


def icl_runs(root: Path, prefix: str) -> dict[str, list[str]]:
    """An evaluation of every kind."""
    script = str(ROOT / "recipes" / "icl_eval.py")
    return {
        f"{prefix}_{kind}": [script, *icl_options(root, kind, f"{prefix}_{kind}")] for kind in ICL
    }


def in_step_runs(folder: Path) -> dict[str, list[str]]:
    """Scoring and writing where processes differ in what they have to do."""
    return {
        f"{how}_{kind}": [STEP, str(folder), how, kind]
        for how in ("plain", "uneven", "little_memory")
        for kind in ("llama", "mistral")
    }
