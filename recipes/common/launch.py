"""What a recipe asks of the processes it runs in."""

import os
from collections.abc import Callable, Iterable

from tqdm.auto import tqdm


def is_main_process() -> bool:
    """Whether this process prints and writes: rank 0 of a launcher, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print a line once, not once per process."""
    if is_main_process():
        print(text, flush=True)


def progress(description: str, unit: str = "row") -> Callable[[Iterable], Iterable]:
    """A progress bar to wrap around an iterable; shown by the main process only."""

    def bar(items: Iterable) -> Iterable:
        return tqdm(
            items, desc=description, unit=unit, disable=not is_main_process(), dynamic_ncols=True
        )

    return bar


def use_all_cores() -> None:
    """Give this process its share of the machine's cores where the launcher left it with one.

    `accelerate launch` sets OMP_NUM_THREADS=1 for processes on a CPU unless told otherwise, which
    halves the speed on two cores. Another number is somebody's choice and stays.
    """
    import torch

    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
