"""Runs under FSDP2 go on from their checkpoints as if nothing had stopped them, also with another
number of processes.
"""

import pytest
from comparing import assert_equal_losses, assert_equal_updates

pytestmark = pytest.mark.slow


def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(root, two, initial):
    assert_equal_losses(root / "two_resumed", root / "two")
    assert_equal_updates(root / "two_resumed", root / "two", initial)


def test_one_process_goes_on_from_the_checkpoint_of_two(root, one, initial):
    assert_equal_losses(root / "two_then_one", root / "two")
    assert_equal_updates(root / "two_then_one", root / "two", initial)


def test_two_processes_go_on_from_the_checkpoint_of_one(root, recomputing, single, initial):
    assert "one_then_two" not in recomputing.failed, recomputing.errors
    assert_equal_losses(root / "one_then_two", single)
    assert_equal_updates(root / "one_then_two", single, initial)
