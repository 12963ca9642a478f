"""The processes of a launch: their cores, the accelerate config, joining (on CPUs too), the end."""

import inspect
import multiprocessing
import os
import socket

from recipelib.runtime.console import say
from recipelib.runtime.errors import UserError
from recipelib.runtime.ranks import processes_started

# The rehearsal replaces `PartialState._prepare_backend` of accelerate, which must take these
# parameters.
_PREPARE_BACKEND = ["self", "cpu", "sagemaker_dp", "backend"]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_all_cores() -> None:
    """Give this process its share of the machine's cores where the launcher left it a single one.

    `accelerate launch` sets OMP_NUM_THREADS=1 for processes on a CPU unless told otherwise, which
    halves the speed on two cores. Any other number is somebody's choice and stays. A process that
    multiprocessing has forked, as `accelerate.notebook_launcher` does, gets one thread: OpenMP's
    survive no fork, and where the parent has computed with them, the first large product waits
    forever.
    """
    import torch

    if type(multiprocessing.current_process()).__name__ == "ForkProcess":
        os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate sets more
        torch.set_num_threads(1)
        return
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def uses_fsdp() -> bool:
    """Whether the accelerate config that launched this process asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def fsdp_option(name: str) -> str:
    """The value of a key of the accelerate config's `fsdp_config`, in lower case; "" if unset.

    Args:
        name: the key in capitals and without its prefix, as accelerate puts it behind `FSDP_` in
            the environment: `VERSION`, `STATE_DICT_TYPE`, `OFFLOAD_PARAMS`, ...
    """
    return os.environ.get(f"FSDP_{name}", "").lower()


def complete_ranks() -> None:
    """Set what a launcher sets and a program that starts processes itself leaves out.

    After `torch.multiprocessing.spawn` often torch's process group alone knows of the others, or
    the environment lacks the number on the machine. accelerate reads the environment only, and
    would train unrelated models. Where there is a group, all of its processes have to call this.
    """
    import torch.distributed as distributed

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if all(name in os.environ for name in names):
        return
    if distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
        if world == 1:
            return
        hosts = [""] * world
        over_cpus = distributed.new_group(backend="gloo")  # no GPU may have been chosen yet
        distributed.all_gather_object(hosts, socket.gethostname(), group=over_cpus)
        distributed.destroy_process_group(over_cpus)
        local, beside = hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])
    elif {"RANK", "WORLD_SIZE"} <= os.environ.keys() and _all_on_this_machine():
        rank, world = (int(os.environ[name]) for name in names[:2])
        local, beside = rank, world
    else:
        return
    for name, value in zip(names, (rank, world, local, beside), strict=True):
        os.environ.setdefault(name, str(value))


def _all_on_this_machine() -> bool:
    """Whether processes meet at an address that only this machine's can reach."""
    address = os.environ.get("MASTER_ADDR", "")
    return address in ("localhost", "::1") or address.startswith("127.")


def join_on_cpu(use_cpu: bool) -> bool:
    """Let the processes of a launch find each other on a machine without a GPU, over gloo.

    accelerate reaches its FSDP branch only for the device type of a GPU. Without a GPU it would
    train unrelated models, one in each process. Told that gloo is the backend of such a device, it
    shards on CPUs too. Call this before accelerate's state is made.

    Args:
        use_cpu: whether the user asked for the CPU.

    Returns:
        Whether the trainer has to be told to use the CPU (data parallel training). Under FSDP it
        must not be told: that would turn FSDP off.
    Raises:
        UserError: a config that cannot run without a GPU, or an accelerate whose private method
            differs from what this leans on.
    """
    launched = "LOCAL_RANK" in os.environ
    if not launched or (_has_accelerator() and not use_cpu):
        return use_cpu
    if not uses_fsdp():
        if not use_cpu and processes_started() > 1:
            say(f"no GPU: a rehearsal over {processes_started()} gloo processes")
        return use_cpu or processes_started() > 1
    if _has_accelerator():
        raise UserError(
            "--use_cpu: would turn off the FSDP of the accelerate config; to rehearse it on this "
            "machine's CPUs leave --use_cpu out and set CUDA_VISIBLE_DEVICES= (empty)"
        )
    if fsdp_option("VERSION") != "2":
        raise UserError(
            "FSDP1 cannot be rehearsed on CPUs (it cannot save an adapter there); rehearse with "
            "accelerate_configs/fsdp2.yaml"
        )
    if fsdp_option("OFFLOAD_PARAMS") == "true":
        raise UserError(
            "fsdp_offload_params: needs a GPU to offload from; rehearse with "
            "accelerate_configs/fsdp2.yaml"
        )
    from accelerate import __version__
    from accelerate.state import DistributedType, PartialState

    prepare = getattr(PartialState, "_prepare_backend", None)
    if prepare is None or list(inspect.signature(prepare).parameters) != _PREPARE_BACKEND:
        raise UserError(
            f"accelerate {__version__}: its PartialState._prepare_backend has another shape than "
            "FSDP on CPUs leans on; install the version of requirements.txt, or use GPUs"
        )

    def over_gloo(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = over_gloo
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    say(f"no GPU: a rehearsal, FSDP2 over {processes_started()} gloo processes")
    return False


def _has_accelerator() -> bool:
    """Whether accelerate can distribute over this machine's device; over Apple's it does not."""
    import torch

    return (
        torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"
    )


def check_joined(world_size: int) -> None:
    """Refuse processes that have not joined, each of which would train an unrelated model.

    Args:
        world_size: how many processes the trainer knows of.
    Raises:
        UserError: the trainer or torch's process group does not know of as many processes as were
            started.
    """
    import torch

    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    joined = min(world_size, torch.distributed.get_world_size()) if grouped else 1
    if joined != processes_started():
        raise UserError(
            f"{processes_started()} processes were started, but this one knows of {joined}: each "
            "would train a model of its own; launch with 'accelerate launch --config_file "
            "accelerate_configs/ddp.yaml' (or fsdp2.yaml) and the versions of requirements.txt, or "
            "set WORLD_SIZE=1 if each is to be a run of its own"
        )


def end_process_group() -> None:
    """End the process group of a launch, at the end of a run that went well.

    Left open, it is torn down with the interpreter: gloo's threads then release their last tensors
    while Python ends, which once in many runs aborts a process whose work is done.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
