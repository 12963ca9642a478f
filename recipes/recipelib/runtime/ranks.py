"""Which of a launch's processes this one is, as its launcher says: torch's, else MPI's or Slurm's.

accelerate and torchrun set RANK; `mpirun` and `srun` have variables of their own. Those of a Slurm
job that started no step of several tasks (a login, a batch script) say nothing.
"""

import os

# The variable with the number of processes, that with this one's number, and with its number on
# this machine.
_LAUNCHERS = [
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
]


def _launcher() -> tuple[str, str, str]:
    return next((names for names in _LAUNCHERS if os.environ.get(names[0])), _LAUNCHERS[0])


def processes_started() -> int:
    """How many processes the launcher says it started, on all machines together."""
    return int(os.environ.get(_launcher()[0]) or 1)


def rank() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK") or os.environ.get(_launcher()[1]) or 0)


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get(_launcher()[2]) or 0)


def is_main_process() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0
