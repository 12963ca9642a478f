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
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from recipelib.models.loading import describe_model
from recipelib.runtime.console import printable
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import write_json
from recipelib.runtime.installed import versions

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "icl_eval.py"
SHOTS, DRAWS, ROWS = [0, 1, 4, 16], 5, 200
QUICK_DRAWS, QUICK_ROWS = 2, 40
WAYS = {"uncalibrated": "sum", "calibrated": "calibrated"}  # as metrics.json calls them


class Task(NamedTuple):
    """A template with data of its own.

    Attributes:
        files: of the training split and of the one that is scored.
        options: what the recipe is told of them.
    """

    title: str
    files: tuple[str, str]
    options: tuple[str, ...] = ()


TASKS = {
    "sst2": Task("SST-2", ("train.jsonl", "validation.jsonl")),
    "trec": Task(
        "TREC", ("train.jsonl", "test.jsonl"), ("--columns", "text=question", "label=label")
    ),
    "rte": Task("RTE", ("train.jsonl", "validation.jsonl")),
    "movie_reviews": Task("bundled reviews", ("train.jsonl", "validation.jsonl")),
}
BUNDLED = "movie_reviews"


class RunFailed(Exception):
    """A run of the recipe ended badly; its text is one line."""


def main(argv: list[str] | None = None) -> dict:
    """Make the runs, print the table, draw the figure, and return what the last line holds.

    Raises:
        UserError: arguments, data files or a kept folder that will not do.
        RunFailed: the recipe failed.
    """
    args = parse(argv)
    hashes = {name: sha256_of(name, args.data) for name in args.tasks}
    for option, folder in (("--keep", args.keep), ("--figure", args.figure and args.figure.parent)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {folder}: {error.strerror}; pass another place") from None
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
                        f"{TASKS[name].title}, {shots} shots: {', '.join(shown)}; "
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sst2, trec and rte")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="[all that --data holds]")
    parser.add_argument("--shots", nargs="+", type=int, default=SHOTS, help="[0 1 4 16]")
    parser.add_argument("--draws", type=int, help=f"of demonstrations [{DRAWS}]")
    parser.add_argument("--rows", type=int, help=f"of each task that are scored [{ROWS}]")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROWS} rows, {QUICK_DRAWS} draws"
    )
    parser.add_argument("--model_name_or_path", help="folder, .gguf file or hub id [the bundled]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for what the runs leave")
    parser.add_argument("--figure", type=Path, help="PNG to draw [in --keep, else none]")
    args = parser.parse_args(argv)
    if args.tasks is None:
        args.tasks = [name for name in TASKS if (name == BUNDLED) == (args.data is None)]
    if args.data is None and (others := [name for name in args.tasks if name != BUNDLED]):
        raise UserError(f"--tasks {others[0]}: needs --data, the folder that holds {others[0]}")
    args.draws = (QUICK_DRAWS if args.quick else DRAWS) if args.draws is None else args.draws
    args.rows = (QUICK_ROWS if args.quick else ROWS) if args.rows is None else args.rows
    args.shots = sorted(set(args.shots))
    for name, value, least in (
        ("shots", args.shots[0], 0),
        ("draws", args.draws, 1),
        ("rows", args.rows, 1),
    ):
        if value < least:
            raise UserError(f"--{name} {value}: must be {least} or more")
    return args


def data_folder(name: str, data: Path | None) -> Path:
    """Where a task's files are."""
    if name == BUNDLED:
        return ROOT / "data_templates" / "examples" / BUNDLED
    return data / name


def sha256_of(name: str, data: Path | None) -> dict[str, str]:
    """The sha256 of each of a task's files."""
    found = {}
    for file in TASKS[name].files:
        path = data_folder(name, data) / file
        try:
            found[file] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; python benchmarks/prepare_data.py {name} --output "
                f"{path.parent}"
            ) from None
    return found


# One run -----------------------------------------------------------------------------------------


def make_run(name: str, settings: dict, data: Path | None, keep: Path) -> dict:
    """The figures of a task with so many shots: those of a run that is there, else of a new one.

    Raises:
        UserError: what is there was run with other settings.
        RunFailed: the recipe failed.
    """
    folder = keep / f"{name}-{settings['shots']}"
    metrics_file, settings_file = folder / "metrics.json", folder / "settings.json"
    if settings_file.exists():
        known = json.loads(settings_file.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if known.get(key) != value:
                raise UserError(
                    f"--keep {keep}: {folder.name} was run with other settings ({key}, see its "
                    "settings.json); pass another folder"
                )
    else:
        write_json(settings_file, settings)
    if not metrics_file.exists():
        run_recipe(name, settings, data, folder)
    metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
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


def run_recipe(name: str, settings: dict, data: Path | None, folder: Path) -> None:
    """Run the recipe in a process of its own, on the CPU, with its output in `folder/log.txt`."""
    options = {
        "template": name,
        "dataset": data_folder(name, data),
        "shots": settings["shots"],
        "draws": settings["draws"],
        "max_eval_samples": settings["rows"],
        "output_dir": folder,
        "resume": True,
        "use_cpu": True,
    }
    if settings["model"]:
        options["model_name_or_path"] = settings["model"]
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    log = folder / "log.txt"
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, str(RECIPE), *words, *TASKS[name].options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    if done.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RunFailed(
            f"{TASKS[name].title}, {settings['shots']} shots: ended with exit code "
            f"{done.returncode}: {said[-1] if said else 'no output'} (--keep DIR keeps the log)"
        )


# What they came to -------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """The mean of several draws ± their standard deviation; a single one as it is."""
    shown = f"{mean(values):.3f}"
    return f"{shown} ± {stdev(values):.3f}" if len(values) > 1 else shown


def print_table(result: dict) -> None:
    """A row for each task and number of shots; plain text outside a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(**({} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}))
    table = Table(
        title=printable(f"{result['model']}: accuracy, mean ± standard deviation over draws"),
        title_justify="left",
    )
    for heading in ("task", "shots", *WAYS, "over rows", "most frequent class"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, runs in result["tasks"].items():
        for number, (shots, run) in enumerate(runs.items()):
            table.add_row(
                "" if number else f"{TASKS[name].title}, {run['rows']} rows",
                shots,
                *(printable(spread(run[way])) for way in WAYS),
                printable(f"± {run['stderr']:.3f}"),
                f"{run['most_frequent_class']:.3f}",
                end_section=number == len(runs) - 1,
            )
    console.print(table)


def draw(result: dict, path: Path) -> None:
    """The figure: accuracy over shots, a panel for each task."""
    from recipelib.reporting.figures import plot_shots

    panels = {
        TASKS[name].title: {
            way: {int(shots): run[way] for shots, run in runs.items()} for way in WAYS
        }
        for name, runs in result["tasks"].items()
    }
    chance = {
        TASKS[name].title: next(iter(runs.values()))["most_frequent_class"]
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the recipe that runs is ended, too
    try:
        main()
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
