"""The parts of a step's time, against arithmetic by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipelib.planning import Gpu, Workload, layer_costs
from recipelib.planning.cutting import stages_of
from recipelib.planning.timing import (
    all_reduce,
    flops,
    pipeline_time,
    replicas_time,
    ring_speed,
    seconds,
    shards_time,
)
from recipelib.training import Sharding

WORK = Workload(gpus=4, batch=32, micro_batch=2, length=24, supervised=0.5)
# Slow enough that nothing is lost to rounding: 1e12 operations and 8e8 bytes a second.
GPU = Gpu(80, tflops=1, memory_gbs=1, link_gbs=1, host_gbs=1, network_gbs=1)
FAST = replace(GPU, link_gbs=1000)
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80  # q and o, k and v, three of the MLP
HEAD = 300 * 32
TOKENS = 2 * 24


def trained(model) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def test_operations_of_all_parameters(model):
    layers, head = flops(model, WORK)
    scores = 2 * 24 * 32
    assert [*layers[0]] == [TOKENS * (2 * LAYER + scores), 2 * TOKENS * (2 * LAYER + scores)]
    assert [*head] == [2 * HEAD * TOKENS / 2, 4 * HEAD * TOKENS / 2]
    assert len(layers) == 6


def test_frozen_weights_take_no_gradient_of_their_own(lora):
    layers, head = flops(lora, WORK)
    adapter, scores = trained(lora) / 6, 2 * 24 * 32
    assert layers[0].forward == TOKENS * (2 * (LAYER + adapter) + scores)
    assert layers[0].backward == TOKENS * (2 * LAYER + 4 * adapter + 2 * scores)
    assert head.backward == head.forward


def test_recomputing_adds_a_forward_pass_of_the_layers(model):
    layers, head = flops(model, WORK)
    again, same_head = flops(model, replace(WORK, activation_checkpointing=True))
    assert again[0].backward == layers[0].backward + layers[0].forward
    assert same_head == head


def test_float32_takes_twice_as_long(model):
    _, head = flops(model, WORK)
    half = seconds(WORK, GPU, head)
    assert half.forward == head.forward / (1e12 * 0.4)
    assert seconds(replace(WORK, dtype="float32"), GPU, head).forward == 2 * half.forward


def test_a_ring_is_as_fast_as_its_slowest_link():
    gpu = replace(GPU, link_gbs=450, network_gbs=50)
    assert ring_speed(8, WORK, gpu) == 0.8 * 450e9
    assert ring_speed(16, WORK, gpu) == 0.8 * 400e9  # eight adapters together
    assert ring_speed(16, replace(WORK, gpus_per_node=2), gpu) == 0.8 * 100e9
    assert all_reduce(10**9, 4, WORK, gpu) == pytest.approx(2 * 3 / 4 * 4e9 / 360e9)


def test_data_parallel_training_adds_up_gradients_once(model):
    found = replicas_time(model, WORK, GPU)
    layers, head = flops(model, WORK)
    step = seconds(WORK, GPU, *layers, head)
    assert found.compute == pytest.approx(4 * sum(step))  # 32 rows, 4 GPUs, 2 at a time
    assert found.traffic == pytest.approx(2 * 3 / 4 * 4 * trained(model) / 0.8e9)
    assert found.waited == pytest.approx(found.traffic - step.backward)
    assert found.total == pytest.approx(found.compute + found.waited)
    assert replicas_time(model, replace(WORK, gpus=1), GPU).traffic == 0


def test_unpacking_four_bits_takes_time(lora):
    plain, packed = (replicas_time(lora, WORK, GPU, packed=packed) for packed in (False, True))
    frozen = 6 * (LAYER + 2 * 32)  # norms count, too
    assert packed.compute - plain.compute == pytest.approx(4 * 2 * frozen * 2.5 / 0.8e9)


def test_fsdp_gathers_all_weights_twice_for_every_micro_batch(model, lora):
    found = shards_time(model, WORK, GPU, Sharding(sharded=True))
    assert found.traffic == pytest.approx(4 * 3 / 4 * 6 * trained(model) / 0.8e9)
    assert found.waited == pytest.approx(found.traffic - found.compute)
    every = sum(one.numel() for one in lora.parameters())
    found = shards_time(lora, WORK, GPU, Sharding(sharded=True))
    assert found.traffic == pytest.approx(4 * 3 / 4 * (4 * every + 2 * trained(lora)) / 0.8e9)


def test_offloaded_shares_pass_the_bus(model):
    gpu = replace(GPU, link_gbs=1000)
    found = shards_time(model, WORK, gpu, Sharding(sharded=True, offloaded=True))
    assert found.traffic == pytest.approx(4 * (2 * 4 + 4) * trained(model) / 4 / 0.8e9)


@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 9))
def test_a_pipeline_idles_for_its_stages_less_one(model, stages, micro_batches):
    work = replace(WORK, gpus=stages, batch=2 * micro_batches)
    found = pipeline_time(model, work, FAST, stages_of(model, layer_costs(model), stages))
    share = (stages - 1) / (micro_batches + stages - 1)
    assert found.bubble == pytest.approx(share * found.total)
    layers, head = flops(model, work)
    whole = micro_batches * sum(seconds(work, FAST, *layers, head))
    assert found.compute >= whole / stages * (1 - 1e-9)
    assert (stages > 1) == (found.compute < whole * (1 - 1e-9))


def test_a_pipeline_sends_states_on_and_gradients_back(model):
    cut = stages_of(model, layer_costs(model), 2)
    slow = replace(GPU, link_gbs=1e-3)
    found = pipeline_time(model, replace(WORK, gpus=2), slow, cut)
    sending = 2 * TOKENS * 32 * 4 / 0.8e6
    assert found.traffic == pytest.approx(16 * sending)
    assert found.compute + found.waited == pytest.approx(16 * sending)
    assert found.bubble == pytest.approx(sending)
    replicas = pipeline_time(model, WORK, slow, cut)  # 2 x 2
    stage = max(sum(one.numel() for one in part.parameters) for part in cut)
    assert replicas.traffic == pytest.approx(8 * sending + 2 / 2 * 4 * stage / 0.8e6)


def test_between_nodes_a_stage_has_one_adapter(model):
    cut = stages_of(model, layer_costs(model), 2)
    gpu, work = replace(GPU, network_gbs=0.5), replace(WORK, gpus=2, gpus_per_node=1)
    near = pipeline_time(model, replace(WORK, gpus=2), gpu, cut)
    assert pipeline_time(model, work, gpu, cut).traffic == pytest.approx(2 * near.traffic)
