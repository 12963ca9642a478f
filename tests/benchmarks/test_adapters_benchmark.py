"""The benchmark of what adapters cost."""

import adapter_speed
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def test_all_arms_train_the_same_work_and_all_models_are_timed(start):
    result, shown = start(adapter_speed, "--quick", "--steps", 1, "--bottleneck_size", 8)
    assert list(result)[:2] == ["ratio", "top_ratio"]
    arms = result["arms"]
    speed = {arm: one["tokens_per_second"] for arm, one in arms.items()}
    assert result["ratio"] == pytest.approx(speed["adapter"] / speed["lora"])
    count = {arm: one["trainable_parameters"] for arm, one in arms.items()}
    assert count["top"] == count["adapter"] / 2  # one of two layers
    assert abs(count["lora"] / count["adapter"] - 1) < 0.25
    assert count["full"] > 5 * count["adapter"]
    losses = [one["first_loss"] for one in arms.values()]
    assert max(losses) - min(losses) < 1e-4
    assert all(min(one.values()) > 0 for one in result["latency_seconds"].values())
    assert "adapters, lowest third dropped" in shown


def test_lora_of_equal_size_has_as_many_parameters_as_whole_ranks_allow():
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=100,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert adapter_speed.equal_rank(model, 64) == 15  # 4.58 against 4.46 million
