"""The trainer's loss is the model's own however rows are batched, and what it trains
is what was asked for.
"""

import json
import threading
import time

import pytest
import torch
from datasets import Column, Dataset
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LabelSmoother

from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError
from recipelib.runtime.memory import MemoryMeter
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

TOKENIZER = tokenizer_for("gpt2")
VOCABULARY = len(TOKENIZER)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **no_dropout))


MODELS = {"llama": lambda: tiny_llama(VOCABULARY), "gpt2": tiny_gpt2}


def examples(count: int, *, seed: int = 0) -> list[dict]:
    """Random rows of 4 to 20 tokens, their last one to five supervised, one also in its middle."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length, answer = (
            int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((4, 21), (1, 6))
        )
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        labels = [-100] * length
        start = max(1, length - answer)
        labels[start:] = ids[start:]
        if number == 1:
            labels[2] = ids[2]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


ROWS = examples(16)
SUPERVISED = [sum(label != -100 for label in row["labels"]) for row in ROWS]


def trainer_for(tmp_path, model=None, rows=ROWS, rates=None, **options) -> RecipeTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    task = examples_task(rows, TOKENIZER)
    model = model or tiny_llama(VOCABULARY)
    return RecipeTrainer(model, RecipeConfig(**{**defaults, **options}), task, rates=rates)


def own_loss(model, rows) -> torch.Tensor:
    """Summed over the rows one by one, without padding, by the model's own loss; over their
    supervised tokens.
    """
    total, count = 0.0, 0
    for row in rows:
        batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
        supervised = sum(label != -100 for label in row["labels"])
        total, count = total + model(**batch).loss * supervised, count + supervised
    return total / count


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


# The loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_loss_and_gradients_are_those_of_the_model_on_rows_without_padding(name, count, tmp_path):
    model = MODELS[name]()
    with torch.no_grad():  # weights so large that attention has gradients to speak of
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    trainer = trainer_for(tmp_path, model)
    batch = trainer.data_collator(ROWS[:count])
    assert count == 1 or (batch["attention_mask"] == 0).any()

    for expected in (own_loss(model, ROWS[:count]), model(**batch).loss):
        model.zero_grad()
        expected.backward()
        wanted = gradients(model)
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for weight, gradient in wanted.items():
            torch.testing.assert_close(found[weight], gradient, atol=5e-6, rtol=1e-5)
            if not weight.endswith("c_attn.bias"):  # the keys' part has no gradient but rounding
                assert gradient.norm() > 1e-3


def test_the_sum_is_divided_by_the_number_of_answer_tokens_in_the_whole_step(tmp_path):
    model = tiny_llama(VOCABULARY)
    trainer = trainer_for(tmp_path, model)
    batch = trainer.data_collator(ROWS[:5])
    mean = own_loss(model, ROWS[:5]).item()
    for total in (1, torch.tensor(100)):
        loss = trainer.compute_loss(model, batch, num_items_in_batch=total)
        assert loss.item() == pytest.approx(mean * sum(SUPERVISED[:5]) / float(total), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_rows_first_token_has_no_prediction_and_is_not_counted(name, packing, tmp_path):
    rows = [{**row, "labels": list(row["input_ids"])} for row in ROWS[:8]]
    model = MODELS[name]()
    count = sum(len(row["input_ids"]) - 1 for row in rows)
    wanted = sum(own_loss(model, [row]).item() * (len(row["input_ids"]) - 1) for row in rows)
    trainer = trainer_for(tmp_path, model, rows, packing=packing, learning_rate=0.0, max_steps=1)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(wanted / count, rel=1e-5)


@pytest.mark.parametrize("devices", [True, False])
def test_the_mean_over_processes_that_ddp_takes_is_undone_where_tokens_count_over_all(
    devices, tmp_path, monkeypatch
):
    trainer = trainer_for(tmp_path, average_tokens_across_devices=devices)
    batch = trainer.data_collator(ROWS[:5])
    alone = trainer.compute_loss(trainer.model, batch, num_items_in_batch=50)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 3))
    shared = trainer.compute_loss(trainer.model, batch, num_items_in_batch=50)
    assert shared.item() == pytest.approx(alone.item() * (3 if devices else 1))
    mean = trainer.compute_loss(trainer.model, batch)
    assert mean.item() == pytest.approx(own_loss(trainer.model, ROWS[:5]).item(), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_dft_weights_each_token_by_its_probability_without_a_gradient_through_it(packing, tmp_path):
    model, rows = tiny_llama(VOCABULARY), ROWS[:6]
    with torch.no_grad():  # so that probabilities differ
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    naive = torch.tensor(0.0)
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for place, label in enumerate(row["labels"]):
            if label != -100:
                log = logits[place - 1].log_softmax(-1)[label]
                naive = naive - log.exp().item() * log
    naive = naive / sum(SUPERVISED[:6])
    naive.backward()
    wanted = gradients(model)
    model.zero_grad()
    options = {"learning_rate": 0.0, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    task = examples_task(rows, TOKENIZER)
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True}
    training = RecipeConfig(**defaults, **options, save_strategy="no", packing=packing)
    trainer = RecipeTrainer(model, training, task, loss="dft")
    model.zero_grad = lambda *_, **__: None  # the step's gradients are kept
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(naive.item(), rel=1e-4)
    found = gradients(model)
    for weight, gradient in wanted.items():
        torch.testing.assert_close(found[weight], gradient, atol=5e-6, rtol=1e-4)
    # What is evaluated is the usual loss.
    evaluated = trainer.compute_loss(model.eval(), trainer.data_collator(rows)).item()
    assert evaluated == pytest.approx(own_loss(model, rows).item(), rel=1e-5)
    assert evaluated > 2 * loss


def test_label_smoothing_is_transformers_own(tmp_path):
    model = tiny_llama(VOCABULARY)
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        trainer = trainer_for(tmp_path, model, label_smoothing_factor=0.2)
    batch = trainer.data_collator(ROWS[:5])
    smoother = LabelSmoother(epsilon=0.2)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = smoother({"logits": logits}, batch["labels"].clone(), shift_labels=True)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mixture_of_experts_is_also_trained_to_spread_its_tokens(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=VOCABULARY, router_aux_loss_coef=0.5, **sizes, **heads)
    model = MixtralForCausalLM(config)
    plain = own_loss(model, ROWS[:5]).item()
    trainer = trainer_for(tmp_path, model)
    batch = trainer.data_collator(ROWS[:5])
    expected = model(**batch).loss.item()  # the model's own holds it too
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    assert expected - plain > 0.5
    trainer.current_gradient_accumulation_steps = 4
    quarter = trainer.compute_loss(model, batch, num_items_in_batch=4 * sum(SUPERVISED[:5])).item()
    assert quarter == pytest.approx(expected / 4, rel=1e-5)


# Training ----------------------------------------------------------------------------------------


def train(tmp_path, model, rows=ROWS, **options):
    """The trainer afterwards, the logged losses, and by how much each weight changed."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = trainer_for(tmp_path, model, rows, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    change = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    return trainer, losses, change


