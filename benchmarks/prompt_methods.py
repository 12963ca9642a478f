"""Soft prompts beside P-tuning, tuning through the cloze and LoRA: accuracy with few rows and many.

    python benchmarks/prompt_methods.py --data data --keep runs/prompt_methods     # many hours
    python benchmarks/prompt_methods.py --data data --tasks sst2 --methods soft_prompt model
    python benchmarks/prompt_methods.py --quick             # the bundled reviews, a few rows

Runs `recipes/prompt_tuning.py`, `recipes/cloze_sft.py`, and `recipes/lora_sft.py` on the same rows,
in float32 on a CPU: the untouched model (zero), --per_class rows of each class for --steps steps in
several draws, of which each has as many validation rows to choose the best pass by (LoRA takes its
last), and one pass over --train_rows of all. A step has 8 rows. The score is the accuracy on the
same evaluation rows every time.

DATA holds `sst2`, `trec` and `rte` as `prepare_data.py` writes them. With --keep an interrupted
benchmark can be started again and goes on: runs that are there are not repeated. The figure shows
the accuracy over the number of trained parameters. The last line is one JSON object.
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

from recipelib.data.drawing import few_shot_rows
from recipelib.data.rows import load_rows, parse_columns
from recipelib.models.loading import describe_model
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.console import printable
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import write_json, write_jsonl
from recipelib.runtime.installed import versions

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = "movie_reviews"
# Files, and what the recipes are told of their columns.
TASKS = {
    "sst2": ("SST-2", ("train.jsonl", "validation.jsonl"), ()),
    "trec": ("TREC", ("train.jsonl", "test.jsonl"), ("text=question", "label=label")),
    "rte": ("RTE", ("train.jsonl", "validation.jsonl"), ()),
    BUNDLED: ("bundled reviews", ("train.jsonl", "validation.jsonl"), ()),
}
METHODS = {
    "soft_prompt": "soft prompt",
    "p_tuning": "P-tuning",
    "model": "model through the cloze",
    "lora": "LoRA",
}
# The recipe that makes a method's runs, and what it is told; LoRA has rows of its own.
RECIPES = {
    "zero": ("cloze_sft", {"score_only": True}),
    "soft_prompt": ("prompt_tuning", {"tune": "soft_prompt"}),
    "p_tuning": ("prompt_tuning", {"tune": "p_tuning"}),
    "model": ("cloze_sft", {}),
}
SHORT = {"soft_prompt": "soft", "p_tuning": "P-tuning", "model": "model", "lora": "LoRA"}
FULL = {"per_class": 16, "draws": 5, "steps": 40, "train_rows": 800, "rows": 200}
QUICK = {"per_class": 4, "draws": 2, "steps": 10, "train_rows": 16, "rows": 20}
# What a run depends on, and so does what is kept of it.
SETTINGS = {"none": (), "few": ("per_class", "draws", "steps"), "many": ("train_rows",)}


class RunFailed(Exception):
    """A run of a recipe ended badly; its text is one line."""


def main(argv: list[str] | None = None) -> dict:
    """Make the runs, print the table, draw the figure, and return what the last line holds.

    Raises:
        UserError: arguments, data files or a kept folder that will not do.
        RunFailed: a recipe failed.
    """
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="prompt_methods-") as temporary:
        keep = args.keep or Path(temporary)
        tasks = {}
        for task in args.tasks:
            runs = {"zero": make_run(task, "zero", "none", args, keep)}
            for method in args.methods:
                for regime in args.regimes:
                    name = f"{method}-{regime}"
                    runs[name] = run = make_run(task, method, regime, args, keep)
                    shown = f"{run['seconds']:.0f} s of training"
                    print(
                        printable(f"{task}, {name}: {spread(run['scores'])}; {shown}"), flush=True
                    )
            tasks[task] = runs
    result = {
        "tasks": tasks,
        "per_class": args.per_class,
        "draws": args.draws,
        "train_rows": args.train_rows,
        "rows": args.rows,
        "model": describe_model(args.model_name_or_path),
        "versions": versions(),
    }
    if figure := args.figure or (args.keep and args.keep / "prompt_methods.png"):
        draw(result, figure)
        print(printable(f"the figure: {figure}"))
    print_table(result)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; all numbers are set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sst2, trec and rte")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="[all that --data holds]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--regimes", nargs="+", choices=("few", "many"), default=["few", "many"])
    parser.add_argument("--per_class", type=int, help="rows of each class [16]")
    parser.add_argument("--draws", type=int, help="of these rows [5]")
    parser.add_argument("--steps", type=int, help="of a draw [40]")
    parser.add_argument("--train_rows", type=int, help="where rows are many [800]")
    parser.add_argument("--rows", type=int, help="of each task that are scored [200]")
    parser.add_argument("--quick", action="store_true", help="few rows of everything")
    parser.add_argument("--model_name_or_path", help="folder, .gguf file or hub id [the bundled]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for what the runs leave")
    parser.add_argument("--figure", type=Path, help="PNG to draw [in --keep, else none]")
    args = parser.parse_args(argv)
    if args.tasks is None:
        args.tasks = [name for name in TASKS if (name == BUNDLED) == (args.data is None)]
    if args.data is None and (others := [name for name in args.tasks if name != BUNDLED]):
        raise UserError(f"--tasks {others[0]}: needs --data, the folder that holds {others[0]}")
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


def data_folder(task: str, data: Path | None) -> Path:
    """Where a task's files are.

    Raises:
        UserError: one is missing.
    """
    folder = ROOT / "data_templates" / "examples" / BUNDLED if task == BUNDLED else data / task
    for file in TASKS[task][1]:
        if not (folder / file).is_file():
            raise UserError(
                f"{folder / file}: no such file; python benchmarks/prepare_data.py {task} "
                f"--output {folder}"
            )
    return folder


# One run -----------------------------------------------------------------------------------------


def make_run(task: str, method: str, regime: str, args: argparse.Namespace, keep: Path) -> dict:
    """The scores of a method: those of a run that is there, else of a new one.

    Raises:
        UserError: what is there was run with other settings.
    """
    folder, source = keep / f"{task}-{method}-{regime}", data_folder(task, args.data)
    settings = {
        "rows": args.rows,
        "model": args.model_name_or_path,
        "sha256": {
            file: hashlib.sha256((source / file).read_bytes()).hexdigest()
            for file in TASKS[task][1]
        },
    }
    settings |= {name: getattr(args, name) for name in SETTINGS[regime]}
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise UserError(
            f"--keep {keep}: {folder.name} was run with other settings (see its settings.json); "
            "pass another folder"
        )
    write_json(file, settings)
    options = {"template": task, "dataset": source, "max_eval_samples": args.rows}
    options |= {"use_cpu": True, "save_strategy": "no"}
    if args.model_name_or_path:
        options["model_name_or_path"] = args.model_name_or_path
    if regime == "many":
        options |= {"max_train_samples": args.train_rows, "num_train_epochs": 1}
    if regime == "few":
        options["max_steps"] = args.steps
    if method == "lora" and regime == "few":
        # The rows of each draw as prompt_tuning.py takes them, in files of their own.
        runs = []
        for number in range(args.draws):
            rows = drawn_rows(task, source, args.per_class, number, folder / f"rows_{number}")
            runs.append(
                run_recipe("lora_sft", options | {"dataset": rows}, folder / f"draw_{number}", task)
            )
        scores = [run["score"] for run in runs]
    elif method == "lora":
        runs = [run_recipe("lora_sft", options, folder, task)]
        scores = [runs[0]["score"]]
    else:
        recipe, own = RECIPES[method]
        if regime == "few":
            options |= {"per_class": args.per_class, "draws": args.draws}
        runs = [run_recipe(recipe, options | own, folder, task)]
        scores = runs[0].get("draws", [runs[0]["score"]])
    return {
        "scores": scores,
        "calibrated": runs[0].get("calibrated"),
        "stderr": runs[0]["stderr"] if len(scores) == 1 else stdev(scores) / len(scores) ** 0.5,
        "trainable_parameters": runs[0]["trainable_parameters"],
        "seconds": sum(run.get("train_seconds", 0.0) for run in runs),
    }


def drawn_rows(task: str, source: Path, per_class: int, draw: int, folder: Path) -> Path:
    """A folder with the rows of one draw to train on, and the evaluation rows."""
    _, (train, evaluation), columns = TASKS[task]
    template = PromptTemplate.load(task, columns=parse_columns(columns))
    rows = load_rows(template, str(source / train), "train").rows
    folder.mkdir(parents=True, exist_ok=True)
    drawn, _ = few_shot_rows(template, rows, per_class, 42 + draw)  # 42: the trainer's own seed
    write_jsonl(folder / train, drawn)
    (folder / evaluation).write_bytes((source / evaluation).read_bytes())
    return folder


def run_recipe(recipe: str, options: dict, folder: Path, task: str) -> dict:
    """The metrics of a run in `folder`, made in a process of its own unless they are there.

    Raises:
        RunFailed: the recipe failed.
    """
    metrics = folder / "metrics.json"
    if not metrics.exists():
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        words += ["--columns", *TASKS[task][2]] if TASKS[task][2] else []
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        script = str(ROOT / "recipes" / f"{recipe}.py")
        with log.open("ab") as file:
            done = subprocess.run(
                [sys.executable, script, *words, "--output_dir", str(folder)],
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
    return json.loads(metrics.read_text(encoding="utf-8"))


# What they came to -------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """The mean of several draws ± their standard deviation; a single one as it is."""
    shown = f"{mean(values):.3f}"
    return f"{shown} ± {stdev(values):.3f}" if len(values) > 1 else shown


def columns_of(result: dict) -> dict[str, str]:
    """The regimes with their titles."""
    return {
        "few": f"{result['per_class']} per class",
        "many": f"{result['train_rows']} rows",
    }


def print_table(result: dict) -> None:
    """A row for each task and method; plain text outside a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(**({} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}))
    table = Table(
        title=printable(f"Accuracy on {result['rows']} rows, {result['model']}"),
        title_justify="left",
    )
    table.add_column("task")
    table.add_column("method")
    for name in ("trained parameters", *columns_of(result).values()):
        table.add_column(name, justify="right")
    for task, runs in result["tasks"].items():
        zero = runs["zero"]
        calibrated = zero["calibrated"]
        also = "" if calibrated is None else f", calibrated {calibrated:.3f}"
        table.add_row(TASKS[task][0], f"untouched {spread(zero['scores'])}{also}", "0", "", "")
        for method, title in METHODS.items():
            found = {regime: runs.get(f"{method}-{regime}") for regime in columns_of(result)}
            if any(found.values()):
                count = next(run for run in found.values() if run)["trainable_parameters"]
                cells = [spread(run["scores"]) if run else "" for run in found.values()]
                table.add_row("", title, f"{count:,}", *cells)
    console.print(table)


