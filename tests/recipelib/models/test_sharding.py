"""One precision in a process, and a model that was to be sharded is."""

from types import SimpleNamespace

import pytest
import torch

from recipelib.models import sharding


def test_a_model_that_is_scored_is_sharded_in_the_precision_that_the_trainer_will_ask_for(
    monkeypatch,
):
    asked = []

    def accelerator(**options):
        asked.append(options)
        return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None))

    monkeypatch.setattr(sharding, "Accelerator", accelerator)
    monkeypatch.setattr(sharding, "uses_fsdp", lambda: True)
    with pytest.raises(sharding.UserError, match="did not turn it on"):
        sharding.place_model(torch.nn.Linear(2, 2), SimpleNamespace(mixed_precision="bf16"))
    assert asked == [{"mixed_precision": "bf16"}]
