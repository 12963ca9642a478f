"""How fast `recipes/lora_sft.py` trains beside TRL's own script, on the CPU in float32.

    python benchmarks/sft_throughput.py                # about 50 minutes on two cores
    python benchmarks/sft_throughput.py --quick        # a few steps, within six minutes
    python benchmarks/sft_throughput.py --dataset data/gsm8k/train.jsonl --rounds 2

Both train LoRA on the same 400 rows, in the same 50 steps of the same 8 rows, with the same rank,
learning rate, schedule and seed: one after the other, each in a process of its own and timed by its
own trainer, after a warm-up that does not count. TRL's script computes a step's rows as one padded
batch; the recipe as smaller batches of similar length (`batch_rebalance` inside the step), and
projects onto the vocabulary only where a token is supervised. Beyond what both are told, TRL's
script runs at its defaults but for `--bf16 False`, and once more without activation checkpointing;
`ratio` is ours over the faster of the two. Its defaults include a dropout of 0.05 in the adapter,
where the recipe's is 0: so it runs a third time without either, `ratio_without_dropout`.

The benchmark fails unless all saw equally many tokens and had the same loss in step 1. Later losses
differ: the recipe's A starts Gaussian with standard deviation 1/r, TRL's uniform after Kaiming; B
is zero in both. From one start the trainers agree (`test_trainer_beside_trl.py`).

Without --dataset the rows are generated word problems as long as GSM8K's (`word_problems.py`). A
--quick run has no warm-up, and its first step, which nothing in the scripts' logs tells apart, is
part of the time on every side. The last line is one JSON object.
"""

import argparse
import ast
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from measuring import (
    ROOT,
    RunFailed,
    cores,
    failure,
    in_turn,
    parser_of,
    run_script,
    set_numbers,
    sha256_of,
    show_table,
    threads,
    words,
)
from word_problems import generate_problems, read_gsm8k

from recipelib.models.sources import describe_model, resolve_model
from recipelib.runtime import UserError, versions, write_jsonl

ROWS, ROWS_PER_STEP = 400, 8
FULL, QUICK = {"steps": ROWS // ROWS_PER_STEP, "rounds": 1}, {"steps": 3, "rounds": 1}
WARM_UP_STEPS = 2
LOSS_TOLERANCE = 1e-4  # of step 1, absolute

OURS, TRL, TRL_STORED = "ours", "trl", "trl without activation checkpointing"
TRL_BARE = "trl, also without dropout"
TRL_CHANGES = {
    TRL: {},
    TRL_STORED: {"gradient_checkpointing": False},
    TRL_BARE: {"gradient_checkpointing": False, "lora_dropout": 0.0},
}
ARMS = (OURS, *TRL_CHANGES)

TEMPLATE = """\
name: word_problems
description: Solve a word problem step by step.
form: generative
prompt: "{{ prompt }}"
answer: "{{ completion }}"
metric: loss
"""
# What a script is given on both sides. Only at the end a checkpoint is kept: with TRL's script
# there is no other way to the losses in full precision.
SHARED = {
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "weight_decay": 0.0,
    "train_sampling_strategy": "batch_rebalance",  # with seed 42 it draws the same rows for a step
    "seed": 42,
    "max_length": 2048,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_only_model": True,
    "report_to": "none",
    "disable_tqdm": True,
}
OUR_OPTIONS = {
    "r": 16,
    "alpha": 32,
    "target_modules": "all-linear",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": ROWS_PER_STEP // 2,
    "max_eval_samples": 1,
}
TRL_OPTIONS = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "per_device_train_batch_size": ROWS_PER_STEP,
    "gradient_accumulation_steps": 1,
}


class Run(NamedTuple):
    """What a script did: tokens without padding, the loss of every step, the process's peak."""

    tokens: int
    seconds: float
    losses: list[float]
    peak_memory_bytes: int
    padding_fraction: float | None  # None where the script does not count it


