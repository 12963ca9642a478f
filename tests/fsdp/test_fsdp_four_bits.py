"""QLoRA under FSDP2: the packed base is sharded like any other, and trains the same adapter."""

import pytest
import torch
from comparing import assert_equal_losses, assert_equal_updates
from launching import CONFIGS, RECIPE, SAVING, records
from optional_packages import needs_bitsandbytes
from run_files import read_json
from test_fsdp import assert_sharded_over_two
from tiny_llama import save_tiny_llama

pytestmark = [
    pytest.mark.slow,
    needs_bitsandbytes,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="a rehearsal is without a GPU"),
]


@pytest.fixture(scope="module")
def options(root):
    """What every run here has."""
    return {
        "model_name_or_path": save_tiny_llama(root / "wide", hidden_size=64),
        "load_in_4bit": "true",
    }


@pytest.fixture(scope="module")
def alone_packed(alone, options):
    """One process."""
    return alone("alone_packed", **options)


@pytest.fixture(scope="module")
def two_packed(root, arguments, launch, options):
    """Two processes; another run goes on from a checkpoint of theirs."""
    resumed = {"resume_from_checkpoint": root / "two_packed" / "checkpoint-10"}
    runs = {
        "two_packed": [RECIPE, *arguments("two_packed", **options, **SAVING)],
        "two_packed_resumed": [RECIPE, *arguments("two_packed_resumed", **options, **resumed)],
    }
    return launch(CONFIGS / "fsdp2.yaml", 2, runs)


@pytest.mark.parametrize("run", ["two_packed", "two_packed_resumed"])
def test_two_processes_learn_what_one_does_from_half_the_packed_base_each(
    root, two_packed, alone, alone_packed, options, run
):
    assert two_packed.failed == [], two_packed.errors
    assert_sharded_over_two(two_packed.said[run])
    assert_equal_losses(root / run, alone_packed)
    start = alone("initial_packed", learning_rate=0, max_steps=1, **options)
    assert_equal_updates(root / run, alone_packed, start)


def test_scores_and_counts_are_those_of_one_process(root, two_packed, alone_packed):
    metrics, single = (
        read_json(one / "metrics.json") for one in (root / "two_packed", alone_packed)
    )
    names = ("score", "base_score", "trainable_parameters", "total_parameters", "quantization")
    assert {name: metrics[name] for name in names} == {name: single[name] for name in names}
    for one, other in zip(records(root / "two_packed"), records(alone_packed), strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
