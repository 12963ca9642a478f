"""Starting recipes with `accelerate launch`, and reading what they leave."""

import json
import os
import re
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

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
# Of a run that leaves checkpoints 10, 15 and 20.
SAVING = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
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


def start(config: Path, file: Path, runs: dict[str, list[str]], *options: str) -> subprocess.Popen:
    """Launch scripts with arguments, one after another.

    Args:
        config: the accelerate config.
        file: where to write what is to be run.
        options: of `accelerate launch`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if "--main_process_port" not in options:
        command += ["--main_process_port", str(free_port())]
    paths = [str(ROOT / "recipes"), str(Path(__file__).parent), str(ROOT / "tests")]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",  # a rehearsal, also where there are GPUs
        "OMP_NUM_THREADS": "1",  # the threads of two processes would wait for the same cores
    }
    return subprocess.Popen(
        [*command, *options, str(Path(__file__).with_name("launched.py")), str(file)],
        cwd=ROOT,
        env={**os.environ, **environment},
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
        raise AssertionError(f"a launch hung:\n{out[-3000:]}\n{errors[-3000:]}") from None
    parts = out.split(MARK)[1:]
    said = {part.split("\n", 1)[0]: part.split("\n", 1)[1] for part in parts}
    return Launched(process.returncode, said, errors)


def records(folder: Path) -> list[dict]:
    """The lines of a run's predictions.jsonl."""
    return read_jsonl(folder / "predictions.jsonl")
