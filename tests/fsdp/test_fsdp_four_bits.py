"""QLoRA under FSDP2: the packed base is sharded like any other, and trains the same adapter."""

import pytest
import torch
from comparing import assert_equal_losses, assert_equal_updates
from launching import records
from optional_packages import needs_bitsandbytes
from run_files import read_json
from test_fsdp import assert_sharded_over_two

pytestmark = [
    pytest.mark.slow,
    needs_bitsandbytes,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="a rehearsal is without a GPU"),
]


@pytest.fixture(scope="module")
def alone_packed(alone, packed):
    """One process."""
    return alone("alone_packed", **packed)


@pytest.fixture(scope="module")
def initial_packed(alone, packed):
    """What both start from."""
    return alone("initial_packed", learning_rate=0, max_steps=1, **packed)


@pytest.mark.parametrize("run", ["two_packed", "two_packed_resumed"])
def test_two_processes_learn_what_one_does_from_half_the_packed_base_each(
    root, two, alone_packed, initial_packed, run
):
    assert two.failed == [], two.errors
    assert_sharded_over_two(two.said[run])
    assert_equal_losses(root / run, alone_packed)
    assert_equal_updates(root / run, alone_packed, initial_packed)


def test_scores_and_counts_are_those_of_one_process(root, two, alone_packed):
    assert two.failed == [], two.errors
    metrics, single = (
        read_json(one / "metrics.json") for one in (root / "two_packed", alone_packed)
    )
    names = ("score", "base_score", "trainable_parameters", "total_parameters", "quantization")
    assert {name: metrics[name] for name in names} == {name: single[name] for name in names}
    for one, other in zip(records(root / "two_packed"), records(alone_packed), strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
