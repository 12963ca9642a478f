"""Run by `accelerate launch` in the tests: runs scripts one after another in the processes that
were started, since importing the libraries takes longer than all the runs together.

The only argument is a JSON file: {name: [script, argument, ...], ...}. All runs but the first are
`without_slow_parts`. Each run sees what
`accelerate launch SCRIPT ARGUMENTS` would give it; its output follows a line with its name, and a
script that exits with a code does not keep the next from running.
"""

import gc
import json
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from recipe_runs import without_slow_parts

from recipelib import cli
from recipelib.runtime.console import say
from recipelib.runtime.launch import end_process_group

MARK = "=====run:"

if __name__ == "__main__":
    torch.set_num_threads(1)
    # `use_all_cores` would take more, for which the models are too small and other launches run.
    torch.set_num_threads = lambda count: None
    cli.end_process_group = lambda: None  # the runs share one
    runs = json.loads(Path(sys.argv[1]).read_text())
    for number, (name, (script, *options)) in enumerate(runs.items()):
        say(f"{MARK}{name}")
        sys.argv = [script, *options]
        try:
            with without_slow_parts() if number else nullcontext():
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            say(f"exit code {end.code}")
        # What a process of its own would not have: accelerate's memory of the run before.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # Else the libraries' objects are gone through after each training, half a second each.
        gc.collect()
        gc.freeze()
    end_process_group()
