"""adapter_sft.py over two processes under FSDP2 trains, scores and saves as one process does."""

import pytest
import torch
from comparing import ADAPTER, assert_equal_losses, assert_equal_updates
from launching import records
from peft import PeftModel
from run_files import read_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipelib.adapters.bottleneck import layer_number

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["adapter", "adapter_top"])
def runs(request, both, untrained):
    """A run over two processes, the same in one, and one in which nothing is learned."""
    return *both(request.param), untrained(request.param)


def test_adapters_train_score_and_save_as_in_one_process(runs, root):
    two, single, start = runs
    assert_equal_losses(two, single, 6)
    assert_equal_updates(two, single, start)
    for one, other in zip(records(two), records(single), strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)
    metrics = [read_json(folder / "metrics.json") for folder in (two, single)]
    for key in ("score", "base_score", "train_tokens", "trainable_parameters"):
        assert metrics[0][key] == metrics[1][key]
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "model"), two)


@pytest.mark.parametrize("runs", ["adapter"], indirect=True)
def test_adapters_are_dropped_as_in_one_process(runs):
    two, single, _ = runs
    found, wanted = (
        read_json(folder / "metrics.json")["dropped_adapters"] for folder in (two, single)
    )
    assert found["adapters"] == wanted["adapters"] == 2
    assert found["score"] == wanted["score"]
    kept = load_file(two / "dropped" / ADAPTER)
    whole = load_file(two / ADAPTER)
    assert all(torch.equal(one, whole[name]) for name, one in kept.items())
    gone = whole.keys() - kept.keys()
    assert gone == {name for name in whole if ".bottleneck_" in name and layer_number(name) == 0}
