"""What training will take, term by term."""

import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_task import encoded_from
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from recipelib.runtime.memory import gib
from recipelib.training import memory
from recipelib.training.memory import MemoryEstimate, estimate_memory

ROWS = [{"input_ids": [5] * 24, "labels": [-100] * 16 + [5] * 8}] * 8


def estimate(model, training, rows=None):
    """The memory for training on rows, each `input_ids` and `labels`; by default on ROWS."""
    return estimate_memory(model, training, encoded_from(rows or ROWS))


@pytest.fixture(autouse=True)
def no_fsdp(monkeypatch):
    for name in [name for name in os.environ if "FSDP" in name]:
        monkeypatch.delenv(name)


@pytest.fixture
def counted(monkeypatch):
    """Instead of a fake step a moment with a gibibyte of activations, at which all else counts."""
    monkeypatch.setattr(memory, "step_peaks", lambda *args: [Counter(activations=2**30)])


def fsdp(monkeypatch, **options):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in options.items():
        monkeypatch.setenv(f"FSDP_{name}", value)


def settings(**changes) -> SimpleNamespace:
    """The trainer's arguments that an estimate reads."""
    defaults = {
        "device": torch.device("cpu"),
        "bf16": False,
        "fp16": False,
        "activation_checkpointing": False,
        "activation_checkpointing_kwargs": None,
        "optim": SimpleNamespace(value="adamw_torch_fused"),
        "optim_args": None,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "max_steps": -1,
        "seed": 0,
        "data_seed": None,
        "train_sampling_strategy": "random",
        "dataloader_drop_last": False,
        "packing": False,
    }
    return SimpleNamespace(**{**defaults, **changes})


def llama(**changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def size(parameters) -> int:
    return sum(4 * one.numel() for one in parameters)


def buffers(model) -> int:
    return sum(4 * one.numel() for one in model.buffers())


def trained(model) -> int:
    return size(one for one in model.parameters() if one.requires_grad)


def layer_parts(model) -> tuple[int, int]:
    """Bytes of one decoder layer, and of everything outside the layers."""
    layer = size(model.model.layers[0].parameters())
    return layer, size(model.parameters()) - 5 * layer


# One process -------------------------------------------------------------------------------------


def test_full_tuning_holds_weights_their_gradients_and_two_states():
    model = llama()
    found = estimate(model, settings(gradient_accumulation_steps=2))
    whole = size(model.parameters())
    assert found.parameters == whole + buffers(model)
    assert found.optimizer == 2 * whole
    # all of them from the micro-batch before, and in the head's place the new ones
    assert whole <= found.gradients <= whole + 2 * 4 * 300 * 32
    assert found.note == ""


def test_lora_holds_gradients_and_states_of_the_adapter_only():
    model = lora(llama())
    found = estimate(model, settings(gradient_accumulation_steps=2))
    assert found.parameters == size(model.parameters()) + buffers(model)
    assert found.gradients == trained(model) < size(model.parameters()) / 5
    assert found.optimizer == 2 * trained(model)


def test_without_accumulation_no_gradient_exists_when_the_activations_do():
    assert estimate(lora(llama()), settings()).gradients == 0


def test_where_activations_are_few_the_optimizers_step_is_the_peak():
    model = llama()
    row = [{"input_ids": [5, 5], "labels": [-100, 5]}]
    found = estimate(model, settings(per_device_train_batch_size=1), row)
    whole = size(model.parameters())
    assert (found.gradients, found.optimizer) == (whole, 2 * whole)
    assert found.total == pytest.approx(4 * whole, rel=0.01)


def test_the_sum_is_what_a_step_allocates_beside_the_rest():
    # test_fake_step.py holds the fake step to real ones
    model = lora(llama())
    few, many = (estimate(model, settings(per_device_train_batch_size=rows)) for rows in (2, 4))
    assert many.activations == pytest.approx(2 * few.activations, rel=0.1)
    assert many.logits == pytest.approx(2 * few.logits, rel=0.01)
    assert (many.parameters, many.optimizer) == (few.parameters, few.optimizer)
    recomputed = estimate(model, settings(activation_checkpointing=True))
    assert recomputed.activations < 0.6 * few.activations


def test_bfloat16_weights_count_half():
    whole = estimate(lora(llama()), settings())
    half = estimate(lora(llama().to(torch.bfloat16)), settings(bf16=True))
    assert 0.5 < half.parameters / whole.parameters < 0.6  # the adapter stays in float32
    assert half.optimizer == whole.optimizer
    assert half.activations < 0.8 * whole.activations


# Optimizers --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("name", "per_parameter"),
    [
        ("adamw_torch_fused", 8),
        ("adamw_torch", 8),
        ("paged_adamw_32bit", 8),
        ("lion_32bit", 4),
        ("adagrad", 4),
        ("sgd", 0),
    ],
)
def test_an_optimizers_states(name, per_parameter):
    model = llama()
    found = estimate(model, settings(optim=SimpleNamespace(value=name)))
    assert found.optimizer == per_parameter * sum(one.numel() for one in model.parameters())
    assert found.note == ""


