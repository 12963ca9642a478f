"""What a process does by its place among those that a launcher started."""

import multiprocessing
import os
import re

import accelerate
import pytest
import torch
from accelerate.state import DistributedType, PartialState

from recipelib.runtime.errors import UserError
from recipelib.runtime.launch import (
    _has_accelerator,
    check_joined,
    complete_ranks,
    join_on_cpu,
    use_all_cores,
)
from recipelib.runtime.ranks import is_main_process

ACCELERATE = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        (ACCELERATE, 12),
        ({**ACCELERATE, "LOCAL_WORLD_SIZE": "5"}, 2),
        ({**ACCELERATE, "LOCAL_WORLD_SIZE": "99"}, 1),
        ({**ACCELERATE, "OMP_NUM_THREADS": "3"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),  # not accelerate's
        ({"ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({}, None),
    ],
)
def test_threads_are_set_only_where_accelerate_left_one(environment, threads, monkeypatch):
    for name in (*ACCELERATE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    use_all_cores()
    assert chosen == ([] if threads is None else [threads])


def test_a_forked_process_computes_in_one_thread(monkeypatch):
    for name, value in {**ACCELERATE, "OMP_NUM_THREADS": "3"}.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    forked = multiprocessing.get_context("fork").Process()
    monkeypatch.setattr(multiprocessing, "current_process", lambda: forked)
    use_all_cores()
    assert (chosen, os.environ["OMP_NUM_THREADS"]) == ([1], "1")


# Processes that find each other -------------------------------------------------------------------

LAUNCHED = {"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAUNCHERS = {
    "WORLD_SIZE": "RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}


@pytest.fixture
def launched(monkeypatch):
    """As a process that `accelerate launch` started under an FSDP2 config, without a GPU."""
    for name in (*LAUNCHERS, *LAUNCHERS.values(), "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    # Named here so that both are again afterwards what they were.
    monkeypatch.setattr(PartialState, "_prepare_backend", PartialState._prepare_backend)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("recipelib.runtime.launch._has_accelerator", lambda: False)
    return monkeypatch


def test_fsdp2_is_brought_to_cpus(launched, capsys):
    launched.setenv("WORLD_SIZE", "2")
    assert join_on_cpu(use_cpu=False) is False  # true would turn FSDP off
    backend = PartialState._prepare_backend(None)
    assert backend == ("gloo", DistributedType.MULTI_GPU)
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
    assert capsys.readouterr().out == "no GPU: a rehearsal, FSDP2 over 2 gloo processes\n"


def other_parameters(self, cpu=False, backend=None):
    return backend, DistributedType.NO


@pytest.mark.parametrize("shape", [other_parameters, None])
def test_an_accelerate_of_another_shape_ends_in_a_line_with_its_version(shape, launched):
    if shape is None:
        launched.delattr(PartialState, "_prepare_backend")
    else:
        launched.setattr(PartialState, "_prepare_backend", shape)
    line = f"accelerate {accelerate.__version__}: its PartialState._prepare_backend has another"
    with pytest.raises(UserError, match=re.escape(line)):
        join_on_cpu(use_cpu=False)
    assert getattr(PartialState, "_prepare_backend", None) is shape
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == ""


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP1 cannot be rehearsed on CPUs"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: needs a GPU to offload from"),
    ],
)
def test_what_needs_a_gpu_is_refused(environment, line, launched):
    for name, value in environment.items():
        launched.setenv(name, value)
    with pytest.raises(UserError, match=f"{line}.*accelerate_configs/fsdp2.yaml"):
        join_on_cpu(use_cpu=False)


def test_with_a_gpu_nothing_is_changed_and_use_cpu_does_not_turn_fsdp_off(launched):
    before = PartialState._prepare_backend
    launched.setattr("recipelib.runtime.launch._has_accelerator", lambda: True)
    assert join_on_cpu(use_cpu=False) is False
    assert PartialState._prepare_backend is before
    with pytest.raises(UserError, match="--use_cpu: would turn off the FSDP"):
        join_on_cpu(use_cpu=True)


def test_an_apple_laptop_rehearses_too(launched):
    launched.undo()
    launched.setattr(torch.accelerator, "is_available", lambda: True)
    for kind, distributed in (("mps", False), ("cuda", True)):
        launched.setattr(
            torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind)
        )
        assert _has_accelerator() is distributed


@pytest.mark.parametrize(
    ("address", "given", "completed"),
    [
        ("localhost", {}, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
        ("127.0.0.1", {"LOCAL_RANK": "0"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}),
        ("10.0.0.1", {}, {}),  # on which machine each is, nobody has said
        ("localhost", {"RANK": ""}, {}),  # nor which process this is
    ],
)
def test_what_a_program_leaves_out_of_the_environment_is_completed(
    address, given, completed, launched
):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, **given}
    launched.setattr(os, "environ", {name: value for name, value in variables.items() if value})
    complete_ranks()
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert {name: os.environ[name] for name in names if name in os.environ} == completed


@pytest.mark.parametrize("name", LAUNCHERS)
def test_several_processes_that_each_believe_to_be_alone_do_not_train(name, launched):
    check_joined(1)
    launched.setenv(name, "2")
    with pytest.raises(UserError, match="2 processes were started, but this one knows of 1"):
        check_joined(1)
    # What the trainer believes does not count where torch has no group.
    with pytest.raises(UserError, match="2 processes were started, but this one knows of 1"):
        check_joined(2)


@pytest.mark.parametrize(("started", "number"), LAUNCHERS.items())
def test_one_process_of_a_launch_is_the_main_one_whatever_launched_it(started, number, launched):
    for of, numbers in (("1", ["0"]), ("3", ["0", "1", "2"])):
        launched.setenv(started, of)
        main = []
        for own in numbers:
            launched.setenv(number, own)
            main.append(is_main_process())
        assert main == [True, False, False][: len(numbers)]


def test_a_process_that_was_started_for_itself_is_a_main_one(launched):
    launched.setenv("SLURM_PROCID", "1")  # of a job that started no step of several tasks
    launched.setenv("SLURM_NTASKS", "4")
    assert is_main_process()
    check_joined(1)
    launched.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert not is_main_process()
    with pytest.raises(UserError, match="set WORLD_SIZE=1 if each is to be a run of its own"):
        check_joined(1)
    launched.setenv("WORLD_SIZE", "1")
    assert is_main_process()
    check_joined(1)


@pytest.mark.parametrize(("believed", "grouped"), [(1, 2), (2, 1), (2, 2)])
def test_a_group_and_a_trainer_that_knows_of_all_are_needed(believed, grouped, launched):
    launched.setenv("WORLD_SIZE", "2")
    launched.setattr(torch.distributed, "is_initialized", lambda: True)
    launched.setattr(torch.distributed, "get_world_size", lambda: grouped)
    if believed == grouped == 2:
        check_joined(believed)
    else:
        with pytest.raises(UserError, match="knows of 1"):
            check_joined(believed)
