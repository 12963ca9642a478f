"""How a process ends before its work is done: told to by SIGTERM, left by its launcher or by the
other processes.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path

from recipelib.runtime.owning import say_that_the_run_ends
from recipelib.runtime.ranks import is_main_process, rank

EXIT_CODE = 128 + signal.SIGTERM
# Which say that a launcher started this process, and will end it.
_LAUNCHED_BY_TORCH = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
_SAME_NOTICE = 5  # seconds: a scheduler tells the processes and their launcher, which tells them
_GRACE = 60  # seconds to finish a step and save, once the launcher is gone


class Terminated(SystemExit):
    """SIGTERM has ended the run; `line` says what is left of it."""

    def __init__(self, line: str):
        super().__init__(EXIT_CODE)
        self.line = line


class _Notice:
    """What SIGTERM finds and does in this process."""

    came: float | None = None  # when the first came
    steps = False  # whether training is between two checkpoints, and finishes its step first


def _handle(number: int, frame: object) -> None:
    if _Notice.came is None:
        _Notice.came = time.monotonic()
        say_that_the_run_ends()
        if not _Notice.steps:
            raise Terminated("terminated; nothing was being trained, so nothing had to be saved")
        _say("terminated: this step is finished and saved first")
    # A second one ends at once, unless it is the same one, told twice.
    elif not _is_launched() or time.monotonic() - _Notice.came > _SAME_NOTICE:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    """Print a line from where `print` could interrupt itself."""
    if is_main_process():
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def terminating() -> bool:
    """Whether SIGTERM has come, and training is to end after this step."""
    return _Notice.came is not None


@contextmanager
def heeding_sigterm(steps: bool = False) -> Iterator[None]:
    """A context in which SIGTERM ends the run in order.

    Args:
        steps: whether a step is finished and saved first, by whoever asks `terminating`; else
            `Terminated` is raised. Behind it further ones are ignored, for the process ends.
    """
    outer, ours = _Notice.steps, False
    _Notice.steps = steps
    # Somebody else's handler stays, and threads can have none.
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        owner = os.getpid()

        def handle(number: int, frame: object) -> None:
            if os.getpid() == owner:
                _handle(number, frame)
                return
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # in a worker that was forked
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, handle)
        ours = True
    try:
        yield
        if steps and terminating():  # it came behind the last step
            raise Terminated("terminated; what was saved is whole")
    except Terminated:
        if ours:  # the launcher may pass on what has been done
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        _Notice.steps = outer
        if ours:
            _Notice.came = None
            if signal.getsignal(signal.SIGTERM) is handle:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_launched() -> bool:
    """Whether a launcher looks after this process, other than a shell."""
    names = ("LOCAL_RANK", *_LAUNCHED_BY_TORCH)
    return parent_process() is not None or any(name in os.environ for name in names)


_watching: int | None = None  # the process that watches: a forked one has no thread of its parent


def end_with_launcher() -> None:
    """Let this process end when its launcher does, which a kill or a lack of memory may end: left
    alone it would go on training into a folder from which a new run has resumed.
    """
    global _watching
    if _watching == os.getpid() or not _is_launched():
        return
    _watching, parent = os.getpid(), os.getppid()
    if _is_left(parent):
        _end_left()
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="launcher").start()


def _is_left(parent: int) -> bool:
    """Whether the launcher died before it was known: then the system's first process has taken
    over. In a container that can be the launcher itself.
    """
    if parent != 1 or not any(name in os.environ for name in _LAUNCHED_BY_TORCH):
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    alone = "TORCHELASTIC_RUN_ID" not in os.environ and "LOCAL_RANK" not in os.environ
    if alone and not terminating():
        # `accelerate launch` of one process does not pass on the SIGTERM that ends it.
        os.kill(os.getpid(), signal.SIGTERM)
    if terminating() or alone:
        time.sleep(_GRACE)
    _end_left()


def _end_left() -> None:
    _say("error: the launcher of this process is gone; it ends too")
    _end_now(EXIT_CODE)


@contextmanager
def ending_with_others() -> Iterator[None]:
    """A context in which this process ends with a line that names the first of the other processes
    of this machine that has died. Left alone it would wait for what that one computes: under NCCL
    for half an hour, while gloo and a launcher sooner give up and name nobody. All processes have
    to enter it.
    """
    import torch.distributed as dist

    others: list = []
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        others = [None] * dist.get_world_size()
        dist.all_gather_object(others, (rank(), socket.gethostname(), os.getpid()))
    # Those of other containers are not seen, though their host may have the same name.
    own = {
        number: process
        for number, host, process in others
        if host == socket.gethostname() and _lives(process)
    }
    over = threading.Event()

    def died() -> list[int]:
        return [number for number, process in own.items() if not _lives(process)]

    def watch() -> None:
        while not over.wait(1):
            if dead := died():
                _say_who_died(own, dead)
                _end_now(1)

    if len(own) > 1:
        threading.Thread(target=watch, daemon=True, name="others").start()
    try:
        yield
    except RuntimeError:  # a connection that the other has closed; its end is seen soon
        deadline = time.monotonic() + 2
        while len(own) > 1 and time.monotonic() < deadline:
            if dead := died():
                over.set()
                _say_who_died(own, dead)
                raise SystemExit(1) from None
            time.sleep(0.1)
        raise
    finally:
        over.set()


def _lives(process: int) -> bool:
    """Whether a process of this machine has not ended; one that nobody has asked about counts as
    ended.
    """
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc/self/stat").exists():
        return False
    try:  # not Linux
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _say_who_died(own: Mapping[int, int], dead: Sequence[int]) -> None:
    if rank() == min(own.keys() - {*dead}, default=None):  # once
        line = f"error: process {dead[0]} (pid {own[dead[0]]}) has died; the others end too, and "
        line += "--resume_from_checkpoint last goes on from what was saved"
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())


def _end_now(code: int) -> None:
    os._exit(code)
