"""What is trained and searched through label words over two processes under FSDP2 is what one
process trains, scores, saves and finds.
"""

import pytest
import torch
from comparing import ADAPTER, MODEL, assert_equal_losses
from launching import records
from peft import PeftModel
from run_files import losses, read_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

pytestmark = pytest.mark.slow

# What each run leaves of its weights.
FILES = {
    "soft_prompt": [ADAPTER, "soft_verbalizer.safetensors"],
    "prompt_model": [MODEL],
    "masked_p_tuning": [ADAPTER],
    "masked_both": [ADAPTER, f"base_model/{MODEL}"],
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_trained_and_scored_equals_one_process(both, untrained, name):
    two, single = both(name)
    start = untrained(name)
    assert_equal_losses(two, single, 6)
    found, wanted, before = (
        {
            f"{file}: {key}": one
            for file in FILES[name]
            for key, one in load_file(folder / file).items()
            if "key.bias" not in key  # it has no true gradient
        }
        for folder in (two, single, start)
    )
    assert found.keys() == wanted.keys() == before.keys()
    difference, update = (
        torch.cat([(ours[key] - theirs[key]).flatten() for key in sorted(found)]).norm()
        for ours, theirs in ((found, wanted), (wanted, before))
    )
    assert update > 0.1
    assert difference <= 1e-3 * update
    for one, other in zip(records(two), records(single), strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)
    for key in ("score", "base_score", "train_tokens", "trainable_parameters"):
        assert read_json(two / "metrics.json")[key] == read_json(single / "metrics.json")[key]


def test_what_was_sharded_loads_with_plain_transformers_and_peft(two, root):
    model = AutoModelForMaskedLM.from_pretrained(root / "two_masked_both" / "base_model")
    assert PeftModel.from_pretrained(model, root / "two_masked_both")
    assert AutoModelForCausalLM.from_pretrained(root / "two_prompt_model")


def test_a_network_in_front_of_a_soft_prompt_is_resumed_whole(two, root):
    whole, resumed = root / "two_masked_p_tuning", root / "two_masked_resumed"
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    found, wanted = (load_file(one / ADAPTER)["prompt_embeddings"] for one in (resumed, whole))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_draws_keep_their_best_pass_in_two_processes_as_in_one(both):
    two, single = both("few_shot")
    metrics = [read_json(folder / "metrics.json") for folder in (two, single)]
    assert metrics[0]["draws"] == metrics[1]["draws"]
    for draw in ("draw_0", "draw_1"):
        found, wanted = (load_file(one / draw / ADAPTER) for one in (two, single))
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_label_words_are_found_by_two_processes_together(both):
    two, single = both("searched")
    found, wanted = ((folder / "template.yaml").read_text() for folder in (two, single))
    assert found == wanted
    assert "verbalizer" in found
