"""What a stage holds: its weights, and its micro-batches' activations."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from recipelib.planning import GPUS, Workload, compare_strategies, layer_costs
from recipelib.planning.cutting import stages_of
from recipelib.planning.memory import (
    layer_activations,
    micro_batch_of,
    pipeline_memory,
    process_memory,
    trainer_arguments,
)
from recipelib.planning.skeletons import skeleton
from recipelib.training import Sharding, step_peaks
from recipelib.training.fake_step import Count

WORK = Workload(gpus=2, batch=8, micro_batch=2, length=24, dtype="float32")


def size(module_or_weights) -> int:
    weights = getattr(module_or_weights, "parameters", lambda: module_or_weights)()
    return sum(one.numel() * one.element_size() for one in weights)


@pytest.fixture(scope="module")
def steps() -> dict:
    """The fake steps of WORK, each of which takes long."""
    return {}


@pytest.fixture(scope="module")
def activations(model, steps):
    return layer_activations(model, WORK, steps)


def planned(model, work, activations):
    """The memory of a pipeline of two stages."""
    cut = stages_of(model, layer_costs(model, work.supervised), 2)
    return pipeline_memory(model, work, cut, activations)


def test_stages_hold_all_parameters_once(model):
    stages = stages_of(model, layer_costs(model), 3)
    held = [id(one) for stage in stages for one in stage.parameters]
    assert sorted(held) == sorted(map(id, model.parameters()))
    table, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert any(one is table for one in stages[0].parameters)
    assert any(one is head for one in stages[-1].parameters)
    layers = model.model.layers
    assert size(stages[1].parameters) == size(layers[0]) * len(stages[1].layers)


def test_a_tied_head_is_held_twice(config):
    tied = {**config.to_dict(), "tie_word_embeddings": True}
    model = skeleton(LlamaConfig(**tied), torch.float32)
    stages = stages_of(model, layer_costs(model), 2)
    table = model.get_input_embeddings().weight
    assert sum(size(stage.parameters) for stage in stages) == size(model) + size([table])


def test_the_activations_of_all_layers_are_those_of_the_whole_model(model, steps, activations):
    found = activations
    shares = {id(weight): 0 for weight in model.parameters()}
    peaks = step_peaks(model, trainer_arguments(WORK, 1), micro_batch_of(WORK), shares, steps=steps)
    assert 6 * (found.each + found.once) + found.head.total() == pytest.approx(peaks[0].total())
    assert found.each + found.once + found.beside == pytest.approx(peaks[1]["activations"])
    assert found.once == 0  # float32: autocast casts nothing
    assert len(model.model.layers) == 6  # all are back


def test_autocasts_copies_of_the_weights_count_once_for_all_micro_batches(model):
    found = layer_activations(model, replace(WORK, dtype="bfloat16"))
    matrices = sum(one.numel() for one in model.model.layers[0].parameters() if one.dim() > 1)
    assert found.once == pytest.approx(2 * matrices, rel=0.01)


def test_gpipe_keeps_every_micro_batch_and_1f1b_as_many_as_there_are_stages(model, activations):
    each = 3 * activations.each + 2 * 24 * 32 * 4  # three layers, and what is sent on

    def kept(schedule, batch):
        work = replace(WORK, schedule=schedule, batch=batch)
        return planned(model, work, activations).activations

    # 12 micro-batches rather than 4
    assert kept("gpipe", 24) - kept("gpipe", 8) == pytest.approx(8 * each, abs=2)
    assert kept("1f1b", 24) == kept("1f1b", 8)
    # Of a few micro-batches all are under way at first.
    assert kept("gpipe", 2) == kept("1f1b", 2)
    assert kept("gpipe", 8) > kept("1f1b", 8)


def test_a_stage_holds_weights_gradients_and_two_states(model, activations):
    cut = stages_of(model, layer_costs(model, WORK.supervised), 2)
    found = planned(model, WORK, activations)
    buffers = size(model.buffers())
    held = {size(stage.parameters) for stage in cut}
    assert found.parameters - buffers in held
    assert found.optimizer == 2 * (found.parameters - buffers)
    assert found.gradients >= found.parameters - buffers


def test_replicas_send_copies_of_their_gradients(model, activations):
    alone = planned(model, WORK, activations)
    two = planned(model, replace(WORK, gpus=4, batch=16), activations)
    assert two.parameters == alone.parameters
    assert two.gradients - alone.gradients == pytest.approx(alone.optimizer / 2)


def test_lora_holds_gradients_and_states_of_its_adapters_only(lora, activations):
    found = planned(lora, WORK, activations)
    trained = sum(4 * one.numel() for one in lora.parameters() if one.requires_grad)
    assert found.optimizer < 2 * trained < found.parameters


def test_recomputing_keeps_a_layers_input_only(model, activations):
    again = layer_activations(model, replace(WORK, activation_checkpointing=True))
    assert again.each == pytest.approx(2 * 24 * 32 * 4, rel=0.3)
    assert again.each < activations.each / 5


def test_fsdp_divides_and_offloading_empties(model, steps):
    whole, shared, offloaded = (
        process_memory(model, WORK, Sharding(*how), steps) for how in ((), (True,), (True, True))
    )
    assert shared.optimizer == whole.optimizer / 2
    assert offloaded.optimizer == 0
    assert offloaded.note.endswith("GiB more in the CPU's memory")


def test_a_model_without_a_fake_step_is_planned_without_activations():
    # torch's grouped products in float32 need values
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MixtralConfig(vocab_size=300, num_attention_heads=4, **sizes)
    plans = compare_strategies(config, WORK, GPUS["h100"])
    notes = [one.memory.note for one in plans if one.layout == "pipeline 2"]
    assert len(notes) == 2
    assert all(note.startswith("without activations") for note in notes)


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 12), ("float32", 10)])
def test_no_fake_step_is_made_twice(config, built_once, monkeypatch, dtype, count):
    made = []

    def step(model, shortened, training, batch, loss):
        made.append((model, shortened[1], batch))
        return [Count(phase, phase, "activations", 2**20, made=True) for phase in (0, 2)]

    monkeypatch.setattr("recipelib.training.fake_step._step", step)
    # A micro-batch for each GPU: of its gradients DDP keeps all, FSDP a share, a pipeline none.
    work = replace(WORK, batch=4, dtype=dtype)
    compare_strategies(config, work, GPUS["h100"])
    # Of all parameters and LoRA two and three layers, one micro-batch and two; in bfloat16 of the
    # weights that FSDP gathers, and of QLoRA, one micro-batch.
    assert len({*made}) == len(made) == count
