"""Who computes what."""

import gpipe_sft
from fake_stages import evenly, fake_stages
from hypothesis import given
from hypothesis import strategies as st

from recipelib.cli import arguments
from recipelib.encoding import Counts
from recipelib.pipeline import stages
from recipelib.training import RecipeConfig


def test_a_single_process_is_first_and_last_and_computes_all_layers():
    alone = fake_stages(evenly(6, 1), 1)
    assert (alone.pipelines, alone.pipeline, alone.place) == (1, 0, 0)
    assert alone.is_first
    assert alone.is_last
    assert alone.own_layers == {*range(6)}
    assert alone.from_all("found") == ["found"]
    assert alone.group("stages") is None


def test_neighboring_processes_hold_the_same_stage(causal_model, monkeypatch):
    asked = []
    monkeypatch.setattr(RecipeConfig, "world_size", 6)
    monkeypatch.setattr(stages, "init_device_mesh", lambda *args, **names: asked.append(args))
    args, training = arguments(gpipe_sft, model_name_or_path=causal_model, stages=2, use_cpu=True)
    stages.Stages.of(args, training, Counts(tokens=10, supervised_tokens=2))
    assert asked == [("cpu", (2, 3))]  # the last dimension is that of neighbors


def test_interleaved_a_process_computes_every_other_stage():
    cut = [range(0, 3), range(3, 4), range(4, 6), range(6, 7)]
    first, last = (fake_stages(cut, 2, rank) for rank in (0, 1))
    assert [*first.own] == [0, 2]
    assert first.own_layers == {0, 1, 2, 4, 5}
    assert last.own_layers == {3, 6}
    assert [*first.of_process(1)] == [*last.own] == [1, 3]
    assert first.is_first
    assert last.is_last


@given(
    processes=st.integers(1, 5),
    each=st.integers(1, 2),
    pipelines=st.integers(1, 3),
    layers=st.integers(1, 3),
)
def test_every_pipeline_computes_every_layer_once(processes, each, pipelines, layers):
    count = processes * each * layers
    cut = evenly(count, processes * each)
    ranks = [
        fake_stages(cut, processes, place, pipelines=pipelines, pipeline=pipeline)
        for place in range(processes)
        for pipeline in range(pipelines)
    ]
    for pipeline in range(pipelines):
        own = [layer for one in ranks if one.pipeline == pipeline for layer in one.own_layers]
        assert sorted(own) == [*range(count)]
        ends = [(one.is_first, one.is_last) for one in ranks if one.pipeline == pipeline]
        assert ends[0][0]
        assert ends[-1][1]
        assert sum(map(sum, ends)) == 2
