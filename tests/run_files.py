"""Reading what a run leaves."""

import json
from pathlib import Path


def read_json(path: Path):
    """A JSON file's content."""
    return json.loads(path.read_text())


def read_jsonl(path: Path) -> list:
    """A JSON lines file's values."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The loss of each step that a run trained, the one that it resumed included."""
    history = read_json(folder / "trainer_state.json")["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
