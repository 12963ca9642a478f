"""Transfer learning beside LoRA and full tuning: score, time, memory and disk of features with a
small model, of training the last layers above frozen ones that are computed once, and of LoRA in
those layers; and what each layer's states know.

    python benchmarks/transfer_methods.py --data data --keep runs/transfer_methods     # hours
    python benchmarks/transfer_methods.py --data data --tasks sst2 --seeds 1
    python benchmarks/transfer_methods.py --quick           # the bundled reviews, a few rows

Runs `recipes/transfer_learning.py`, `recipes/lora_sft.py`, and, for all parameters,
`recipes/instruction_sft.py` with a single task, in float32 on a CPU, each with its recipe's own
passes over --train_rows rows, which each seed draws anew and which are the same for all methods.
The score is the accuracy on all rows of the validation or test file, or on --rows of them. Time is
that of training, with what was computed once, of all seeds the least disturbed; disk is what the
result takes, and the cache.

DATA holds `sst2` and `trec` as `prepare_data.py` writes them. With --keep an interrupted benchmark
can be started again and goes on: runs that are there are not repeated. The figure shows the
accuracy of logistic regression on each layer's states. The last line is one JSON object.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from measuring import (
    BUNDLED,
    DATA_SETS,
    RunFailed,
    add_run_options,
    check_run_options,
    data_files,
    keep_settings,
    parser_of,
    run_recipe,
    run_script,
    set_numbers,
    sha256_of,
    show_table,
    spread,
)

from recipelib.models import describe_model
from recipelib.runtime import megabytes, printable, versions, write_json

TASKS = ("sst2", "trec", BUNDLED)
TRANSFER = "transfer_learning"
LORA_RATE = {"peft": "lora", "learning_rate": 5e-4}
# Recipe, and its options beside the task's.
METHODS = {
    "features": (TRANSFER, {"mode": "features"}),
    "freeze_2": (TRANSFER, {"train_layers": 2}),
    "freeze_5": (TRANSFER, {"train_layers": 5}),
    "freeze_10": (TRANSFER, {"train_layers": 10}),
    "lora_2": (TRANSFER, {"train_layers": 2, **LORA_RATE}),
    "lora_5": (TRANSFER, {"train_layers": 5, **LORA_RATE}),
    "lora_10": (TRANSFER, {"train_layers": 10, **LORA_RATE}),
    "lora": ("lora_sft", {}),
    "full": ("instruction_sft", {"rendering": "text"}),
}
TITLES = {
    "features": "logistic regression on features",
    "freeze_2": "the last 2 layers",
    "freeze_5": "the last 5 layers",
    "freeze_10": "the last 10 layers",
    "lora_2": "LoRA in the last 2 layers",
    "lora_5": "LoRA in the last 5 layers",
    "lora_10": "LoRA in the last 10 layers",
    "lora": "LoRA in all layers",
    "full": "all parameters",
}
SEED = 42  # the first; the trainer's own
FULL = {"seeds": 3, "train_rows": 800, "rows": None}
QUICK = {"seeds": 1, "train_rows": 16, "rows": 20}


def main(argv: list[str] | None = None) -> dict:
    """Make the runs, print the tables, draw the figure, and return what the last line holds.

    Raises:
        UserError: arguments, data files or a kept folder that will not do.
        RunFailed: a recipe failed, or trained on other rows than the rest.
    """
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="transfer_methods-") as temporary:
        keep = args.keep or Path(temporary)
        tasks = {task: run_task(task, args, keep) for task in args.tasks}
    result = {
        "tasks": tasks,
        "seeds": args.seeds,
        "train_rows": args.train_rows,
        "model": describe_model(args.model_name_or_path),
        "versions": versions(),
    }
    if figure := args.figure or (args.keep and args.keep / "transfer_methods.png"):
        draw(result, figure)
        print(printable(f"the figure: {figure}"))
    for task in tasks:
        print_table(result, task)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; all numbers but `rows` are set."""
    parser = parser_of(__doc__, "one seed, few rows")
    add_run_options(parser, TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, help="runs of each method [3]")
    parser.add_argument("--first_seed", type=int, default=SEED, help=f"[{SEED}]")
    parser.add_argument("--train_rows", type=int, help="that each seed draws [800]")
    parser.add_argument("--rows", type=int, help="of each task that are scored [all]")
    args = parser.parse_args(argv)
    check_run_options(args, TASKS)
    set_numbers(args, FULL, QUICK)
    return args


# The runs ----------------------------------------------------------------------------------------


