"""The fake step's sums are those of the same step with real tensors."""

import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_task import encoded_from
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from recipelib.models.head import logits_at
from recipelib.models.sharding import decoder_layers
from recipelib.training.batches import micro_batches
from recipelib.training.fake_step import MicroBatch, heaviest_batch, step_peaks
from recipelib.training.packing import RowsApart

VOCABULARY = 300
BATCH = MicroBatch(rows=3, width=20, supervised=15, padded=True)
FULL_BATCH = MicroBatch(rows=3, width=20, supervised=21, padded=False)


def settings(**changes) -> SimpleNamespace:
    """The trainer's arguments that a fake step reads."""
    defaults = {
        "device": torch.device("cpu"),
        "bf16": False,
        "fp16": False,
        "activation_checkpointing": False,
        "activation_checkpointing_kwargs": None,
    }
    return SimpleNamespace(**{**defaults, **changes})


def llama(layers: int = 5, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 5, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))


def lora(model, **changes):
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(model, LoraConfig(**options))


MODELS = {
    "llama": llama,
    "llama, lora": lambda: lora(llama(), lora_dropout=0.1),
    "llama, dora on some layers": lambda: lora(
        llama(), target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3], use_dora=True
    ),
    "gpt2": gpt2,
}


class Alive(TorchDispatchMode):
    """Adds up the storages that real operators make, from outside of the code under test."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in self.seen:
                storage = one.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.seen[key] = weakref.ref(storage, lambda _, k=key, n=size: self.drop(k, n))
                self.now += size
                self.most = max(self.most, self.now)
        return out

    def drop(self, key, size):
        del self.seen[key]
        self.now -= size


def real_loss(model, batch: MicroBatch, autocast=None) -> torch.Tensor:
    """The loss of RecipeTrainer with masks and values, for a batch of this shape."""
    ids = torch.randint(VOCABULARY, (batch.rows, batch.width))
    mask = torch.ones_like(ids)
    if batch.padded:
        mask[0, -1] = 0
    places = torch.arange(batch.rows * batch.width)[: batch.supervised]
    places = torch.stack([places // batch.width, places % batch.width], 1)
    with (
        torch.autocast("cpu", autocast, enabled=autocast is not None),
        logits_at(model, places, batch.width),
    ):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits.float()
    return torch.nn.functional.cross_entropy(logits[0], ids[*places.T])


def really_alive(model, batch: MicroBatch, autocast=None) -> int:
    alive = Alive()
    for one in [*model.parameters(), *model.buffers()]:
        alive.seen[one.untyped_storage()._cdata] = one
    with alive:
        real_loss(model.train(), batch, autocast).backward()
    return alive.most


def highest(model, batch=BATCH, **changes) -> Counter:
    weights = {id(one): 1 for one in model.parameters()}
    return max(step_peaks(model, settings(**changes), batch, weights), key=Counter.total)


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_that_of_a_real_step(name):
    model = MODELS[name]()
    estimated = highest(model).total()
    # masks of a few hundred bytes take the place of indices
    assert estimated == pytest.approx(really_alive(model, BATCH), abs=1500)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_batch_without_padding_has_no_mask(name):
    model = MODELS[name]()
    estimated = highest(model, FULL_BATCH).total()
    assert estimated == pytest.approx(really_alive(model, FULL_BATCH), abs=1500)
    padded = MicroBatch(**{**vars(FULL_BATCH), "padded": True})
    without, masked = (
        step_peaks(model, settings(), one, Weights(1))[0]["activations"]
        for one in (FULL_BATCH, padded)
    )
    # GPT-2's highest moment may lie where no mask is alive.
    assert without <= masked if name == "gpt2" else without < masked


@pytest.mark.parametrize("name", ["llama", "llama, lora"])
def test_the_peak_with_recomputed_layers_is_that_of_a_real_step(name):
    stored = highest(MODELS[name]()).total()
    model = MODELS[name]()
    estimated = highest(model, activation_checkpointing=True).total()
    assert not model.is_activation_checkpointing  # the model itself stays as it was
    model.activation_checkpointing_enable()
    assert estimated == pytest.approx(really_alive(model, BATCH), rel=0.01)
    assert estimated < 0.8 * stored


def test_fsdps_own_recomputing_counts_as_the_trainers(monkeypatch):
    expected = highest(llama(), activation_checkpointing=True)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert highest(llama()) == expected


def test_autocast_counts_with_its_copies_of_the_weights():
    model = MODELS["llama, lora"]()
    estimated = highest(model, bf16=True).total()
    assert estimated == pytest.approx(really_alive(model, BATCH, torch.bfloat16), rel=0.01)


def test_what_each_layer_adds_is_what_autograd_saves_in_it():
    def saved(model) -> int:
        sizes = {}
        known = {one.untyped_storage()._cdata for one in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = real_loss(model.train(), FULL_BATCH)
        assert loss.requires_grad  # alive until here, so that no storage's place is taken again
        return sum(sizes.values())

    models = {layers: lora(llama(layers)) for layers in (5, 9)}
    five, nine = (
        step_peaks(model, settings(), FULL_BATCH, Weights(1))[0] for model in models.values()
    )
    difference = saved(models[9]) - saved(models[5])
    assert nine["activations"] - five["activations"] == pytest.approx(difference, rel=0.01)
    assert nine["logits"] == five["logits"]


class Weights(dict):
    """The same for every parameter."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def __missing__(self, key):
        return self.weight


