"""The other accelerate configs train the same model, or say in one line why they cannot here."""

import pytest
from comparing import assert_equal_losses, assert_equal_updates
from launching import assert_sharded_over_two
from run_files import read_json

pytestmark = pytest.mark.slow


def test_data_parallel_training_is_rehearsed_over_gloo(root, data_parallel, single, initial):
    said = data_parallel.said["ddp"]
    assert "no GPU: a rehearsal over 2 gloo processes" in said
    assert_equal_losses(root / "ddp", single)
    assert_equal_updates(root / "ddp", single, initial)
    assert read_json(root / "ddp" / "metrics.json")["world_size"] == 2


def test_two_machines_shard_one_model(root, machines, single, initial):
    first, second = machines
    assert second.said == {}  # one process of all speaks
    for said in first.said.values():
        assert_sharded_over_two(said)
    assert_equal_losses(root / "machines", single)
    assert_equal_updates(root / "machines", single, initial)


def test_one_process_trains_under_the_config_for_one_gpu(root, small, single):
    assert small["one_gpu"].failed == [], small["one_gpu"].errors
    assert_equal_losses(root / "one_gpu", single)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("fsdp2_offload", "error: fsdp_offload_params: needs a GPU to offload from; rehearse with"),
        ("fsdp1", "error: FSDP1 cannot be rehearsed on CPUs"),
    ],
)
def test_what_needs_a_gpu_is_refused_in_one_line_that_names_the_config_to_rehearse(
    root, small, config, line
):
    ended = small[config]
    assert ended.said[config].strip() == "exit code 2"
    (error,) = [one for one in ended.errors.splitlines() if "rror" in one]
    assert error.startswith(line)
    assert error.endswith("accelerate_configs/fsdp2.yaml")
    assert not (root / config).exists()
