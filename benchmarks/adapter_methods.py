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
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from recipelib.models.loading import describe_model
from recipelib.runtime.console import printable
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import write_json
from recipelib.runtime.installed import versions

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = "movie_reviews"
# Files, and what the recipes are told of their columns.
TASKS = {
    "sst2": ("SST-2", ("train.jsonl", "validation.jsonl"), ()),
    "trec": ("TREC", ("train.jsonl", "test.jsonl"), ("text=question", "label=label")),
    BUNDLED: ("bundled reviews", ("train.jsonl", "validation.jsonl"), ()),
}
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


class RunFailed(Exception):
    """A run of a recipe ended badly, or had other rows; its text is one line."""


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sst2 and trec")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="[all that --data holds]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seeds", type=int, help="runs of each method [3]")
    parser.add_argument("--train_rows", type=int, help="that each seed draws [800]")
    parser.add_argument("--rows", type=int, help="of each task that are scored [all]")
    parser.add_argument("--quick", action="store_true", help="one seed, few rows")
    parser.add_argument("--model_name_or_path", help="folder, .gguf file or hub id [the bundled]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for what the runs leave")
    parser.add_argument("--figure", type=Path, help="PNG to draw [in --keep, else none]")
    args = parser.parse_args(argv)
    if args.tasks is None:
        args.tasks = [name for name in TASKS if (name == BUNDLED) == (args.data is None)]
    if args.data is None and (others := [name for name in args.tasks if name != BUNDLED]):
        raise UserError(f"--tasks {others[0]}: needs --data, the folder that holds {others[0]}")
    for name, number in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, number)
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


# The runs ----------------------------------------------------------------------------------------


def run_task(task: str, args: argparse.Namespace, keep: Path) -> dict:
    """What every method came to.

    Raises:
        UserError: a data file is missing, or what is kept was run with other settings.
        RunFailed: see `main`.
    """
    files = data_files(task, args.data)
    settings = {
        "train_rows": args.train_rows,
        "rows": args.rows,
        "model": args.model_name_or_path,
        "sha256": {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in files},
    }
    file = keep / f"{task}.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise UserError(
            f"--keep {keep}: {task} was run with other settings (see {file.name}); pass another "
            "folder"
        )
    write_json(file, settings)
    methods: dict[str, list[dict]] = {method: [] for method in args.methods}
    for seed in range(SEED, SEED + args.seeds):
        work = set()
        for method, runs in methods.items():
            run = run_recipe(task, method, seed, args, keep / f"{task}-{method}-{seed}")
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


def data_files(task: str, data: Path | None) -> list[Path]:
    """A task's files.

    Raises:
        UserError: one is missing.
    """
    folder = ROOT / "data_templates" / "examples" / BUNDLED if task == BUNDLED else data / task
    for name in TASKS[task][1]:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: no such file; python benchmarks/prepare_data.py {task} "
                f"--output {folder}"
            )
    return [folder / name for name in TASKS[task][1]]


def run_recipe(task: str, method: str, seed: int, args: argparse.Namespace, folder: Path) -> dict:
    """The metrics of a run, made in a process of its own unless they are there.

    Raises:
        RunFailed: the recipe failed.
    """
    metrics = folder / "metrics.json"
    if not metrics.exists():
        recipe, own = METHODS[method]
        source = data_files(task, args.data)[0].parent
        options = {"use_cpu": True, "save_strategy": "no", "num_train_epochs": 1, "seed": seed}
        options |= {"max_train_samples": args.train_rows, "output_dir": folder, **own}
        options |= {"max_eval_samples": args.rows or -1}  # some recipes score fewer by default
        if args.model_name_or_path:
            options["model_name_or_path"] = args.model_name_or_path
        if recipe == "instruction_sft":
            options["template"] = f"{task}={source}"
        else:
            options |= {"template": task, "dataset": source}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        words += ["--columns", *TASKS[task][2]] if TASKS[task][2] else []
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        with log.open("ab") as file:
            done = subprocess.run(
                [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        if done.returncode:
            said = [one for one in log.read_text(errors="replace").splitlines() if one.strip()]
            raise RunFailed(
                f"{folder.name}: ended with exit code {done.returncode}: "
                f"{said[-1] if said else 'no output'} (--keep DIR keeps the log)"
            )
        for weights in folder.glob("model*.safetensors"):  # half a gigabyte that nobody reads
            weights.unlink()
    return json.loads(metrics.read_text(encoding="utf-8"))


# What they came to -------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """The mean of several runs ± their standard deviation; a single one as it is."""
    shown = f"{mean(values):.3f}"
    return f"{shown} ± {stdev(values):.3f}" if len(values) > 1 else shown


def print_table(result: dict) -> None:
    """A row for each method, a column for each task; plain text outside a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(**({} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}))
    title = f"Accuracy, {result['model']}, {result['train_rows']} rows, {result['seeds']} seeds"
    table = Table(title=printable(title), title_justify="left")
    tasks = result["tasks"]
    first = next(iter(tasks.values()))
    table.add_column("trained")
    table.add_column("parameters", justify="right")
    table.add_column("of all", justify="right")
    for task, found in tasks.items():
        table.add_column(f"{TASKS[task][0]}, {found['rows']} rows", justify="right")
    table.add_row("nothing", "0", "", *(f"{one['base_score']:.3f}" for one in tasks.values()))
    for method, one in first["methods"].items():
        count = one["trainable_parameters"]
        scores = [spread(found["methods"][method]["scores"]) for found in tasks.values()]
        share = f"{count / first['total_parameters']:.1%}"
        table.add_row(TITLES[method], f"{count:,}", share, *scores)
    console.print(table)


def draw(result: dict, path: Path) -> None:
    """The accuracy over the number of trained parameters, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(result["tasks"])
    figure, panels = plt.subplots(1, count, figsize=(4.8 * count, 3.8), squeeze=False)
    for panel, (task, found) in zip(panels[0], result["tasks"].items(), strict=True):
        methods = found["methods"]
        if full := methods.get("full"):
            panel.axhline(mean(full["scores"]), color="#c8553d", linewidth=1.2)
            label = f"all {full['trainable_parameters'] / 1e6:.0f} M parameters"
            panel.axhspan(*band(full["scores"]), color="#c8553d", alpha=0.12, label=label)
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
                    yerr=[(band(one["scores"])[1] - mean(one["scores"])) for one in shown],
                    fmt=marker,
                    color=color,
                    capsize=3,
                    label=name,
                )
        panel.set_xscale("log")
        panel.margins(x=0.12)
        panel.set_title(TASKS[task][0], loc="left")
        panel.set_xlabel("trained parameters")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e5e5e5")
    panels[0][0].set_ylabel("accuracy")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def band(values: list[float]) -> tuple[float, float]:
    """The mean less and plus the standard deviation."""
    aside = stdev(values) if len(values) > 1 else 0.0
    return mean(values) - aside, mean(values) + aside


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that trains is ended, too
    try:
        main()
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