def main(argv: list[str] | None = None) -> dict:
    """Run the arms in turn, print the tables, and return what the last line holds.

    Raises:
        UserError: arguments, a data file or a model that will not do.
        RunFailed: a script failed, or they did not do the same work.
    """
    args = parse(argv)
    if args.keep is None:
        with tempfile.TemporaryDirectory(prefix="sft_throughput-") as folder:
            return compare(args, Path(folder))
    folder = args.keep.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--keep {args.keep}: {error.strerror}; pass another folder") from None
    if used:
        raise UserError(f"--keep {args.keep}: is not empty; pass a new folder")
    return compare(args, folder)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `steps` is always set."""
    parser = parser_of(__doc__, f"{QUICK['steps']} steps, no warm-up")
    parser.add_argument("--dataset", type=Path, help="GSM8K's train.jsonl [generated problems]")
    parser.add_argument("--rounds", type=int, help="runs of every arm [1]")
    parser.add_argument("--steps", type=int, help=f"of {ROWS_PER_STEP} rows each [50: all]")
    parser.add_argument("--keep", type=Path, help="new folder for the rows, logs and adapters")
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    return args


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Everything in one folder: the rows, the runs, the tables, the JSON line."""
    rows = read_gsm8k(args.dataset, ROWS) if args.dataset else generate_problems(ROWS)
    train_file = folder / "rows" / "train.jsonl"
    write_jsonl(train_file, rows)
    write_jsonl(folder / "rows" / "validation.jsonl", rows[:2])  # scored outside the clock
    (folder / "task.yaml").write_text(TEMPLATE, encoding="utf-8")
    model = resolve_apart(args.model_name_or_path)
    trl_script()  # if it is missing, say so at once

    if not args.quick:
        for arm in (OURS, TRL):
            print(f"warm-up, {arm}: {WARM_UP_STEPS} steps", flush=True)
            run_arm(arm, folder, model, WARM_UP_STEPS, f"warm-up_{arm}")
    runs = in_turn(
        ARMS,
        args.rounds,
        lambda arm, number: run_arm(
            arm, folder, model, args.steps, f"{arm}_{number}".replace(" ", "_")
        ),
        lambda run: f"{run.seconds:.1f} s, {run.tokens / run.seconds:.1f} tokens/s",
        check_same_work,
    )
    result = summarize(runs) | {
        "steps": args.steps,
        "rounds": args.rounds,
        "warm_up": not args.quick,
        "rows": ROWS,
        "rows_from": args.dataset.name if args.dataset else "generated",
        "rows_sha256": sha256_of(train_file)[train_file.name],
        "model": describe_model(args.model_name_or_path),
        "omp_num_threads": threads(),
        "cpu_count": cores(),
        "versions": versions(),
    }
    print_tables(result, {arm: runs[arm][0].losses for arm in ARMS})
    print(json.dumps(result))
    return result


def resolve_apart(model_name_or_path: str | None) -> str:
    """`resolve_model` in another process: what a conversion takes at its peak would be counted as
    the peak of every process started from this one.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(resolve_model, model_name_or_path).result()


def trl_script() -> Path:
    """TRL's own script in the installed package, which is not imported."""
    found = importlib.util.find_spec("trl")
    script = found and Path(found.submodule_search_locations[0]) / "scripts" / "sft.py"
    if not script or not script.is_file():
        raise UserError("trl: no scripts/sft.py is installed; pip install -r requirements.txt")
    return script


# One arm -----------------------------------------------------------------------------------------


def run_arm(arm: str, folder: Path, model: str, steps: int, name: str) -> Run:
    """Run a script in a process of its own and read what it leaves in `folder/name`.

    Raises:
        RunFailed: it ended with another code than 0.
    """
    output, log = folder / name, folder / f"{name}.log"
    options = {
        "model_name_or_path": model,
        "output_dir": output,
        "max_steps": steps,
        **SHARED,
    }
    rows = folder / "rows"
    if arm == OURS:
        script = ROOT / "recipes" / "lora_sft.py"
        options |= {"template": folder / "task.yaml", "dataset": rows, **OUR_OPTIONS}
    else:
        script = trl_script()
        options |= {"dataset_name": rows, **TRL_OPTIONS, **TRL_CHANGES[arm]}
    peak = run_process([sys.executable, str(script), *words(options)], log, folder / "cache", arm)

    if arm == OURS:
        state = json.loads((output / "trainer_state.json").read_text())
        metrics = json.loads((output / "metrics.json").read_text())
        tokens, seconds = metrics["train_tokens"], metrics["train_seconds"]
        padding = metrics["padding_fraction"]
    else:
        state = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())
        tokens, padding = int(state["log_history"][-1]["num_tokens"]), None
        lines = log.read_text(errors="replace").splitlines()
        printed = next(line for line in reversed(lines) if "'train_runtime'" in line)
        seconds = float(ast.literal_eval(printed)["train_runtime"])
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return Run(tokens, seconds, losses, peak, padding)


