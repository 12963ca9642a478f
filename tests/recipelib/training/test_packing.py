"""A line of rows trains as the same rows padded: losses, gradients, updates, for every model that
is not refused.
"""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import (
    MODELS,
    TOKENIZER,
    VOCABULARY,
    WINDOW,
    eager,
    tiny,
    tiny_llama,
    with_opinions,
)
from tiny_task import examples_task
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from recipelib.runtime.errors import UserError
from recipelib.training.batches import expected_padding
from recipelib.training.config import RecipeConfig
from recipelib.training.packing import RowsApart, row_lengths, rows_stay_apart
from recipelib.training.trainer import RecipeTrainer

PACKABLE = ["llama", "llama, eager", "gpt2", "qwen3", "mistral", "gemma3"]
REFUSED = ["bloom", "rwkv"]


def examples(count: int, seed: int = 0) -> list[dict]:
    """Random rows of 3 to 20 tokens, longer than a window; every token of every third supervised,
    of the others the last one to five.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length, answer = (
            int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((3, 21), (1, 6))
        )
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        start = 0 if number % 3 == 0 else max(0, length - answer)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


ROWS = examples(16)
TOKENS = sum(len(row["input_ids"]) for row in ROWS)


def model_of(name: str):
    """A fresh copy without dropout, whose draws depend on how rows are laid out."""
    model = copy.deepcopy(MODELS[name])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def trainer_for(folder, model, rows=ROWS, **options) -> RecipeTrainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    task = examples_task(rows, TOKENIZER)
    return RecipeTrainer(model, RecipeConfig(**{**defaults, **options}), task)


def train(folder, model, **options):
    """The trainer afterwards, the loss of each step, and by how much each weight changed."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = trainer_for(folder, model, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    change = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    return trainer, losses, change


def assert_packed_equals_padded(tmp_path, make, **options):
    """Trains both ways, and gives the packed run's trainer."""
    _, losses, change = train(tmp_path / "padded", make(), **options)
    trainer, packed, changed = train(tmp_path / "packed", make(), packing=True, **options)
    assert packed == pytest.approx(losses, abs=1e-4)
    assert max(losses) - min(losses) > 1e-3
    # A key's bias has no gradient but rounding: it moves every score of a softmax alike.
    names = [name for name in change if not name.endswith("c_attn.bias")]
    found, wanted = (
        torch.cat([one[name].flatten() for name in names]) for one in (changed, change)
    )
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    assert wanted.norm() > 1e-2
    return trainer


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKABLE)
def test_a_packed_run_has_the_losses_and_the_updates_of_a_padded_one(name, tmp_path):
    trainer = assert_packed_equals_padded(tmp_path, lambda: model_of(name))
    assert trainer.rows_apart == (name != "llama, eager")


@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_are_computed_again_keep_rows_apart_too(lora, tmp_path):
    def make():
        model = model_of("llama")
        if not lora:
            return model
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, config)

    trainer = assert_packed_equals_padded(tmp_path, make, activation_checkpointing=True)
    assert trainer.rows_apart


def test_under_lora_too(tmp_path):
    def make():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model_of("llama"), config)

    assert_packed_equals_padded(tmp_path, make, learning_rate=1e-2)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_steps_have_the_rows_that_the_sampling_strategy_gives_them(strategy, tmp_path):
    assert_packed_equals_padded(
        tmp_path,
        lambda: model_of("llama"),
        train_sampling_strategy=strategy,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )


def test_micro_batches_accumulate_to_the_loss_of_one_line(tmp_path):
    _, whole, _ = train(tmp_path / "whole", tiny_llama(VOCABULARY), packing=True)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    _, losses, _ = train(tmp_path / "parts", tiny_llama(VOCABULARY), packing=True, **parts)
    assert losses == pytest.approx(whole, abs=1e-5)


def test_the_evaluation_loss_is_the_padded_one(tmp_path):
    losses = []
    for packing in (False, True):
        trainer = trainer_for(
            tmp_path, model_of("llama"), packing=packing, per_device_eval_batch_size=5
        )
        losses.append(trainer.evaluate(Dataset.from_list(ROWS))["eval_loss"])
        assert trainer.tokens_seen == 0
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_nothing_is_padding(tmp_path):
    trainer, _, _ = train(tmp_path, tiny_llama(VOCABULARY), packing=True)
    assert trainer.tokens_seen == trainer.slots_seen == 2 * TOKENS
    lengths = [len(row["input_ids"]) for row in ROWS]
    assert expected_padding(lengths, trainer.args) == 0
    trainer.args.packing = False
    assert expected_padding(lengths, trainer.args) > 0.2


def test_models_compute_as_before_once_a_step_is_done(tmp_path):
    train(tmp_path, tiny_llama(VOCABULARY), packing=True)
    for mapping in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert mapping["sdpa"] is mapping._global_mapping["sdpa"]


