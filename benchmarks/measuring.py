"""What the benchmarks share: runs in processes of their own, in turn or kept; data files, tables.

A benchmark imports it first: it makes `recipelib` importable.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from recipelib.runtime import UserError, cores, printable, write_json

ROOT = Path(__file__).resolve().parents[1]


class RunFailed(Exception):
    """A run ended badly, or did other work than the others; its text is one line."""


def run_script(main: Callable[[], Any]) -> None:
    """Run a benchmark's `main`: a mistake or a failed run ends in one line. Where the benchmark is
    ended, the process that it has started is ended, too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (UserError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


# The command line --------------------------------------------------------------------------------


def parser_of(description: str, quick: str) -> argparse.ArgumentParser:
    """A benchmark's parser, to which its own options are added.

    Args:
        description: the benchmark's docstring.
        quick: what --quick does.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--model_name_or_path", help="folder, .gguf file or hub id [the bundled]")
    return parser


def set_numbers(
    args: argparse.Namespace, full: Mapping[str, int | None], quick: Mapping[str, int | None]
) -> None:
    """Give the numbers that the command line leaves out their values, by whether it is --quick.

    Raises:
        UserError: one is below 1.
    """
    for name, number in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, number)
        require_least(args, name, 1)


def require_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Raises:
    UserError: a number is below what makes sense.
    """
    number = getattr(args, name)
    if number is not None and number < least:
        raise UserError(f"--{name} {number}: must be {least} or more")


def words(options: Mapping[str, Any]) -> list[str]:
    """A command line; what is None is left out."""
    line = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


# Trainings in turn, each in a process of its own -------------------------------------------------


def add_arm_options(
    parser: argparse.ArgumentParser, arms: Sequence[str], full: Mapping[str, int]
) -> None:
    """The options of a benchmark that measures arms: for how long, and for the arms themselves."""
    parser.add_argument("--steps", type=int, help=f"steps that count [{full['steps']}]")
    parser.add_argument("--rounds", type=int, help=f"runs of each [{full['rounds']}]")
    parser.add_argument("--measure", choices=arms, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that trains on a task's rows: the task, its rows, and how many."""
    parser.add_argument("--template", default="movie_reviews", help="the task [movie_reviews]")
    parser.add_argument("--dataset", help="its rows [the template's]")
    parser.add_argument("--columns", nargs="+", default=[], help="variable=column, as in a recipe")
    parser.add_argument("--rows", type=int, default=400, help="most rows that are used [400]")


def in_turn(
    arms: Sequence[str],
    rounds: int,
    run: Callable[[str, int], Any],
    said: Callable[[Any], str],
    check: Callable[[str, Any, Any], None],
) -> dict[str, list]:
    """Run each arm once in each round, so that what slows the machine down slows down all of them.

    Args:
        run: from an arm and a round's number what was measured.
        said: what was measured in a few words.
        check: raises `RunFailed` unless an arm's run did the same work as the very first run.
    """
    runs: dict[str, list] = {arm: [] for arm in arms}
    for number in range(1, rounds + 1):
        for arm in arms:
            measured = run(arm, number)
            print(f"round {number}, {arm}: {said(measured)}", flush=True)
            runs[arm].append(measured)
            check(arm, measured, runs[arms[0]][0])
    return runs


def run_arm(script: str, arm: str, args: argparse.Namespace, folder: Path, **changes: Any) -> dict:
    """What a benchmark writes to its --result when it is told to --measure an arm, in a process of
    its own, on the CPU.

    Args:
        changes: to the command line that `args` make.
    Raises:
        RunFailed: it ended with another code than 0.
    """
    given = {name: value for name, value in vars(args).items() if value} | changes
    flags = [f"--{name}" for name, value in given.items() if value is True]
    options = {name: value for name, value in given.items() if value is not True}
    options |= {"measure": arm, "result": folder / "result.json"}
    # An error's own line stands last on stderr, be it the benchmark's or Python's.
    done = subprocess.run(
        [sys.executable, script, *flags, *words(options)],
        env=os.environ | {"OMP_NUM_THREADS": threads(), "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise failure(arm, done.returncode, done.stderr)
    return json.loads(options["result"].read_text(encoding="utf-8"))


def failure(name: str, code: int, output: str, more: str = "") -> RunFailed:
    """A process's exit code and its last words."""
    lines = [line for line in output.splitlines() if line.strip()]
    return RunFailed(
        f"{name}: ended with exit code {code}: {lines[-1] if lines else 'no output'}{more}"
    )


def threads() -> str:
    """OMP_NUM_THREADS, for all arms: as it is set, else one for each core."""
    return os.environ.get("OMP_NUM_THREADS") or str(cores())


@dataclass
class Examples:
    """A task that is examples only, for trainers whose scores nobody asks for.

    Attributes:
        encoded, tokenizer, memory, facts: as a recipe's task has them; `facts` for a cloze.
    """

    encoded: Any
    tokenizer: Any
    memory: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    trained_as: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    model_name: str = "model"
    checkpoint: None = None

    def held_out(self) -> list[dict]:
        """None."""
        return []


def stopwatch(warm_up: int):
    """A trainer's callback whose `measured` gives the seconds after so many steps of warm-up, and
    what our trainer counted in them: tokens without padding, and with it.
    """
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        trainer = None  # ours, where its counts are wanted

        def __init__(self):
            self.marks = []

        def on_step_end(self, training, state, control, **kwargs):
            if state.global_step in (warm_up, state.max_steps):
                counts = [getattr(self.trainer, f"{name}_seen", 0) for name in ("tokens", "slots")]
                self.marks.append((time.perf_counter(), *counts))

        def measured(self) -> dict[str, float]:
            before, after = self.marks
            differences = (now - then for now, then in zip(after, before, strict=True))
            return dict(zip(("seconds", "tokens", "slots"), differences, strict=True))

    return Stopwatch()


# Runs of recipes, which are kept -----------------------------------------------------------------


class DataSet(NamedTuple):
    """A template with data of its own.

    Attributes:
        files: of the training split and of the one that is scored.
        columns: what a recipe is told of them.
    """

    title: str
    files: tuple[str, str] = ("train.jsonl", "validation.jsonl")
    columns: tuple[str, ...] = ()


BUNDLED = "movie_reviews"
DATA_SETS = {
    "sst2": DataSet("SST-2"),
    "trec": DataSet("TREC", ("train.jsonl", "test.jsonl"), ("text=question", "label=label")),
    "rte": DataSet("RTE"),
    BUNDLED: DataSet("bundled reviews"),
}


def add_run_options(parser: argparse.ArgumentParser, tasks: Sequence[str]) -> None:
    """The options of a benchmark that runs recipes on several tasks."""
    held = ", ".join(task for task in tasks if task != BUNDLED)
    parser.add_argument("--data", type=Path, help=f"folder with {held}")
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="[all that --data holds]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for what the runs leave")
    parser.add_argument("--figure", type=Path, help="PNG to draw [in --keep, else none]")


def check_run_options(args: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Fill in the tasks, and make the folders.

    Raises:
        UserError: tasks without their data, or a folder that cannot be made.
    """
    if args.tasks is None:
        args.tasks = [task for task in tasks if (task == BUNDLED) == (args.data is None)]
    if args.data is None and (others := [task for task in args.tasks if task != BUNDLED]):
        raise UserError(f"--tasks {others[0]}: needs --data, the folder that holds {others[0]}")
    for option, folder in (("--keep", args.keep), ("--figure", args.figure and args.figure.parent)):
        if folder:
            make_folder(option, folder)


def make_folder(option: str, folder: Path) -> None:
    """Raises:
    UserError: the folder that an option names cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}; pass another place") from None


def data_files(task: str, data: Path | None) -> list[Path]:
    """A task's files: to train on, and to score.

    Raises:
        UserError: one is missing.
    """
    folder = ROOT / "data_templates" / "examples" / BUNDLED if task == BUNDLED else data / task
    files = [folder / name for name in DATA_SETS[task].files]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{missing[0]}: no such file; python benchmarks/prepare_data.py {task} "
            f"--output {folder}"
        )
    return files


def sha256_of(*files: Path) -> dict[str, str]:
    """The sha256 of each file by its name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def keep_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Write down with what settings runs are made, before they are.

    Raises:
        UserError: they were made with other settings.
    """
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if changed := [name for name, value in settings.items() if kept.get(name) != value]:
            raise UserError(
                f"{file}: was run with other settings ({changed[0]}); pass another --keep"
            )
    write_json(file, settings)


def run_recipe(recipe: str, options: Mapping[str, Any], folder: Path) -> dict:
    """The metrics of a run in `folder`, made in a process of its own unless they are there.

    Raises:
        RunFailed: the recipe failed.
    """
    metrics = folder / "metrics.json"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        script, log = ROOT / "recipes" / f"{recipe}.py", folder / "log.txt"
        line = words({**options, "output_dir": folder, "use_cpu": True})
        with log.open("ab") as file:
            done = subprocess.run(
                [sys.executable, str(script), *line],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        if done.returncode:
            output = log.read_text(errors="replace")
            raise failure(folder.name, done.returncode, output, " (--keep DIR keeps the log)")
    return json.loads(metrics.read_text(encoding="utf-8"))


def launch_recipe(
    recipe: str, options: Mapping[str, Any], config: str | None = None, processes: int = 1
) -> dict:
    """The metrics of a run in fresh processes on CPUs, which share the cores.

    Args:
        config: the name of the accelerate config of several processes.
    Raises:
        RunFailed: it ended with another code than 0.
    """
    command = [sys.executable]
    if config:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        file = ROOT / "accelerate_configs" / f"{config}.yaml"
        launch = {"config_file": file, "num_processes": processes, "main_process_port": port}
        command += ["-m", "accelerate.commands.launch", *words(launch)]
    with tempfile.TemporaryDirectory(prefix="recipe-") as folder:
        line = words({**options, "output_dir": folder, "disable_tqdm": True})
        done = subprocess.run(
            [*command, str(ROOT / "recipes" / f"{recipe}.py"), *line],
            env=os.environ
            | {
                "OMP_NUM_THREADS": str(max(1, cores() // processes)),
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise failure(recipe, done.returncode, done.stderr)
        return json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))


# What they came to -------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The mean of several runs ± their standard deviation; a single one as it is."""
    shown = f"{mean(values):.3f}"
    return f"{shown} ± {deviation(values):.3f}" if len(values) > 1 else shown


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of several runs; 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def show_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str] | None],
    *,
    caption: str | None = None,
    names: int = 1,
    width: int = 100,
) -> None:
    """Print a table; plain text outside a terminal.

    Args:
        rows: cells; None draws a line.
        names: how many of the first columns hold text; the others hold numbers.
    """
    from rich.console import Console
    from rich.table import Table

    options = {} if sys.stdout.isatty() else {"width": width, "force_terminal": False}
    table = Table(
        title=printable(title), title_justify="left", caption=caption, caption_justify="left"
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < names else "right")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(printable, row))
    Console(**options).print(table)


@contextmanager
def accuracy_figure(path: Path, titles: Sequence[str], legend: int, **options: Any) -> Iterator:
    """A figure of accuracies over trained parameters with a panel for each title, which are given
    to be drawn on; it is written at the end.

    Args:
        legend: columns of the legend.
        options: of `plt.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.8 * len(titles), 3.8)
    figure, panels = plt.subplots(1, len(titles), figsize=size, squeeze=False, **options)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.set_title(title, loc="left")
        panel.set_xlabel("trained parameters")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e5e5e5")
    panels[0][0].set_ylabel("accuracy")
    yield panels[0]
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=legend, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=150)
    plt.close(figure)
