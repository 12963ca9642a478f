"""Bottleneck adapters of several sizes beside full tuning and LoRA: accuracy over trained
parameters, as in figure 4 of Houlsby et al. 2019.

    python benchmarks/adapter_methods.py --data data --keep runs/adapter_methods     # hours
    python benchmarks/adapter_methods.py --data data --tasks sst2 --seeds 1
    python benchmarks/adapter_methods.py --quick            # the bundled reviews, a few rows

Runs `recipes/adapter_sft.py`, `recipes/lora_sft.py`, and, for all parameters,
`recipes/instruction_sft.py` with a single task, in float32 on a CPU: one pass over --train_rows
rows, which each seed draws anew and which are the same for all methods, at the recipes' own rates.
The score is the accuracy on all rows of the validation or test file, or on --rows of them.

DATA holds `sst2` and `trec` as `prepare_data.py` writes them. With --keep an interrupted benchmark
can be started again and goes on: runs that are there are not repeated. The figure shows accuracy
over trained parameters, and full tuning as a line. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from measuring import (
    BUNDLED,
    DATA_SETS,
    RunFailed,
    accuracy_figure,
    add_run_options,
    check_run_options,
    data_files,
    deviation,
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
from recipelib.runtime import printable, versions

TASKS = ("sst2", "trec", BUNDLED)
# Recipe, and its options beside the task's.
METHODS = {
    "adapter_8": ("adapter_sft", {"bottleneck_size": 8}),
    "adapter_64": ("adapter_sft", {"bottleneck_size": 64}),
    "adapter_256": ("adapter_sft", {"bottleneck_size": 256}),
    "norms": ("adapter_sft", {"bottleneck_size": 64, "train_norms": True}),
    "lora": ("lora_sft", {}),
    "full": ("instruction_sft", {"rendering": "text"}),
}
TITLES = {
    "adapter_8": "adapters, m = 8",
    "adapter_64": "adapters, m = 64",
    "adapter_256": "adapters, m = 256",
    "norms": "adapters, m = 64, and layer norms",
    "lora": "LoRA, r = 16",
    "full": "all parameters",
}
SEED = 42  # the first; the trainer's own
FULL = {"seeds": 3, "train_rows": 800, "rows": None}
QUICK = {"seeds": 1, "train_rows": 16, "rows": 20}


def main(argv: list[str] | None = None) -> dict:
    """Make the runs, print the table, draw the figure, and return what the last line holds.

    Raises:
        UserError: arguments, data files or a kept folder that will not do.
        RunFailed: a recipe failed, or trained on other tokens than the rest.
    """
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="adapter_methods-") as temporary:
        keep = args.keep or Path(temporary)
        tasks = {task: run_task(task, args, keep) for task in args.tasks}
    result = {
        "tasks": tasks,
        "seeds": args.seeds,
        "train_rows": args.train_rows,
        "model": describe_model(args.model_name_or_path),
        "versions": versions(),
    }
    if figure := args.figure or (args.keep and args.keep / "adapter_methods.png"):
        draw(result, figure)
        print(printable(f"the figure: {figure}"))
    print_table(result)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; all numbers but `rows` are set."""
    parser = parser_of(__doc__, "one seed, few rows")
    add_run_options(parser, TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, help="runs of each method [3]")
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
    for seed in range(SEED, SEED + args.seeds):
        work = set()
        for method, runs in methods.items():
            run = make_run(task, method, seed, args, keep / f"{task}-{method}-{seed}")
            work.add((run["train_tokens"], run["eval_rows"]))
            if len(work) > 1:
                raise RunFailed(
                    f"{task}, {method}, seed {seed}: was trained or scored on other rows"
                )
            runs.append(run)
            print(printable(f"{task}, {method}, seed {seed}: {run['score']:.3f}"), flush=True)
    first = next(iter(methods.values()))[0]
    return {
        "rows": first["eval_rows"],
        "base_score": first["base_score"],
        "total_parameters": min(
            run["total_parameters"] for some in methods.values() for run in some
        ),
        "methods": {
            method: {
                "scores": [run["score"] for run in runs],
                "trainable_parameters": runs[0]["trainable_parameters"],
                "train_seconds": mean(run["train_seconds"] for run in runs),
            }
            for method, runs in methods.items()
        },
    }


def make_run(task: str, method: str, seed: int, args: argparse.Namespace, folder: Path) -> dict:
    """The metrics of a run, made unless it is there.

    Raises:
        RunFailed: the recipe failed.
    """
    recipe, own = METHODS[method]
    source = data_files(task, args.data)[0].parent
    several = recipe == "instruction_sft"  # which takes tasks with their data
    options = {
        "template": f"{task}={source}" if several else task,
        "dataset": None if several else source,
        "columns": DATA_SETS[task].columns or None,
        "model_name_or_path": args.model_name_or_path,
        "max_train_samples": args.train_rows,
        "max_eval_samples": args.rows or -1,  # some recipes score fewer by default
        "num_train_epochs": 1,
        "save_strategy": "no",
        "seed": seed,
        **own,
    }
    metrics = run_recipe(recipe, options, folder)
    for weights in folder.glob("model*.safetensors"):  # half a gigabyte that nobody reads
        weights.unlink()
    return metrics


# What they came to -------------------------------------------------------------------------------


def print_table(result: dict) -> None:
    """A row for each method, a column for each task."""
    tasks = result["tasks"]
    first = next(iter(tasks.values()))
    rows = [("nothing", "0", "", *(f"{one['base_score']:.3f}" for one in tasks.values()))]
    for method, one in first["methods"].items():
        count = one["trainable_parameters"]
        scores = [spread(found["methods"][method]["scores"]) for found in tasks.values()]
        share = f"{count / first['total_parameters']:.1%}"
        rows.append((TITLES[method], f"{count:,}", share, *scores))
    titles = [f"{DATA_SETS[task].title}, {found['rows']} rows" for task, found in tasks.items()]
    show_table(
        f"Accuracy, {result['model']}, {result['train_rows']} rows, {result['seeds']} seeds",
        ("trained", "parameters", "of all", *titles),
        rows,
    )


def draw(result: dict, path: Path) -> None:
    """The accuracy over the number of trained parameters, a panel for each task."""
    titles = [DATA_SETS[task].title for task in result["tasks"]]
    with accuracy_figure(path, titles, legend=4) as panels:
        for panel, found in zip(panels, result["tasks"].values(), strict=True):
            draw_task(panel, found["methods"])


def draw_task(panel, methods: dict[str, dict]) -> None:
    """Each method a point, full tuning a line."""
    if full := methods.get("full"):
        middle, aside = mean(full["scores"]), deviation(full["scores"])
        panel.axhline(middle, color="#c8553d", linewidth=1.2)
        label = f"all {full['trainable_parameters'] / 1e6:.0f} M parameters"
        panel.axhspan(middle - aside, middle + aside, color="#c8553d", alpha=0.12, label=label)
    styles = {
        "adapters": ("o-", "#1f6f8b", ("adapter_8", "adapter_64", "adapter_256")),
        "and norms": ("^", "#9b6bb3", ("norms",)),
        "LoRA": ("s", "#7a9e3d", ("lora",)),
    }
    for name, (marker, color, keys) in styles.items():
        if shown := [methods[key] for key in keys if key in methods]:
            panel.errorbar(
                [one["trainable_parameters"] for one in shown],
                [mean(one["scores"]) for one in shown],
                yerr=[deviation(one["scores"]) for one in shown],
                fmt=marker,
                color=color,
                capsize=3,
                label=name,
            )


if __name__ == "__main__":
    run_script(main)