@pytest.mark.parametrize("name", ["llama, lora", "gpt2"])
def test_the_continued_sums_are_those_of_all_layers(name, monkeypatch):
    model = MODELS[name]()
    two = step_peaks(model, settings(), BATCH, Weights(0.5))
    monkeypatch.setattr("recipelib.training.fake_step._list_of_equals", lambda model: None)
    (all_layers,) = step_peaks(model, settings(), BATCH, Weights(0.5))
    assert max(two, key=Counter.total) == all_layers


def test_logits_are_what_has_the_vocabulary_as_its_width():
    few = step_peaks(lora(llama()), settings(), BATCH, Weights(1))[0]["logits"]
    # of the supervised tokens: scores, log-probabilities and the gradients of both
    row = 4 * VOCABULARY
    assert 2 * BATCH.supervised * row < few <= 4 * BATCH.supervised * row
    half = MicroBatch(rows=3, width=20, supervised=30, padded=True)
    more = step_peaks(lora(llama()), settings(), half, Weights(1))[0]["logits"]
    assert more == pytest.approx(2 * few, rel=0.01)


def test_gradients_that_stay_elsewhere_do_not_count():
    model = llama(2, tie_word_embeddings=False, vocab_size=64)
    size = 4 * sum(one.numel() for one in model.parameters())
    tiny = MicroBatch(rows=1, width=2, supervised=1, padded=False)
    (whole,) = step_peaks(model, settings(), tiny, Weights(1))
    (shard,) = step_peaks(model, settings(), tiny, Weights(1 / 4))
    (none,) = step_peaks(model, settings(), tiny, Weights(0))
    last = 4 * 64 * 32  # that of the embeddings, which is still whole when everything else is done
    assert whole["gradients"] == size
    assert shard["gradients"] == size / 4 + last * 3 / 4
    assert none["gradients"] <= last


def test_steps_that_were_made_serve_other_shares_and_fewer_layers(monkeypatch):
    model, steps = llama(), {}
    quarter = step_peaks(model, settings(), BATCH, Weights(1 / 4))
    step_peaks(model, settings(), BATCH, Weights(1), steps=steps)
    less = step_peaks(llama(4), settings(), BATCH, Weights(0))
    monkeypatch.setattr("recipelib.training.fake_step._step", None)
    assert step_peaks(model, settings(), BATCH, Weights(1 / 4), steps=steps) == quarter
    del model.model.layers[-1]
    assert step_peaks(model, settings(), BATCH, Weights(0), steps=steps) == less


