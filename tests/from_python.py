"""Runs that a program starts in several processes itself: with `accelerate.notebook_launcher`, or
with `torch.multiprocessing.spawn` as torch's tutorial does, where the process group alone knows of
the others. All runs follow one another in the same processes, as in a notebook.

What is run is a JSON file: {name: [recipe, {option: value}, {variable: value}], ...}.
"""

import importlib
import json
import os
from pathlib import Path

import accelerate.launchers
import torch
from accelerate import notebook_launcher
from recipe_runs import without_slow_parts

from recipelib.cli import arguments


def train(file: str) -> None:
    """Make all runs, in one of the processes."""
    torch.set_num_threads(1)
    for recipe, options, variables in json.loads(Path(file).read_text()).values():
        os.environ.update(variables)
        module = importlib.import_module(recipe)
        with without_slow_parts():
            module.main(*arguments(module, **options))


def train_as_spawned(rank: int, processes: int, port: int, file: str) -> None:
    """The same in a process that has no launcher's variables."""
    meet = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=processes)
    train(file)
    torch.distributed.destroy_process_group()


def start(how: str, processes: int, port: int, file: str) -> None:
    """Start the processes."""
    if how == "spawn":
        torch.multiprocessing.spawn(train_as_spawned, (processes, port, file), nprocs=processes)
        return
    # It refuses a bitsandbytes that is imported, which it is here to save time.
    accelerate.launchers.are_libraries_initialized = lambda *names: []
    notebook_launcher(train, (file,), num_processes=processes, use_port=str(port))
