"""The benchmarks of layers that are computed once."""

import frozen_cache
import pytest
import transfer_methods


def test_all_arms_train_the_same_work_and_features_are_timed(start):
    result, shown = start(frozen_cache, "--quick", "--layers", 1, "--rows", 8)
    ratios = ["ratio", "full_ratio", "later_ratio", "memory_ratio", "features_ratio"]
    assert list(result)[:5] == ratios
    arms = result["arms"]
    assert result["ratio"] == pytest.approx(arms["uncached"]["seconds"] / arms["cached"]["seconds"])
    assert arms["cached"]["making_seconds"] > 0
    assert arms["uncached"]["making_seconds"] == 0
    assert result["loss_difference"] < 1e-5
    width = 32 * 4
    assert width <= result["disk_bytes_per_token"] < 10 * width  # few tokens in each shard
    assert all(seconds > 0 for seconds in result["features_seconds"].values())
    assert "features of all layers" in shown


def test_work_that_differs_ends_the_comparison():
    run = {"tokens": 10, "losses": [1.0, 0.5]}
    frozen_cache.check_same_work("full", {**run, "losses": [1.0, 0.7]}, run)
    for arm, other in (
        ("uncached", {**run, "losses": [1.0, 0.7]}),
        ("full", {**run, "losses": [1.1, 0.5]}),
        ("uncached", {**run, "tokens": 11}),
    ):
        with pytest.raises(frozen_cache.RunFailed, match="with the cache"):
            frozen_cache.check_same_work(arm, other, run)


def test_every_method_is_trained_on_the_same_rows(start, tmp_path):
    words = ["--quick", "--keep", tmp_path, "--methods", "features", "freeze_2", "lora", "full"]
    result, shown = start(transfer_methods, *words)
    found = result["tasks"]["movie_reviews"]
    methods = found["methods"]
    counts = {method: one["trainable_parameters"] for method, one in methods.items()}
    assert counts["features"] < counts["lora"] < counts["full"]
    assert [*found["layers"]] == ["0", "1", "2"]
    assert 0 < methods["features"]["result_bytes"] < methods["lora"]["result_bytes"]
    assert methods["lora"]["result_bytes"] < methods["freeze_2"]["result_bytes"]
    assert found["rows"] == transfer_methods.QUICK["rows"]
    assert "logistic regression on features" in shown
    assert (tmp_path / "transfer_methods.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*full*/model*.safetensors"))
    assert not (tmp_path / "cache").exists()