@pytest.mark.parametrize("name", [*MODELS, "lora"])
def test_single_rows_accumulated_train_as_one_batch_of_them_does(name, tmp_path):
    def model():
        if name != "lora":
            return MODELS[name]()
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return get_peft_model(tiny_llama(VOCABULARY), lora)

    options = {"num_train_epochs": 2}
    _, losses, change = train(tmp_path / "batch", model(), **options)
    _, single, changed = train(
        tmp_path / "single",
        model(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        **options,
    )
    assert len(losses) == 4
    assert single == pytest.approx(losses, abs=1e-4)
    assert losses[0] - losses[-1] > 1e-2  # it learns
    for weight, difference in change.items():
        # A key's bias has no gradient but rounding: it moves every score of a softmax alike.
        kept = slice(None)
        if weight.endswith("c_attn.bias"):
            kept = [*range(32), *range(64, 96)]
        error = (changed[weight] - difference)[kept].norm()
        assert error <= 1e-3 * difference[kept].norm(), weight


def test_the_logged_loss_is_the_mean_over_the_tokens_of_each_step(tmp_path):
    model = tiny_llama(VOCABULARY)
    expected = own_loss(model, ROWS).item()
    trainer, losses, _ = train(
        tmp_path,
        model,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        num_train_epochs=3,
    )
    assert losses == pytest.approx([expected] * 3, abs=1e-5)
    trainer.save_state()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == losses


def test_tokens_are_counted_with_and_without_padding(tmp_path):
    lengths = [len(row["input_ids"]) for row in ROWS]
    trainer, _, _ = train(
        tmp_path / "all", tiny_llama(VOCABULARY), per_device_train_batch_size=16, num_train_epochs=2
    )
    assert trainer.tokens_seen == 2 * sum(lengths)
    assert trainer.slots_seen == 2 * 16 * max(lengths)
    trainer, _, _ = train(
        tmp_path / "single",
        tiny_llama(VOCABULARY),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
    )
    assert trainer.tokens_seen == trainer.slots_seen == sum(lengths)


def test_evaluating_gives_the_loss_and_counts_no_tokens_before_and_after_training(tmp_path):
    trainer = trainer_for(tmp_path, per_device_eval_batch_size=16, num_train_epochs=1)
    losses = []
    for seen in (0, sum(len(row["input_ids"]) for row in ROWS)):
        losses.append(trainer.evaluate(Dataset.from_list(ROWS))["eval_loss"])
        assert trainer.tokens_seen == seen
        with torch.no_grad():
            assert losses[-1] == pytest.approx(own_loss(trainer.model, ROWS).item(), abs=1e-5)
        trainer.train()
    assert losses[1] < losses[0]


def test_a_tasks_loss_is_the_trainers_on_the_same_rows(tmp_path):
    template = PromptTemplate(
        {
            "name": "questions",
            "form": "generative",
            "prompt": "Question: {{ question }}\nAnswer:",
            "answer": " {{ answer }}",
            "metric": "loss",
        }
    )
    rows = [
        {"question": "who wrote the book?", "answer": "the teacher"},
        {"question": "is it good?", "answer": "yes"},
        {"question": "what is the story of the best film of the year?", "answer": "a river"},
    ]
    encoder = PromptEncoder(template, TOKENIZER, 100)
    encoded = encode_rows(encoder, rows)
    trainer = trainer_for(tmp_path, rows=encoded.examples)
    expected = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert evaluate_task(trainer.model, encoder, rows).score == pytest.approx(expected, abs=1e-5)


def test_one_bar_shows_the_steps_and_the_latest_loss(tmp_path, capfd):
    trainer = trainer_for(tmp_path, disable_tqdm=False, num_train_epochs=1)
    trainer.train()
    captured = capfd.readouterr()
    last = captured.err.rsplit("training:", 1)[1]
    assert "2/2" in last
    assert f"loss={trainer.state.log_history[-2]['loss']:.3f}" in last
    assert "'loss'" not in captured.out
    trainer_for(tmp_path, disable_tqdm=True, num_train_epochs=1).train()
    captured = capfd.readouterr()
    assert "training" not in captured.err
    assert "'loss'" not in captured.out


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_recomputed_when_asked_and_change_nothing(lora, tmp_path):
    results = []
    for recompute in (False, True):
        model = tiny_llama(VOCABULARY)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        calls = []
        layer = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("s.0")))
        layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        _, losses, change = train(
            tmp_path / str(recompute), model, max_steps=2, activation_checkpointing=recompute
        )
        assert len(calls) == (4 if recompute else 2)
        results.append((losses, change))
    (losses, change), (recomputed, changed) = results
    assert recomputed == pytest.approx(losses, rel=1e-5)
    assert sum(difference.norm() > 0 for difference in change.values()) >= 4
    for name, difference in change.items():
        torch.testing.assert_close(changed[name], difference, atol=5e-6, rtol=1e-5)


