"""Launches recipes from a process that has imported the libraries: importing them takes longer than
what a launch runs. `accelerate launch` reads its config and sets the environment; where it would
start torchrun, or a single process, the processes are forked.

Each line of stdin is a list with an item for each machine of a launch, [accelerate launch's words,
a file for stdout, a file for stderr]; the answer is a line with an exit code. Words that begin with
`python` are those of `from_python.start`, whose processes are forked, too.
"""

import gc
import json
import multiprocessing.util
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import accelerate.commands.launch
import from_python
import launched  # noqa: F401 (what the processes import)
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser

from recipelib import adapters, models, pipeline, reporting, task, training  # noqa: F401

SPAWN = multiprocessing.util.spawnv_passfds


def fork(run: Callable[[], None]) -> int:
    """Run a function in a process of its own, and return its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def code_of(status: int) -> int:
    """A process's exit code, from what `os.wait` says of it."""
    return os.waitstatus_to_exitcode(status)


def launch(words: list[str], out: str, errors: str) -> None:
    """`accelerate launch` with these words."""
    for stream, file in ((sys.stdout, out), (sys.stderr, errors)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    if words[0] == "python":
        multiprocessing.util.spawnv_passfds = spawn
        how, processes, port, file = words[1:]
        from_python.start(how, int(processes), int(port), file)
        return
    torch.distributed.run.run = start_processes
    accelerate.commands.launch.subprocess = SimpleNamespace(Popen=Single)
    launch_command(launch_command_parser().parse_args(words))


def run_script(words: list[str]) -> None:
    """Run a script as its command line would."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def spawn(path: bytes, command: list[str], files: list[int]) -> int:
    """What multiprocessing does to spawn a process, which then reads what it is to run."""
    if "--multiprocessing-fork" not in command:  # its own helper
        return SPAWN(path, command, files)

    def run() -> None:
        sys.argv = command[-2:]
        exec(sys.argv[0])

    return fork(run)


class Single:
    """The process of a launch without torchrun, with the attributes that accelerate reads."""

    def __init__(self, command: list[str], env: dict[str, str]):
        def run() -> None:
            os.environ.clear()
            os.environ.update(env)
            run_script(command[1:])

        self.process, self.returncode = fork(run), None

    def wait(self) -> None:
        self.returncode = code_of(os.waitpid(self.process, 0)[1])


def start_processes(arguments) -> None:
    """What torchrun does on a machine: start the processes, and end all if one fails."""
    count, machine = int(arguments.nproc_per_node), int(arguments.node_rank)
    port = arguments.rdzv_endpoint.rpartition(":")[2] or str(arguments.master_port)
    world = count * int(arguments.nnodes.rpartition(":")[2])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": str(machine)}

    def run(rank: int) -> None:
        os.environ.update(shared, RANK=str(machine * count + rank), LOCAL_RANK=str(rank))
        run_script([arguments.training_script, *arguments.training_script_args])

    started = {fork(lambda rank=rank: run(rank)) for rank in range(count)}
    while started:
        process, status = os.wait()
        started.discard(process)
        if code := code_of(status):
            for other in started:
                os.kill(other, signal.SIGKILL)
            sys.exit(code)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # what the processes share is not gone through in each
    for line in sys.stdin:
        machines = [fork(lambda one=one: launch(*one)) for one in json.loads(line)]
        codes = [code_of(os.waitpid(machine, 0)[1]) for machine in machines]
        print(next(filter(None, codes), 0), flush=True)