# Rows of a line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
@given(lengths=st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=5), data=st.data())
def test_a_row_of_a_line_is_computed_as_if_it_were_alone(name, lengths, data):
    model = MODELS[name]
    rows = [
        data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=n, max_size=n)) for n in lengths
    ]
    positions = [place for length in lengths for place in range(length)]
    line = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([positions]),
    }
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
        with RowsApart(lengths):
            found = model(**line, use_cache=False).logits[0]
    torch.testing.assert_close(found, torch.cat(alone), atol=2e-3, rtol=1e-3)


def test_a_step_of_training_makes_no_mask(tmp_path):
    made, model = [], tiny_llama(VOCABULARY)
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: made.append(kwargs["attention_mask"]), with_kwargs=True
    )
    trainer = trainer_for(tmp_path, model, packing=True, max_steps=3)
    made.clear()
    trainer.train()
    trainer.evaluate(Dataset.from_list(ROWS))
    assert made == [None] * 5


def test_no_mask_is_made_but_for_rows_that_leave_a_sliding_window():
    made = []

    def spy(module, args, kwargs):
        made.append(kwargs["attention_mask"])

    model = model_of("mistral")
    model.model.layers[0].self_attn.register_forward_pre_hook(spy, with_kwargs=True)
    for lengths in ([WINDOW, WINDOW, 2], [WINDOW + 1, 2]):
        line = {
            "input_ids": torch.ones(1, sum(lengths), dtype=torch.long),
            "position_ids": torch.tensor([[place for n in lengths for place in range(n)]]),
        }
        with torch.no_grad(), RowsApart(lengths):
            model(**line, use_cache=False)
    assert made[0] is None
    assert made[1].shape[-2:] == (WINDOW + 3, WINDOW + 3)


# Which models can be packed ----------------------------------------------------------------------


def settle(model, tmp_path, coarse=False) -> bool:
    collate = trainer_for(tmp_path, tiny_llama(VOCABULARY), packing=True).data_collator
    return rows_stay_apart(model, collate, coarse)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_rows_would_see_one_another_is_refused_in_one_line(name, tmp_path):
    model = model_of(name)
    with pytest.raises(UserError, match=r"^--packing: in a \w+ the rows .* leave it out") as error:
        settle(model, tmp_path)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_heed_positions_is_found_out(tmp_path):
    model = model_of("gpt2")
    inner = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids=None, **more: inner(*args, **more)
    with pytest.raises(UserError, match="--packing"):
        settle(model, tmp_path)


def test_layers_that_carry_over_from_row_to_row_are_found_out(tmp_path):
    model = with_opinions(
        tiny(
            "lfm2",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    )
    with pytest.raises(UserError, match=r"--packing: .*packed.*causal_conv1d.*; or leave it out"):
        settle(model, tmp_path)


def test_a_soft_prompt_is_refused(tmp_path):
    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="--packing"):
        settle(get_peft_model(model_of("llama"), soft), tmp_path)


def test_attention_that_cannot_be_exchanged_gets_a_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", AttentionInterface())
    trainer = assert_packed_equals_padded(tmp_path, lambda: model_of("llama"))
    assert trainer.rows_apart is False


def test_what_sixteen_bits_round_is_no_reason_to_refuse(tmp_path):
    assert settle(model_of("llama").bfloat16(), tmp_path, coarse=True)
    assert not settle(eager(model_of("llama").bfloat16()), tmp_path, coarse=True)
    model = model_of("llama")
    inner = model.forward

    def rounding(input_ids, **more):
        found = inner(input_ids=input_ids, **more)
        found.logits *= 1 + 0.005 * (input_ids.shape[1] > 10)
        return found

    rounding.__signature__ = inspect.signature(inner)
    model.forward = rounding
    assert settle(model, tmp_path, coarse=True)
    with pytest.raises(UserError, match="--packing"):
        settle(model, tmp_path)


def test_the_model_is_asked_without_dropout_and_left_as_it_was(tmp_path):
    model = tiny("gpt2", n_positions=128, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5).train()
    assert settle(model, tmp_path)
    assert model.training


# NEFTune -----------------------------------------------------------------------------------------


def test_the_noise_is_that_of_padded_rows(tmp_path, monkeypatch):
    """Uniform within alpha / sqrt(L d), where L is the length of the batch's longest row."""
    scales = {}
    for packing in (False, True):
        largest = scales[packing] = []

        def uniform(self, low, high, largest=largest):
            largest.append(float(high))
            return self

        trainer = trainer_for(
            tmp_path, tiny_llama(VOCABULARY), packing=packing, neftune_noise_alpha=5.0
        )
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "uniform_", uniform)
            trainer.train()
    lengths = sorted((len(row["input_ids"]) for row in ROWS), reverse=True)
    assert scales[True] == pytest.approx(scales[False])
    assert len(scales[True]) == 4
    assert min(scales[True]) == pytest.approx(5 / (lengths[0] * 32) ** 0.5)


def test_a_lines_lengths_are_those_of_its_rows(tmp_path):
    trainer = trainer_for(tmp_path, tiny_llama(VOCABULARY), packing=True)
    line = trainer.data_collator(ROWS[:5])
    assert row_lengths(line) == [len(row["input_ids"]) for row in ROWS[:5]]