# Rates of their own ------------------------------------------------------------------------------


def lora_llama():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(VOCABULARY), config)


@pytest.mark.parametrize(
    ("optim", "kind"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_parameters_of_a_name_have_a_rate_of_their_own_in_the_optimizer_that_was_asked_for(
    optim, kind, tmp_path
):
    options = {"optim": optim, "learning_rate": 1e-3, "weight_decay": 0.1}
    trainer = trainer_for(tmp_path, lora_llama(), rates={"lora_B": 0.016}, **options)
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    assert type(trainer.optimizer) is kind
    rates = {}
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == 0.1
        rates |= {names[weight]: group["lr"] for weight in group["params"]}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert rates == {name: 0.016 if "lora_B" in name else 1e-3 for name in trained}
    assert any("lora_A" in name for name in trained)


def test_the_schedule_moves_each_rate_and_biases_and_norms_do_not_decay(tmp_path):
    model = tiny_gpt2()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = trainer_for(
        tmp_path, model, rates={"mlp": 0.0}, weight_decay=0.1, lr_scheduler_type="linear"
    )
    decays = {
        name: group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for name, weight in model.named_parameters()
        if any(weight is one for one in group["params"])
    }
    assert decays.keys() == before.keys()
    for name, decay in decays.items():
        assert decay == (0.0 if name.endswith("bias") or ".ln_" in name else 0.1), name
    trainer.train()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == ("mlp" in name), name


def test_an_optimizer_that_groups_parameters_itself_is_refused(tmp_path, monkeypatch):
    def grouped(args, model):
        return torch.optim.AdamW, {"optimizer_dict": {}}

    monkeypatch.setattr(RecipeTrainer, "get_optimizer_cls_and_kwargs", staticmethod(grouped))
    with pytest.raises(UserError, match=r"--optim \w+: groups parameters itself; try adamw_torch"):
        trainer_for(tmp_path, lora_llama(), rates={"lora_B": 0.016})


# What it knows of its task -----------------------------------------------------------------------


def test_a_run_goes_on_from_the_tasks_checkpoint_and_only_from_its_own(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = trainer_for(tmp_path, lora_llama(), **options)
    whole.train()
    task = examples_task(ROWS, TOKENIZER, checkpoint=str(tmp_path / "checkpoint-3"))
    again = RecipeTrainer(lora_llama(), whole.args, task)
    again.train()
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, again)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert again.tokens_seen < whole.tokens_seen
    other = get_peft_model(tiny_llama(VOCABULARY), LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="its adapter has r 4, and this run's 8"):
        RecipeTrainer(other, whole.args, task)


def test_evaluation_rows_are_prepared_only_where_the_loss_is_followed(tmp_path):
    class Asked(type(examples_task(ROWS, TOKENIZER))):
        def held_out(self):
            raise AssertionError("nobody follows the loss")

    task = Asked(**vars(examples_task(ROWS, TOKENIZER)))
    config = RecipeConfig(output_dir=str(tmp_path), use_cpu=True)
    assert RecipeTrainer(tiny_llama(VOCABULARY), config, task).eval_dataset is None
    followed = RecipeConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch")
    with pytest.raises(AssertionError, match="nobody follows the loss"):
        RecipeTrainer(tiny_llama(VOCABULARY), followed, task)


def test_no_thread_goes_on_measuring_where_training_fails(tmp_path):
    class Fails(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise ZeroDivisionError

    task = examples_task(ROWS, TOKENIZER)
    task.memory = MemoryMeter()
    training = RecipeConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = RecipeTrainer(tiny_llama(VOCABULARY), training, task, callbacks=[Fails()])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    time.sleep(0.1)
    assert not [one for one in threading.enumerate() if one.name == "memory meter"]


def test_where_memory_is_measured_the_plan_is_shown_and_figures_hold_all_of_it(tmp_path, capsys):
    measured, trained = [], []
    for memory in (None, MemoryMeter()):
        task = examples_task(ROWS, TOKENIZER)
        task.memory = memory
        config = {"per_device_train_batch_size": 16, "num_train_epochs": 2, "use_cpu": True}
        training = RecipeConfig(output_dir=str(tmp_path), save_strategy="no", **config)
        trainer = RecipeTrainer(tiny_llama(VOCABULARY), training, task)
        assert "Before training" not in capsys.readouterr().out
        trainer.train()
        measured.append(trainer.figures())
        trained.append("Before training" in capsys.readouterr().out)
        tokens = 2 * sum(len(row["input_ids"]) for row in ROWS)
        assert (measured[-1].steps, measured[-1].tokens) == (2, tokens)
        assert measured[-1].slots == 2 * 16 * max(len(row["input_ids"]) for row in ROWS)
        assert measured[-1].seconds > 0
        assert (measured[-1].world_size, measured[-1].distributed_type) == (1, "NO")
    assert trained == [False, True]
    without, with_meter = measured
    assert (without.peak_memory_bytes, without.estimated_memory_bytes) == (0, 0)
    assert with_meter.estimated_memory_bytes == trainer.estimated.total > 0
    assert with_meter.peak_memory_bytes >= 0


@pytest.mark.parametrize("strategy", ["batch_rebalance", "group_by_length"])
def test_the_order_of_the_rows_is_drawn_from_lengths_that_are_read_at_once(
    strategy, tmp_path, monkeypatch
):
    read = []

    class Watched(Column):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

        def __iter__(self):
            read.append("one by one")
            return super().__iter__()

    trainer = trainer_for(tmp_path, train_sampling_strategy=strategy)
    monkeypatch.setattr("datasets.arrow_dataset.Column", Watched)
    batches = trainer.get_train_dataloader().batch_sampler
    assert read == [slice(None)]
    order = [place for batch in batches for place in batch]
    assert sorted(order) == [*range(len(ROWS))]
    assert read == [slice(None)]
