"""Runs that leave sharded checkpoints train the same, save the same at their end, and go on from
them, also with another number of processes.
"""

import pytest
import torch
import with_options
from comparing import (
    ADAPTER,
    MODEL,
    assert_equal_losses,
    assert_equal_updates,
)
from consolidate import consolidate
from launching import records
from stopping import assert_stopped_alike
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


def test_the_last_save_is_whole(root, sharded, single, initial, single_full):
    assert not (root / "sharded" / "checkpoint-8" / ADAPTER).exists()
    assert_equal_losses(root / "sharded", single)
    assert_equal_updates(root / "sharded", single, initial)
    for one, other in zip(records(root / "sharded"), records(single), strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
    assert_equal_updates(root / "sharded_full", single_full, root / "model", MODEL)


def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(root, sharded, initial):
    assert_equal_losses(root / "sharded_resumed", root / "sharded")
    assert_equal_updates(root / "sharded_resumed", root / "sharded", initial)


def test_one_process_goes_on_from_the_checkpoint_of_two(root, one, initial):
    assert_equal_losses(root / "sharded_then_one", root / "sharded")
    assert_equal_updates(root / "sharded_then_one", root / "sharded", initial)


@pytest.mark.parametrize("kind", with_options.RATES)
def test_training_stops_and_goes_back_as_in_one_process(root, sharded, kind):
    alone = with_options.here(root / f"alone_stopped_{kind}", ["stopped"], [kind])
    assert_stopped_alike(root / "sharded_options", alone, kind)


def test_a_checkpoint_put_together_is_what_the_run_saved_at_its_end(
    root, sharded, initial, tmp_path
):
    consolidate(str(root / "sharded" / "checkpoint-8"), str(tmp_path / "adapter"))
    assert_equal_updates(tmp_path / "adapter", root / "sharded", initial)
    consolidate(str(root / "sharded_full" / "checkpoint-8"), str(tmp_path / "full"))
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "full", root / "sharded_full")
    )
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "full" / name).read_text() == (root / "sharded_full" / name).read_text()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
