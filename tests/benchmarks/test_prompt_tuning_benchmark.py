"""The benchmark of a soft prompt's speed."""

import pytest
import soft_prompt_speed


def test_both_arms_train_the_same_work(start):
    result, shown = start(soft_prompt_speed, "--quick", "--steps", 2)
    assert next(iter(result)) == "ratio"
    plain, ours = (result["arms"][arm] for arm in ("plain", "ours"))
    assert result["ratio"] == pytest.approx(ours["steps_per_second"] / plain["steps_per_second"])
    assert result["loss_difference"] < 1e-4
    assert ours["peak_memory_bytes"] > 0 < plain["peak_memory_bytes"]
    assert f"ratio {result['ratio']:.2f}" in shown