def run_process(command: list[str], log: Path, cache: Path, arm: str) -> int:
    """Run a command with its output in `log`; returns its peak resident memory in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": threads(), "HF_DATASETS_CACHE": str(cache)}
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:  # interrupted or ended: nothing is left running
            child.kill()
            child.wait()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        output = log.read_text(errors="replace")
        raise failure(arm, child.returncode, output, " (--keep DIR keeps the whole log)")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# The comparison ----------------------------------------------------------------------------------


def check_same_work(arm: str, run: Run, first: Run) -> None:
    """A run against our first one.

    Raises:
        RunFailed: other tokens or steps, or another loss in step 1, in which B is still zero.
    """
    for unit, count, wanted in (
        ("tokens", run.tokens, first.tokens),
        ("logged losses", len(run.losses), len(first.losses)),
    ):
        if count != wanted:
            raise RunFailed(f"{arm}: {count} {unit}, but {wanted} with {OURS}: not the same work")
    if not abs(run.losses[0] - first.losses[0]) <= LOSS_TOLERANCE:
        raise RunFailed(
            f"{arm}: loss {run.losses[0]:.6f} in step 1, but {first.losses[0]:.6f} with {OURS}: "
            "not the same work"
        )


def summarize(runs: dict[str, list[Run]]) -> dict:
    """`ratio` and the figures of every arm, over all rounds; losses are the first round's."""
    arms = {}
    for arm, several in runs.items():
        seconds = [run.seconds for run in several]
        arms[arm] = {
            "tokens_per_second": sum(run.tokens for run in several) / sum(seconds),
            "seconds": seconds,
            "tokens": several[0].tokens,
            "padding_fraction": several[0].padding_fraction,
            "peak_memory_bytes": max(run.peak_memory_bytes for run in several),
            "mean_loss": sum(several[0].losses) / len(several[0].losses),
        }
    ours = arms[OURS]["tokens_per_second"]
    faster = max((TRL, TRL_STORED), key=lambda arm: arms[arm]["tokens_per_second"])
    pairs = zip(runs[OURS][0].losses, runs[TRL_BARE][0].losses, strict=True)
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    return {
        "ratio": ours / arms[faster]["tokens_per_second"],
        "faster_trl": faster,
        "ratio_without_dropout": ours / arms[TRL_BARE]["tokens_per_second"],
        "arms": arms,
        "first_loss_difference": differences[0],
        "max_loss_difference": max(differences),
        "mean_loss_difference": sum(differences) / len(differences),
    }


def print_tables(result: dict, losses: dict[str, list[float]]) -> None:
    """The figures of every arm, then the loss of every step."""
    rows = []
    for arm, one in result["arms"].items():
        padding = one["padding_fraction"]
        rows.append(
            (
                arm,
                f"{one['tokens_per_second']:.1f}",
                " ".join(f"{seconds:.1f}" for seconds in one["seconds"]),
                "-" if padding is None else f"{padding:.1%}",
                f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
                f"{one['mean_loss']:.4f}",
            )
        )
    show_table(
        f"{result['model']}, float32, {result['omp_num_threads']} threads, {result['steps']} "
        f"steps of {ROWS_PER_STEP} rows ({result['rows_from']})",
        ("", "tokens/s", "seconds", "padding", "peak memory", "mean loss"),
        rows,
        caption=f"ratio {result['ratio']:.2f}: ours over {result['faster_trl']}; "
        f"{result['ratio_without_dropout']:.2f}: without dropout"
        + ("" if result["warm_up"] else "; no warm-up, the first step is part of the time"),
    )
    rows = []
    for step, values in enumerate(zip(*losses.values(), strict=True), 1):
        by_arm = dict(zip(losses, values, strict=True))
        difference = by_arm[OURS] - by_arm[TRL_BARE]
        rows.append((str(step), *(f"{loss:.5f}" for loss in values), f"{difference:+.5f}"))
    show_table(
        "loss of every step",
        ("step", *losses, "ours - last"),
        rows,
        names=0,
        caption="B starts at zero everywhere, so step 1 agrees; later the random starts of A "
        "differ: ours is Gaussian, TRL's uniform after Kaiming",
    )


if __name__ == "__main__":
    run_script(main)
