"""Strategies beside one another."""

import importlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipelib.planning import GPUS, Workload, answer, compare_strategies
from recipelib.planning.strategies import FULL, LORA, QLORA, pipeline_depths
from recipelib.runtime import UserError

WORK = Workload(gpus=4, batch=8, length=16)


@pytest.fixture(autouse=True)
def counted(monkeypatch, built_once):
    """Instead of a fake step, which takes long, some activations."""

    def peaks(*args):
        return [Counter(activations=2**21), Counter(activations=2**20)]

    for module in ("recipelib.planning.memory", "recipelib.training.memory"):
        monkeypatch.setattr(f"{module}.step_peaks", peaks)


@given(st.integers(1, 64), st.integers(1, 90))
def test_pipelines_use_all_gpus_and_give_each_stage_a_layer(gpus, layers):
    depths = pipeline_depths(gpus, layers)
    assert all(gpus % depth == 0 and 2 <= depth <= layers for depth in depths)
    assert (gpus in depths) == (2 <= gpus <= layers)


def test_every_strategy_has_a_plan_and_each_method_two_pipelines(config):
    plans = compare_strategies(config, replace(WORK, gpus=12), GPUS["h100"])
    found = sorted((one.method, re.sub(r"(?<=pipeline) .*", "", one.layout)) for one in plans)
    assert found == sorted(
        [
            *((FULL, "DDP"), (FULL, "FSDP2"), (FULL, "FSDP2, offloaded")),
            *((LORA, "DDP"), (LORA, "FSDP2"), (QLORA, "DDP")),
            *([(FULL, "pipeline")] * 2 + [(LORA, "pipeline")] * 2),
        ]
    )
    assert all(one.fits for one in plans)
    assert [one.time.total for one in plans] == sorted(one.time.total for one in plans)


def test_one_gpu_is_not_divided(config):
    plans = compare_strategies(config, replace(WORK, gpus=1), GPUS["h100"])
    found = {(one.method, one.layout) for one in plans}
    assert found == {
        *((FULL, "one GPU"), (LORA, "one GPU"), (QLORA, "one GPU"), (FULL, "FSDP2, offloaded"))
    }


def test_what_does_not_fit_stays_the_smallest_first(config):
    plans = compare_strategies(config, WORK, GPUS["h100"])
    limit = sorted(one.memory.total for one in plans)[4]
    small = replace(GPUS["h100"], memory_gib=limit / 0.9 / 2**30 + 1e-9)
    found = compare_strategies(config, WORK, small)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert all(one.fits == (one.memory.total <= limit) for one in found)
    for part in ([one for one in found if one.fits], [one for one in found if not one.fits]):
        assert part == sorted(part, key=lambda one: one.order)
    sizes = [one.memory.total for one in found if not one.fits]
    assert sizes == sorted(sizes)
    assert sizes
    best = answer(found, 1)
    assert best.startswith(f"fastest that fits: {found[0].method} by {found[0].layout}, ")


def test_where_nothing_fits_the_answer_says_what_is_smallest(config):
    tiny = replace(GPUS["h100"], memory_gib=1e-6)
    plans = compare_strategies(config, WORK, tiny)
    least = min(plans, key=lambda one: one.memory.total)
    said = f"nothing fits into 0 GiB; the least is {least.method} by {least.layout}, "
    assert answer(plans, 1e-6).startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 0}, "--gpus 0: must be 1 or more"),
        ({"micro_batch": 0}, "--micro_batch 0: must be 1 or more"),
        ({"supervised": 0.0}, "--supervised 0.0: must be above 0 and at most 1"),
        ({"utilization": 1.5}, "--utilization 1.5: must be above 0 and at most 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        Workload(**change)


def test_a_batch_that_does_not_divide_leaves_some_idle():
    work = Workload(gpus=4, batch=9, micro_batch=2)
    assert [work.micro_batches(replicas) for replicas in (1, 2, 4, 8)] == [5, 3, 2, 1]


def test_the_peaks_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
    peaks = importlib.import_module("flops").PEAKS
    for kind, gpu in GPUS.items():
        name = kind.split("-")[0].upper()
        if name in peaks:
            assert gpu.tflops == peaks[name] / 1e12