def run_task(task: str, args: argparse.Namespace, keep: Path) -> dict:
    """What every method came to.

    Raises:
        UserError: a data file is missing, or what is kept was run with other settings.
        RunFailed: see `main`.
    """
    settings = {
        "train_rows": args.train_rows,
        "rows": args.rows,
        "model": args.model_name_or_path,
        "sha256": sha256_of(*data_files(task, args.data)),
    }
    keep_settings(keep / f"{task}.json", settings)
    methods: dict[str, list[dict]] = {method: [] for method in args.methods}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        work = set()
        for method, runs in methods.items():
            run = make_run(task, method, seed, args, keep / f"{task}-{method}-{seed}")
            work.add((run["train_rows"], run["eval_rows"]))
            if len(work) > 1:
                raise RunFailed(
                    f"{task}, {method}, seed {seed}: was trained or scored on other rows"
                )
            runs.append(run)
            print(
                printable(
                    f"{task}, {method}, seed {seed}: {run['score']:.3f}, "
                    f"{run['train_seconds']:.0f} s"
                ),
                flush=True,
            )
    first = next(iter(methods.values()))[0]
    return {
        "rows": first["eval_rows"],
        "base_score": first["base_score"],
        "layers": layers_of(methods.get("features", [])),
        "methods": {
            method: {
                "scores": [run["score"] for run in runs],
                "trainable_parameters": runs[0]["trainable_parameters"],
                "train_seconds": min(run["train_seconds"] for run in runs),
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
                "result_bytes": runs[0]["result_bytes"],
                "cache_bytes": runs[0].get("cache_bytes", 0),
            }
            for method, runs in methods.items()
        },
    }


def layers_of(runs: list[dict]) -> dict[str, list[float]]:
    """The accuracy of each layer in each run, in cross-validation."""
    numbers = runs[0]["layer_accuracies"] if runs else {}
    return {number: [run["layer_accuracies"][number]["mean"] for run in runs] for number in numbers}


def make_run(task: str, method: str, seed: int, args: argparse.Namespace, folder: Path) -> dict:
    """The metrics of a run, made unless it is there, with the bytes that its result takes.

    Raises:
        RunFailed: the recipe failed.
    """
    recipe, own = METHODS[method]
    source = data_files(task, args.data)[0].parent
    several = recipe == "instruction_sft"  # which takes tasks with their data
    cache = folder.parent / "cache"
    options = {
        "template": f"{task}={source}" if several else task,
        "dataset": None if several else source,
        "columns": DATA_SETS[task].columns or None,
        "model_name_or_path": args.model_name_or_path,
        "max_train_samples": args.train_rows,
        "max_eval_samples": args.rows or -1,  # some recipes score fewer by default
        **({} if method == "features" else {"save_strategy": "no"}),
        "seed": seed,
        # Nothing is found that an earlier run has computed.
        **({"cache_dir": cache} if recipe == TRANSFER else {}),
        **own,
    }
    metrics = run_recipe(recipe, options, folder)
    shutil.rmtree(cache, ignore_errors=True)
    if "result_bytes" not in metrics:
        weights = [*folder.glob("*.safetensors"), *folder.glob("probe.*")]
        metrics["result_bytes"] = sum(file.stat().st_size for file in weights)
        write_json(folder / "metrics.json", metrics)
        for file in folder.glob("model*.safetensors"):  # half a gigabyte that nobody reads
            file.unlink()
    return metrics


# What they came to -------------------------------------------------------------------------------


def print_table(result: dict, task: str) -> None:
    """A row for each method."""
    found = result["tasks"][task]
    rows = [("nothing", "0", f"{found['base_score']:.3f}", "", "", "", "")]
    for method, one in found["methods"].items():
        rows.append(
            (
                TITLES[method],
                f"{one['trainable_parameters']:,}",
                spread(one["scores"]),
                f"{one['train_seconds']:.0f} s",
                f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
                megabytes(one["result_bytes"]),
                megabytes(one["cache_bytes"]) if one["cache_bytes"] else "",
            )
        )
    show_table(
        f"{DATA_SETS[task].title}, {found['rows']} rows, {result['model']}, "
        f"{result['train_rows']} rows trained, {result['seeds']} seeds",
        ("trained", "parameters", "accuracy", "training", "peak memory", "result", "cache"),
        rows,
        width=120,
    )


def draw(result: dict, path: Path) -> None:
    """The accuracy of each layer's states, a line and its spread for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7.5, 4))
    for (task, found), color in zip(
        result["tasks"].items(), ("#1f6f8b", "#c8553d", "#7a9e3d"), strict=False
    ):
        if not found["layers"]:
            continue
        numbers = [int(number) for number in found["layers"]]
        scores = np.array([*found["layers"].values()])
        middle = scores.mean(axis=1)
        panel.fill_between(numbers, scores.min(axis=1), scores.max(axis=1), color=color, alpha=0.2)
        panel.plot(numbers, middle, "o-", color=color, markersize=3.5, label=DATA_SETS[task].title)
        best = int(middle.argmax())
        panel.plot(
            [numbers[best]], [middle[best]], "o", color=color, markersize=9, fillstyle="none"
        )
        panel.annotate(
            f"layer {numbers[best]}: {middle[best]:.3f}",
            (numbers[best], middle[best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=color,
        )
    panel.set_xlabel("layer (0: the embeddings)")
    panel.set_ylabel("accuracy in cross-validation")
    panel.margins(y=0.12)
    panel.grid(axis="y", color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower right")
    title = f"Logistic regression on each layer's states, {result['train_rows']} rows"
    panel.set_title(title, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
