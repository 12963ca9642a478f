"""The whole model is put together in each process only where it has room."""

from types import SimpleNamespace

import pytest
import torch
from fake_stages import evenly, fake_stages
from tiny_llama import tiny_llama

from recipelib.pipeline import Pipeline
from recipelib.pipeline.stages import Stages
from recipelib.runtime import UserError


@pytest.mark.parametrize(("available", "fits"), [(4 * 30_000, False), (4 * 300_000, True)])
def test_a_model_without_room_beside_its_stages_is_refused(available, fits, monkeypatch):
    model = tiny_llama(300)  # a hundred thousand bytes, of which each process is said to hold all
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert 30_000 < 2 * size < 300_000
    monkeypatch.setattr(Stages, "from_all", lambda self, found: [found] * 2)
    memory = SimpleNamespace(available=available)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    stages, loaded = fake_stages(evenly(2, 2), 2, pipelines=2), []  # of four processes
    schedule = SimpleNamespace(device=torch.device("cpu"), own=[], stages=stages)

    def load():
        loaded.append(True)
        raise InterruptedError

    pipeline = Pipeline(model, schedule, None, load)
    with pytest.raises(InterruptedError if fits else UserError) as error, pipeline.gathered():
        pass
    assert bool(loaded) == fits
    if not fits:
        assert "choose a template with label words" in str(error.value)
        assert "\n" not in str(error.value)