def draw(result: dict, path: Path) -> None:
    """The accuracy over the number of trained parameters, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(result["tasks"])
    figure, panels = plt.subplots(1, count, figsize=(4.6 * count, 3.8), squeeze=False, sharey=True)
    # Side by side where a method stands, so that neither hides the other.
    styles = {"few": ("o", "#1f6f8b", 0.87), "many": ("s", "#c8553d", 1.15)}
    for panel, (task, runs) in zip(panels[0], result["tasks"].items(), strict=True):
        zero = mean(runs["zero"]["scores"])
        panel.axhline(zero, color="#777777", linestyle="--", linewidth=1, label="untouched model")
        sizes = {}
        for regime, title in columns_of(result).items():
            marker, color, aside = styles[regime]
            shown = {
                method: runs[f"{method}-{regime}"]
                for method in METHODS
                if f"{method}-{regime}" in runs
            }
            sizes |= {method: run["trainable_parameters"] for method, run in shown.items()}
            panel.errorbar(
                [run["trainable_parameters"] * aside for run in shown.values()],
                [mean(run["scores"]) for run in shown.values()],
                yerr=[
                    stdev(run["scores"]) if len(run["scores"]) > 1 else 0 for run in shown.values()
                ],
                fmt=marker,
                color=color,
                capsize=3,
                label=title,
            )
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.minorticks_off()
        counts = [f"{one / 1e6:.3g} M" if one >= 1e6 else f"{one:,}" for one in sizes.values()]
        names = [f"{SHORT[one]}\n{count}" for one, count in zip(sizes, counts, strict=True)]
        panel.set_xticks(list(sizes.values()), names, fontsize=8)
        panel.set_title(TASKS[task][0], loc="left")
        panel.set_xlabel("trained parameters")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e5e5e5")
    panels[0][0].set_ylabel("accuracy")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that trains is ended, too
    try:
        main()
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