@pytest.mark.usefixtures("counted")
def test_sgd_with_momentum_has_a_state():
    momentum = settings(optim=SimpleNamespace(value="sgd"), optim_args="momentum=0.9")
    model = llama()
    assert estimate(model, momentum).optimizer == size(model.parameters())


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_eight_bit_states_take_a_byte_and_a_scale_but_for_small_parameters(name):
    model = llama()
    found = estimate(model, settings(optim=SimpleNamespace(value=name)))
    counts = [one.numel() for one in model.parameters()]
    small = sum(count for count in counts if count < 4096)
    assert found.optimizer == round(2 * (4 * small + (1 + 4 / 256) * (sum(counts) - small)))
    assert small > 0


@pytest.mark.usefixtures("counted")
def test_adafactor_keeps_a_row_and_a_column():
    model = llama()
    found = estimate(model, settings(optim=SimpleNamespace(value="adafactor")))
    states = (sum(one.shape) for one in model.parameters())
    assert found.optimizer == 4 * sum(states)


@pytest.mark.usefixtures("counted")
def test_an_unknown_optimizer_counts_as_adamw_and_the_estimate_says_so():
    known = estimate(llama(), settings())
    found = estimate(llama(), settings(optim="galore_adamw"))
    assert found.optimizer == known.optimizer
    assert found.note == "galore_adamw counted as AdamW"
    assert "(estimate; galore_adamw counted as AdamW)" in str(found)


# Several processes -------------------------------------------------------------------------------


def test_fsdp_divides_what_it_shards_and_gathers_a_few_layers(monkeypatch):
    model = llama()
    alone = estimate(model, settings())
    fsdp(monkeypatch)
    found = estimate(model, settings(world_size=2))
    layer, outside = layer_parts(model)
    share = size(model.parameters()) / 2
    assert found.parameters == share + outside + 3 * layer + buffers(model)
    assert found.optimizer == alone.optimizer / 2
    assert found.activations == pytest.approx(alone.activations, rel=0.2)


@pytest.mark.usefixtures("counted")
def test_fsdp_with_more_processes_holds_less(monkeypatch):
    fsdp(monkeypatch)
    model = lora(llama())
    two, eight = (estimate(model, settings(world_size=n)) for n in (2, 8))
    assert two.parameters - eight.parameters == size(model.parameters()) * (1 / 2 - 1 / 8)
    assert eight.optimizer == two.optimizer / 4


@pytest.mark.usefixtures("counted")
def test_fsdp_that_does_not_reshard_holds_everything_gathered(monkeypatch):
    fsdp(monkeypatch, RESHARD_AFTER_FORWARD="false")
    model = llama()
    found = estimate(model, settings(world_size=2))
    assert found.parameters == 1.5 * size(model.parameters()) + buffers(model)


@pytest.mark.usefixtures("counted")
def test_fsdp_keeps_trained_weights_in_float32(monkeypatch):
    fsdp(monkeypatch)
    model = llama().to(torch.bfloat16)
    found = estimate(model, settings(bf16=True, world_size=2))
    assert found.optimizer == size(model.parameters())  # two of four bytes, over two processes
    layer, outside = layer_parts(model)
    gathered = (outside + 3 * layer) / 2  # in bfloat16
    buffered = sum(one.numel() * one.element_size() for one in model.buffers())
    assert found.parameters == size(model.parameters()) / 2 + gathered + buffered


@pytest.mark.usefixtures("counted")
def test_offloaded_shards_are_in_the_cpus_memory(monkeypatch):
    fsdp(monkeypatch, OFFLOAD_PARAMS="true")
    model = llama()
    found = estimate(model, settings(world_size=2))
    layer, outside = layer_parts(model)
    assert found.optimizer == 0
    assert found.parameters == outside + 3 * layer + buffers(model)
    assert found.note.endswith("GiB more in the CPU's memory")


@pytest.mark.usefixtures("counted")
def test_data_parallel_training_copies_the_gradients_and_nothing_is_shared():
    model = lora(llama())
    alone = estimate(model, settings(gradient_accumulation_steps=2))
    two = estimate(model, settings(gradient_accumulation_steps=2, world_size=2))
    assert two.gradients == 2 * alone.gradients
    assert two.total - alone.total == alone.gradients


# What is shown -----------------------------------------------------------------------------------


def test_the_estimate_is_shown_as_a_sum_of_what_is_there():
    found = MemoryEstimate(
        parameters=3 * 2**29, gradients=0, optimizer=2**28, activations=2**30, logits=2**19
    )
    assert str(found) == "2.75 GiB = 1.50 parameters + 0.25 optimizer + 1.00 activations (estimate)"
    assert gib(found.total) == "2.75"


def test_a_model_without_a_fake_step_is_counted_without_activations(capfd):
    # torch's grouped products in float32 need values
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=300, num_attention_heads=4, **sizes))
    found = estimate(model, settings())
    assert found.parameters == size(model.parameters()) + buffers(model)
    assert found.activations == 0
    assert found.note.startswith("without activations, for the fake step failed: ")
    assert "\n" not in found.note
    assert capfd.readouterr().err == ""
