"""The benchmark of packing."""

import hashlib
import json

import packing
import pytest


@pytest.mark.parametrize("method", ["full", "lora"])
def test_both_arms_train_the_same_work(start, method):
    more = ["--lora"] if method == "lora" else []
    result, shown = start(packing, "--quick", "--steps", 1, *more)
    assert next(iter(result)) == "ratio"
    padded, packed = (result["arms"][arm] for arm in packing.ARMS)
    assert result["ratio"] == pytest.approx(
        packed["tokens_per_second"] / padded["tokens_per_second"]
    )
    assert padded["tokens"] == packed["tokens"] > 500
    assert padded["padding_fraction"] > 0.3
    assert packed["padding_fraction"] == 0
    assert len(result["losses"]) == 2  # the first step's too
    assert result["max_loss_difference"] < 1e-4
    assert result["method"] == method
    assert packed["estimated_memory_bytes"] < padded["estimated_memory_bytes"]
    assert f"ratio {result['ratio']:.2f}" in shown


def test_the_rows_are_those_that_were_measured():
    rows = packing.generate_rows(20)
    assert rows == packing.generate_rows(50)[:20]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12] == "7c84a23985a2"
