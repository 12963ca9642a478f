"""What a process does by its place among those that a launcher started."""

import os

import pytest
import torch

from common.launch import progress, say, use_all_cores

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


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_one_process_speaks_and_all_go_through_their_items(rank, speaks, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("hello")
    assert list(progress("counting")(range(3))) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ("hello\n" if speaks else "")
    assert ("counting" in captured.err) == speaks
