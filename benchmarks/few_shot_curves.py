"""How much demonstrations help, and what contextual calibration mends: accuracy over shots.

    python benchmarks/few_shot_curves.py --data data --keep runs/few_shot_curves     # half an hour
    python benchmarks/few_shot_curves.py --data data --quick
    python benchmarks/few_shot_curves.py                    # the bundled reviews only

Runs `recipes/icl_eval.py` once for each task and number of shots, in float32 on a CPU: the same
rows every time, 5 draws of demonstrations, equally many of each class. `uncalibrated` takes the
likeliest label word, `calibrated` divides by what the model says to an input without content (Zhao
et al. 2021); both come from the same forward passes. The table shows the mean ± the standard
deviation over draws, and beside it the standard error over rows (of the uncalibrated accuracy); the
figure the same, each draw a dot.

DATA holds `sst2`, `trec` and `rte` as `prepare_data.py` writes them. With --keep an interrupted run
can be started again and goes on: a run that is there is not repeated, the one that was cut off
takes up what it had scored. The last line is one JSON object with all figures.
"""

import argparse
import json
import tempfile
from pathlib import Path

from measuring import (
    DATA_SETS,
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
from recipelib.runtime import UserError, printable, versions

SHOTS = [0, 1, 4, 16]
FULL, QUICK = {"draws": 5, "rows": 200}, {"draws": 2, "rows": 40}
WAYS = {"uncalibrated": "sum", "calibrated": "calibrated"}  # as metrics.json calls them


def main(argv: list[str] | None = None) -> dict:
    """Make the runs, print the table, draw the figure, and return what the last line holds.

    Raises:
        UserError: arguments, data files or a kept folder that will not do.
        RunFailed: the recipe failed.
    """
    args = parse(argv)
    hashes = {task: sha256_of(*data_files(task, args.data)) for task in args.tasks}
    with tempfile.TemporaryDirectory(prefix="few_shot_curves-") as temporary:
        keep = args.keep or Path(temporary)
        tasks = {}
        for name in args.tasks:
            runs = {}
            for shots in args.shots:
                settings = {
                    "shots": shots,
                    "draws": args.draws,
                    "rows": args.rows,
                    "model": args.model_name_or_path,
                    "sha256": hashes[name],
                }
                runs[str(shots)] = run = make_run(name, settings, args.data, keep)
                shown = [f"{way} {spread(run[way])}" for way in WAYS]
                print(
                    printable(
                        f"{DATA_SETS[name].title}, {shots} shots: {', '.join(shown)}; "
                        f"{run['seconds']:.0f} s"
                    ),
                    flush=True,
                )
            tasks[name] = runs
    result = {
        "tasks": tasks,
        "rows": args.rows,
        "draws": args.draws,
        "model": describe_model(args.model_name_or_path),
        "sha256": hashes,
        "versions": versions(),
    }
    if figure := args.figure or (args.keep and args.keep / "few_shot_curves.png"):
        draw(result, figure)
        print(printable(f"the figure: {figure}"))
    print_table(result)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `tasks`, `draws` and `rows` are always set."""
    parser = parser_of(__doc__, f"{QUICK['rows']} rows, {QUICK['draws']} draws")
    add_run_options(parser, [*DATA_SETS])
    parser.add_argument("--shots", nargs="+", type=int, default=SHOTS, help="[0 1 4 16]")
    parser.add_argument("--draws", type=int, help=f"of demonstrations [{FULL['draws']}]")
    parser.add_argument("--rows", type=int, help=f"of each task that are scored [{FULL['rows']}]")
    args = parser.parse_args(argv)
    check_run_options(args, [*DATA_SETS])
    set_numbers(args, FULL, QUICK)
    args.shots = sorted(set(args.shots))
    if args.shots[0] < 0:
        raise UserError(f"--shots {args.shots[0]}: must be 0 or more")
    return args


# One run -----------------------------------------------------------------------------------------


def make_run(name: str, settings: dict, data: Path | None, keep: Path) -> dict:
    """The figures of a task with so many shots: those of a run that is there, else of a new one.

    Raises:
        UserError: what is there was run with other settings.
        RunFailed: the recipe failed.
    """
    folder = keep / f"{name}-{settings['shots']}"
    keep_settings(folder / "settings.json", settings)
    options = {
        "template": name,
        "dataset": data_files(name, data)[0].parent,
        "columns": DATA_SETS[name].columns or None,
        "shots": settings["shots"],
        "draws": settings["draws"] if settings["shots"] else None,
        "max_eval_samples": settings["rows"],
        "model_name_or_path": settings["model"],
        "resume": True,
    }
    metrics = run_recipe("icl_eval", options, folder)
    counts = [one["rows"] for one in metrics["classes"].values()]
    return {
        **{way: metrics["scores"][kind]["draws"] for way, kind in WAYS.items()},
        "stderr": metrics["stderr"],
        "most_frequent_class": max(counts) / sum(counts),
        "rows": metrics["eval_rows"],
        "rows_left_out": metrics["eval_rows_left_out"],
        "demonstrations_dropped": metrics["demonstrations_dropped"],
        "seconds": metrics["eval_seconds"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
    }


# What they came to -------------------------------------------------------------------------------


def print_table(result: dict) -> None:
    """A row for each task and number of shots."""
    rows = []
    for name, runs in result["tasks"].items():
        for number, (shots, run) in enumerate(runs.items()):
            rows.append(
                (
                    "" if number else f"{DATA_SETS[name].title}, {run['rows']} rows",
                    shots,
                    *(spread(run[way]) for way in WAYS),
                    f"± {run['stderr']:.3f}",
                    f"{run['most_frequent_class']:.3f}",
                )
            )
        rows.append(None)
    show_table(
        f"{result['model']}: accuracy, mean ± standard deviation over draws",
        ("task", "shots", *WAYS, "over rows", "most frequent class"),
        rows,
    )


def draw(result: dict, path: Path) -> None:
    """The figure: accuracy over shots, a panel for each task."""
    from recipelib.reporting.figures import plot_shots

    panels = {
        DATA_SETS[name].title: {
            way: {int(shots): run[way] for shots, run in runs.items()} for way in WAYS
        }
        for name, runs in result["tasks"].items()
    }
    chance = {
        DATA_SETS[name].title: next(iter(runs.values()))["most_frequent_class"]
        for name, runs in result["tasks"].items()
    }
    rows = max(run["rows"] for runs in result["tasks"].values() for run in runs.values())
    plot_shots(
        panels,
        path,
        title="Accuracy by number of demonstrations",
        subtitle=f"{result['model']}, {rows} rows; dots: single draws; bands: one standard "
        f"deviation over {result['draws']} draws",
        chance=chance,
    )


if __name__ == "__main__":
    run_script(main)
