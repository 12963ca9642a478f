"""QLoRA under FSDP2: the packed base is sharded like any other, and trains the same adapter."""

import pytest
import torch
from comparing import assert_equal_losses, assert_equal_updates
from launching import assert_sharded_over_two, records
from optional_packages import needs_bitsandbytes
from run_files import read_json

pytestmark = [
    pytest.mark.slow,
    needs_bitsandbytes,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="a rehearsal is without a GPU"),
]


@pytest.mark.parametrize("run", ["two_packed", "two_packed_resumed"])
def test_two_processes_learn_what_one_does_from_half_the_packed_base_each(
    root, two, both, untrained, run
):
    alone, initial = both("packed")[1], untrained("packed")
    assert_sharded_over_two(two.said[run])
    assert_equal_losses(root / run, alone)
    assert_equal_updates(root / run, alone, initial)


def test_scores_and_counts_are_those_of_one_process(both):
    two, alone = both("packed")
    metrics, single = (read_json(folder / "metrics.json") for folder in (two, alone))
    names = ("score", "base_score", "trainable_parameters", "total_parameters", "quantization")
    assert {name: metrics[name] for name in names} == {name: single[name] for name in names}
    for one, other in zip(records(two), records(alone), strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
