"""Starting recipes with `accelerate launch`, and reading what they leave."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from launched import MARK
from run_files import read_jsonl

from recipelib.prompts.values import as_list

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "accelerate_configs"
# Of a run that leaves checkpoints 4, 6 and 8.
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
# Of a run that trains nothing, and is told nothing about training.
UNTRAINED = dict.fromkeys(
    (
        *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("train_sampling_strategy", "lr_scheduler_type", "warmup_steps", "learning_rate"),
        "save_strategy",
    )
)
UNSAVED = {**dict.fromkeys(SAVING), "save_strategy": "no"}
SHARDED = re.compile(r"sharded by FSDP2: ([\d,]+) of ([\d,]+) parameters \((.*)%\) in each of (\d)")
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


def command(recipe: ModuleType, options: Mapping[str, Any]) -> list[str]:
    """A recipe's command line."""
    words = [word for name, value in options.items() for word in (f"--{name}", *as_list(value))]
    return [recipe.__file__, *map(str, words)]


def assert_sharded_over_two(said: str) -> None:
    """A run printed that each of two processes holds half of what it computed with."""
    lines = SHARDED.findall(said)  # some shard the untouched model, then their own
    assert lines
    for line in lines:
        held, total = (int(count.replace(",", "")) for count in line[:2])
        assert held / total <= 0.55
        assert abs(float(line[2]) - 100 * held / total) <= 0.1
        assert line[3] == "2"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def words_of(config: Path, file: Path, runs: dict[str, list[str]], *options: str) -> list[str]:
    """What follows `accelerate launch`, to run scripts with arguments, one after another.

    Args:
        config: the accelerate config.
        file: where to write what is to be run.
        options: of `accelerate launch`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs))
    if "--main_process_port" not in options:
        options = (*options, "--main_process_port", str(free_port()))
    script = Path(__file__).with_name("launched.py")
    return ["--config_file", str(config), *options, str(script), str(file)]


def environment() -> dict[str, str]:
    """What launches see."""
    paths = [str(ROOT / place) for place in ("recipes", "tests", "tests/fsdp")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",  # a rehearsal, also where there are GPUs
        "OMP_NUM_THREADS": "1",  # the threads of two processes would wait for the same cores
    }


def start(config: Path, file: Path, runs: dict[str, list[str]], *options: str) -> subprocess.Popen:
    """Launch scripts, see `words_of`."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *words_of(config, file, runs, *options),
        ],
        cwd=ROOT,
        env=environment(),
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
        raise AssertionError(_hung(out, errors)) from None
    return _launched(process.returncode, out, errors)


def _hung(out: str, errors: str) -> str:
    return f"a launch hung:\n{out[-3000:]}\n{errors[-3000:]}"


def _launched(code: int, out: str, errors: str) -> Launched:
    parts = out.split(MARK)[1:]
    said = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}
    return Launched(code, said, errors)


class ForkServer:
    """Launches from a process that has imported the libraries (`fork_server.py`)."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *machines: list[str]) -> Launched:
        """Launch, on each machine by its words, see `words_of`, and wait; gives what the first one
        said, and all errors.
        """
        files = [
            [f"{words[-1]}.{number}.{name}" for name in ("out", "errors")]
            for number, words in enumerate(machines)
        ]
        told = [[words, *of] for words, of in zip(machines, files, strict=True)]
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        ended, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        if not ended:
            self.close()
        out = Path(files[0][0]).read_text()
        errors = "".join(Path(file).read_text() for _, file in files)
        assert ended, _hung(out, errors)
        return _launched(int(self._process.stdout.readline()), out, errors)

    def runs(
        self, folder: Path, config: Path, processes: int, runs: dict[str, list[str]]
    ) -> Launched:
        """Launch runs under a config, one after another in the same processes, and wait.

        Args:
            folder: where to write what is run and said.
            runs: see `words_of`.
        """
        file = folder / f"{next(iter(runs))}_and_{len(runs) - 1}_more.json"
        return self.launch(words_of(config, file, runs, "--num_processes", str(processes)))

    def from_python(self, how: str, file: Path, runs: dict[str, list]) -> Launched:
        """Make runs in two processes that a program starts, see `from_python.py`, and wait.

        Args:
            how: `spawn`, or `notebook`.
            file: where to write what is run.
        """
        file.write_text(json.dumps(runs))
        return self.launch(["python", how, "2", str(free_port()), str(file)])

    def close(self) -> None:
        """End the server and whatever it has started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def records(folder: Path) -> list[dict]:
    """The lines of a run's predictions.jsonl."""
    return read_jsonl(folder / "predictions.jsonl")