def test_the_model_is_left_as_it_was():
    torch.manual_seed(3)
    model = lora(llama(), lora_dropout=0.5).eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    step_peaks(model, settings(activation_checkpointing=True), BATCH, Weights(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not model.is_activation_checkpointing
    assert all(one.grad is None for one in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert all(not layer._forward_pre_hooks for layer in decoder_layers(model))


def test_a_model_without_weights_is_estimated_on_the_trainers_device():
    expected = step_peaks(llama(), settings(), BATCH, Weights(1))
    with torch.device("meta"):
        model = llama()
    assert step_peaks(model, settings(), BATCH, Weights(1)) == expected


def test_a_patched_forward_that_holds_the_model_does_not_run_it():
    # as TRL's fused head is patched in
    expected = step_peaks(llama(), settings(), BATCH, Weights(1))
    model = llama()
    whole = model.forward
    model.forward = lambda *args, **kwargs: whole(*args, **kwargs)
    assert step_peaks(model, settings(), BATCH, Weights(1)) == expected


def test_layers_that_differ_are_all_estimated():
    model = llama()
    assert len(step_peaks(model, settings(), BATCH, Weights(1))) == 2
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    assert len(step_peaks(model, settings(), BATCH, Weights(1))) == 1


def test_a_mixture_of_experts_can_be_estimated_in_bfloat16():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads))
    model.to(torch.bfloat16)  # torch's grouped products have shapes without values in that alone
    estimated = highest(model).total()
    assert estimated == pytest.approx(really_alive(model, BATCH), rel=0.1)


# The batch ---------------------------------------------------------------------------------------


def rows_of(*lengths: int, answer: int = 2) -> list[dict]:
    return [{"input_ids": [5] * n, "labels": [-100] * (n - answer) + [5] * answer} for n in lengths]


def sampling(**changes) -> SimpleNamespace:
    defaults = {
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


def heaviest(rows, training):
    """The heaviest batch of rows, each `input_ids` and `labels`."""
    return heaviest_batch(encoded_from(rows), training)


def test_the_heaviest_batch_has_the_longest_row():
    rows = rows_of(4, 5, 6, 30, 7, 8)
    batch = heaviest(rows, sampling())
    assert (batch.rows, batch.width, batch.padded) == (2, 30, True)
    assert batch.supervised == 4


def test_rows_of_one_length_need_no_padding():
    batch = heaviest_batch(
        encoded_from(rows_of(*[9] * 6, answer=3)), sampling(per_device_train_batch_size=3)
    )
    assert batch == MicroBatch(rows=3, width=9, supervised=9, padded=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_line_of_rows_is_estimated_row_by_row(name):
    model, lengths = MODELS[name](), [20, 4, 31, 9]
    picked = torch.arange(5, 55, 3)
    line = {
        "input_ids": torch.randint(VOCABULARY, (1, sum(lengths))),
        "position_ids": torch.tensor([[place for n in lengths for place in range(n)]]),
    }
    alive = Alive()
    for one in [*model.parameters(), *model.buffers(), *line.values(), picked]:
        alive.seen[one.untyped_storage()._cdata] = one
    places = torch.stack([torch.zeros_like(picked), picked], 1)
    with alive, RowsApart(lengths), logits_at(model, places, sum(lengths)):
        logits = model.train()(**line, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0], line["input_ids"][0, picked]).backward()
    batch = MicroBatch(1, sum(lengths), len(picked), False, tuple(lengths))
    assert highest(model, batch).total() == pytest.approx(alive.most, rel=0.03)


def test_batches_of_similar_length_are_followed():
    rows = rows_of(*[40, 40, *[4] * 14])
    groups = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    together = heaviest_batch(
        encoded_from(rows), sampling(train_sampling_strategy="batch_rebalance", **groups)
    )
    assert together.rows * together.width < 4 * 40


def test_a_packed_batch_is_one_line_of_all_its_rows():
    rows = rows_of(4, 40, 6, 30, 7, 8)
    one = heaviest(rows, sampling(packing=True, per_device_train_batch_size=6))
    assert (one.rows, one.width, one.padded) == (1, 95, False)
    assert sorted(one.lengths) == [4, 6, 7, 8, 30, 40]
    assert one.supervised == 12
    line = heaviest(rows, sampling(packing=True))
    assert line.width >= 44
    assert line.width == max(
        sum((4, 40, 6, 30, 7, 8)[index] for index in batch)
        for batch in micro_batches([4, 40, 6, 30, 7, 8], sampling())
    )


def test_a_run_that_stops_early_need_not_meet_the_longest_row():
    rows = rows_of(*range(3, 103))
    widths = {heaviest(rows, sampling(max_steps=1, seed=seed)).width for seed in range(5)}
    assert min(widths) < 102
    assert heaviest(rows, sampling()).width == 102


def test_the_first_token_has_no_prediction():
    (row,) = rows_of(5, answer=5)
    batch = heaviest([row], sampling())
    assert batch.supervised == 4
