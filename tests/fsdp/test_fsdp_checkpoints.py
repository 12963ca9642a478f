"""Runs under FSDP2 go on from their checkpoints as if nothing had stopped them, also with another
number of processes.
"""

import pytest
import torch
from comparing import assert_equal_losses, assert_equal_updates
from consolidate import consolidate
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(root, request, name, initial):
    launched = request.getfixturevalue(name)
    assert launched.failed == [], launched.errors
    assert_equal_losses(root / f"{name}_resumed", root / name)
    assert_equal_updates(root / f"{name}_resumed", root / name, initial)


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_one_process_goes_on_from_the_checkpoint_of_two(root, one, name, initial):
    assert_equal_losses(root / f"{name}_then_one", root / name)
    assert_equal_updates(root / f"{name}_then_one", root / name, initial)


def test_two_processes_go_on_from_the_checkpoint_of_one(root, recomputing, single, initial):
    assert "one_then_two" not in recomputing.failed, recomputing.errors
    assert_equal_losses(root / "one_then_two", single)
    assert_equal_updates(root / "one_then_two", single, initial)


def test_a_sharded_checkpoint_put_together_is_what_the_run_saved_at_its_end(
    root, sharded, initial, tmp_path
):
    assert sharded.failed == [], sharded.errors
    consolidate(str(root / "sharded" / "checkpoint-20"), str(tmp_path / "adapter"))
    assert_equal_updates(tmp_path / "adapter", root / "sharded", initial)
    consolidate(str(root / "sharded_full" / "checkpoint-20"), str(tmp_path / "full"))
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "full", root / "sharded_full")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
