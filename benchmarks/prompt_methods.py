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
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev

from measuring import (
    DATA_SETS,
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

from recipelib.data import few_shot_rows, parse_columns
from recipelib.data.rows import load_rows
from recipelib.models import describe_model
from recipelib.prompts import PromptTemplate
from recipelib.runtime import printable, versions, write_jsonl

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
    parser = parser_of(__doc__, "few rows of everything")
    add_run_options(parser, [*DATA_SETS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--regimes", nargs="+", choices=("few", "many"), default=["few", "many"])
    parser.add_argument("--per_class", type=int, help="rows of each class [16]")
    parser.add_argument("--draws", type=int, help="of these rows [5]")
    parser.add_argument("--steps", type=int, help="of a draw [40]")
    parser.add_argument("--train_rows", type=int, help="where rows are many [800]")
    parser.add_argument("--rows", type=int, help="of each task that are scored [200]")
    args = parser.parse_args(argv)
    check_run_options(args, [*DATA_SETS])
    set_numbers(args, FULL, QUICK)
    return args


# One run -----------------------------------------------------------------------------------------


def make_run(task: str, method: str, regime: str, args: argparse.Namespace, keep: Path) -> dict:
    """The scores of a method: those of a run that is there, else of a new one.

    Raises:
        UserError: what is there was run with other settings.
    """
    folder, files = keep / f"{task}-{method}-{regime}", data_files(task, args.data)
    settings = {
        "rows": args.rows,
        "model": args.model_name_or_path,
        "sha256": sha256_of(*files),
        **{name: getattr(args, name) for name in SETTINGS[regime]},
    }
    keep_settings(folder / "settings.json", settings)
    options = {
        "template": task,
        "dataset": files[0].parent,
        "columns": DATA_SETS[task].columns or None,
        "max_eval_samples": args.rows,
        "model_name_or_path": args.model_name_or_path,
    }
    if regime != "none":
        options["save_strategy"] = "no"
    if regime == "many":
        options |= {"max_train_samples": args.train_rows, "num_train_epochs": 1}
    if regime == "few":
        options["max_steps"] = args.steps
    if method == "lora" and regime == "few":
        # The rows of each draw as prompt_tuning.py takes them, in files of their own.
        runs = []
        for number in range(args.draws):
            rows = drawn_rows(task, files, args.per_class, number, folder / f"rows_{number}")
            own = options | {"dataset": rows}
            runs.append(run_recipe("lora_sft", own, folder / f"draw_{number}"))
        scores = [run["score"] for run in runs]
    elif method == "lora":
        runs = [run_recipe("lora_sft", options, folder)]
        scores = [runs[0]["score"]]
    else:
        recipe, own = RECIPES[method]
        if regime == "few":
            options |= {"per_class": args.per_class, "draws": args.draws}
        runs = [run_recipe(recipe, options | own, folder)]
        scores = runs[0].get("draws", [runs[0]["score"]])
    return {
        "scores": scores,
        "calibrated": runs[0].get("calibrated"),
        "stderr": runs[0]["stderr"] if len(scores) == 1 else stdev(scores) / len(scores) ** 0.5,
        "trainable_parameters": runs[0]["trainable_parameters"],
        "seconds": sum(run.get("train_seconds", 0.0) for run in runs),
    }


def drawn_rows(task: str, files: list[Path], per_class: int, draw: int, folder: Path) -> Path:
    """A folder with the rows of one draw to train on, and the evaluation rows."""
    train, evaluation = files
    template = PromptTemplate.load(task, columns=parse_columns(DATA_SETS[task].columns))
    rows = load_rows(template, str(train), "train").rows
    folder.mkdir(parents=True, exist_ok=True)
    drawn, _ = few_shot_rows(template, rows, per_class, 42 + draw)  # 42: the trainer's own seed
    write_jsonl(folder / train.name, drawn)
    (folder / evaluation.name).write_bytes(evaluation.read_bytes())
    return folder


# What they came to -------------------------------------------------------------------------------


def columns_of(result: dict) -> dict[str, str]:
    """The regimes with their titles."""
    return {
        "few": f"{result['per_class']} per class",
        "many": f"{result['train_rows']} rows",
    }


def print_table(result: dict) -> None:
    """A row for each task and method."""
    rows = []
    for task, runs in result["tasks"].items():
        zero = runs["zero"]
        calibrated = zero["calibrated"]
        also = "" if calibrated is None else f", calibrated {calibrated:.3f}"
        untouched = f"untouched {spread(zero['scores'])}{also}"
        rows.append((DATA_SETS[task].title, untouched, "0", "", ""))
        for method, title in METHODS.items():
            found = {regime: runs.get(f"{method}-{regime}") for regime in columns_of(result)}
            if any(found.values()):
                count = next(run for run in found.values() if run)["trainable_parameters"]
                cells = [spread(run["scores"]) if run else "" for run in found.values()]
                rows.append(("", title, f"{count:,}", *cells))
    show_table(
        f"Accuracy on {result['rows']} rows, {result['model']}",
        ("task", "method", "trained parameters", *columns_of(result).values()),
        rows,
        names=2,
    )


def draw(result: dict, path: Path) -> None:
    """The accuracy over the number of trained parameters, a panel for each task."""
    titles = [DATA_SETS[task].title for task in result["tasks"]]
    with accuracy_figure(path, titles, legend=3, sharey=True) as panels:
        for panel, runs in zip(panels, result["tasks"].values(), strict=True):
            draw_task(panel, runs, columns_of(result))


def draw_task(panel, runs: dict[str, dict], regimes: dict[str, str]) -> None:
    """Each method a point for few rows and one for many, the untouched model a line."""
    zero = mean(runs["zero"]["scores"])
    panel.axhline(zero, color="#777777", linestyle="--", linewidth=1, label="untouched model")
    # Side by side where a method stands, so that neither hides the other.
    styles = {"few": ("o", "#1f6f8b", 0.87), "many": ("s", "#c8553d", 1.15)}
    sizes = {}
    for regime, title in regimes.items():
        marker, color, aside = styles[regime]
        shown = {
            method: runs[f"{method}-{regime}"] for method in METHODS if f"{method}-{regime}" in runs
        }
        sizes |= {method: run["trainable_parameters"] for method, run in shown.items()}
        panel.errorbar(
            [run["trainable_parameters"] * aside for run in shown.values()],
            [mean(run["scores"]) for run in shown.values()],
            yerr=[deviation(run["scores"]) for run in shown.values()],
            fmt=marker,
            color=color,
            capsize=3,
            label=title,
        )
    panel.minorticks_off()
    counts = [f"{one / 1e6:.3g} M" if one >= 1e6 else f"{one:,}" for one in sizes.values()]
    names = [f"{SHORT[one]}\n{count}" for one, count in zip(sizes, counts, strict=True)]
    panel.set_xticks(list(sizes.values()), names, fontsize=8)


if __name__ == "__main__":
    run_script(main)
