"""Training that stops early ends with its best weights; samples are written and change nothing."""

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for
from transformers import AutoModelForCausalLM

from recipelib.cli import RecipeArguments, option, parse_arguments
from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.inference.generation import generate
from recipelib.models.quantization import count_parameters
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError
from recipelib.training.callbacks import SampleWriter, stop_early
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

TOKENIZER = tokenizer_for("gpt2")
VOCABULARY = len(TOKENIZER)
TEMPLATE = PromptTemplate(
    {
        "name": "questions",
        "form": "generative",
        "prompt": "Question: {{ question }}\nAnswer:",
        "answer": " {{ answer }}",
        "metric": "loss",
        "stop": ["\n"],
    }
)
ENCODER = PromptEncoder(TEMPLATE, TOKENIZER, 100)
ROWS = [
    {"question": f"what is {number} {'more ' * (number % 4)}?", "answer": f"it is {word}"}
    for number, word in enumerate(["good", "bad", "the river", "a book"] * 4)
]
OTHER_ROWS = [{"question": f"who wrote {number}?", "answer": "the teacher"} for number in range(8)]


def lora():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(VOCABULARY), config)


KINDS = {"full": lambda: tiny_llama(VOCABULARY), "lora": lora}


def load(kind: str, folder):
    """What a run has saved, by nothing of ours."""
    if kind == "full":
        return AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(VOCABULARY), folder)


def config(folder, **options) -> RecipeConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 3,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return RecipeConfig(**{**defaults, **options})


def trainer_for(training, model, callbacks=(), evaluation=OTHER_ROWS) -> RecipeTrainer:
    examples, held_out = (encode_rows(ENCODER, rows).examples for rows in (ROWS, evaluation))
    task = examples_task(examples, TOKENIZER, held_out)
    return RecipeTrainer(model, training, task, callbacks=list(callbacks))


def history(trainer, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


# Stopping early ----------------------------------------------------------------------------------


def run(folder, model, patience, checkpoint=None, **options):
    training = config(folder, **options)
    callback = stop_early(training, patience)
    trainer = trainer_for(training, model, [callback])
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_after_so_many_worse_evaluations_with_the_best_weights(kind, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.1}
    if kind == "full":
        options["learning_rate"] = 0.03
    trainer = run(tmp_path, KINDS[kind](), 2, num_train_epochs=50, **options)
    losses = history(trainer, "eval_loss")
    best = min(losses, key=losses.get)
    assert best > 0
    assert max(losses) == trainer.state.global_step == best + 4  # two evaluations later
    assert trainer.state.max_steps == 200
    # The weights are the best ones', scored, saved and counted as such.
    trainer.model.eval()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-5)
    trainable, total = count_parameters(trainer.model)
    assert trainable == (total if kind == "full" else count_parameters(lora())[0])
    trainer.save_model(str(tmp_path / "saved"))
    saved = load(kind, tmp_path / "saved")
    scores = [evaluate_task(one, ENCODER, OTHER_ROWS).score for one in (trainer.model, saved)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_a_resumed_run_goes_on_counting(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.03}
    options |= {"num_train_epochs": 50, "save_total_limit": 10}
    whole = run(tmp_path, KINDS["full"](), 2, **options)
    best, end = whole.state.best_global_step, whole.state.global_step
    for step in (best, best + 2):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        again = run(tmp_path, KINDS["full"](), 2, checkpoint, **options)
        assert (again.state.best_global_step, again.state.global_step) == (best, end), step


def test_a_run_that_keeps_getting_better_is_not_stopped(tmp_path):
    training = config(tmp_path, learning_rate=1e-3)
    callback = stop_early(training, 1)
    trainer = trainer_for(training, tiny_llama(VOCABULARY), [callback], evaluation=ROWS)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 12
    assert list(history(trainer, "eval_loss")) == [4, 8, 12]  # once a pass


@dataclass
class StoppingArguments(RecipeArguments):
    early_stopping_patience: int | None = option(3, "")


def parse(*argv: str):
    return parse_arguments(
        StoppingArguments, "", {"output_dir": "runs/nowhere"}, ["--use_cpu", "true", *argv]
    )[1]


@pytest.mark.parametrize(
    ("command", "evaluated", "saved"),
    [
        ("", ("epoch", None), "epoch"),
        ("--eval_strategy epoch", ("epoch", None), "epoch"),
        ("--eval_strategy steps --eval_steps 7", ("steps", 7), "steps"),
        ("--save_steps 9", ("steps", 9), "steps"),
        ("--save_strategy epoch", ("epoch", None), "epoch"),
        ("--save_strategy best", ("epoch", None), "best"),
        ("--eval_strategy steps --eval_steps 7 --save_steps 7", ("steps", 7), "steps"),
        ("--eval_strategy steps --eval_steps 7 --save_strategy best", ("steps", 7), "best"),
        ("--load_best_model_at_end true --eval_strategy epoch --save_strategy epoch",
         ("epoch", None), "epoch"),
    ],
)  # fmt: skip
def test_what_the_user_left_at_its_default_follows(command, evaluated, saved):
    training = parse(*command.split())
    stop_early(training, 3)
    assert (training.eval_strategy, training.eval_steps) == evaluated
    assert training.save_strategy == saved
    if training.save_strategy == "steps":
        assert training.save_steps == training.eval_steps
    training.__post_init__()  # transformers' own checks agree
    assert training.load_best_model_at_end is True
    assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--save_strategy no", "--save_strategy no: early stopping goes back"),
        ("--eval_strategy steps --eval_steps 5 --save_steps 10",
         "--save_strategy: .* evaluates every 5 steps and saves every 10 steps; leave out"),
        ("--eval_strategy epoch --save_steps 10",
         "--save_strategy: .* evaluates once a pass and saves every 10 steps"),
        ("--metric_for_best_model runtime", "--metric_for_best_model runtime: only the loss"),
        ("--metric_for_best_model loss --greater_is_better true", "--greater_is_better: the lower"),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_line(command, said):
    with pytest.raises(UserError, match=f"^{said}") as error:
        stop_early(parse(*command.split()), 3)
    assert "\n" not in str(error.value)


def test_under_fsdp_weights_alone_cannot_be_gone_back_to(monkeypatch):
    training = parse("--save_only_model", "true")
    stop_early(training, 3)
    training = parse("--save_only_model", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"^--save_only_model: .* leave it out"):
        stop_early(training, 3)


# Samples -----------------------------------------------------------------------------------------


def samples(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def writer(every=4, rows=OTHER_ROWS[:2], encoder=ENCODER) -> SampleWriter:
    return SampleWriter(encoder, rows, every, max_new_tokens=5)


def test_answers_are_written_at_the_start_every_so_many_steps_and_at_the_end(tmp_path):
    trainer = trainer_for(config(tmp_path, max_steps=10), tiny_llama(VOCABULARY), [writer()])
    trainer.train()
    lines = samples(tmp_path)
    assert [line["step"] for line in lines] == [0, 0, 4, 4, 8, 8, 10, 10]
    for line, row in zip(lines, OTHER_ROWS[:2] * 4, strict=True):
        assert list(line) == ["step", "task", "prompt", "generated", "answer"]
        assert line["task"] == "questions"
        assert line["prompt"] == f"Question: {row['question']}\nAnswer:"
        assert line["answer"] == row["answer"]
        assert "\n" not in line["generated"]  # the template's stop
    prompts = [ENCODER.text.text_prompt(line["prompt"]) for line in lines[-2:]]
    options = {"max_new_tokens": 5, "end_ids": ENCODER.text.end, "stop": ["\n"]}
    written = generate(trainer.model.eval(), TOKENIZER, prompts, **options)
    found = [one.text.partition("\n")[0] for (one,) in written]
    assert [line["generated"] for line in lines[-2:]] == found
    assert len({line["generated"] for line in lines}) > 1  # it learns


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_with_and_without_them(dropout, tmp_path):
    losses = []
    for callbacks in ([], [writer(1)]):
        model = tiny_llama(VOCABULARY)
        model.config.attention_dropout = dropout
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        folder = tmp_path / str(len(callbacks))
        training = config(folder, gradient_accumulation_steps=2, neftune_noise_alpha=5.0)
        trainer = trainer_for(training, model, callbacks)
        trainer.train()
        assert model.training
        losses.append(history(trainer, "loss"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "save_total_limit": 5}
    trainer_for(config(tmp_path, **options), tiny_llama(VOCABULARY), [writer()]).train()
    whole = samples(tmp_path)
    for step in (4, 8):
        again = trainer_for(config(tmp_path, **options), tiny_llama(VOCABULARY), [writer()])
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert samples(tmp_path) == whole, step
    changed = [{**line, "generated": "as it was"} for line in whole]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, changed)))
    again = trainer_for(config(tmp_path, **options), tiny_llama(VOCABULARY), [writer()])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert samples(tmp_path) == changed[:4] + whole[4:]
    other = trainer_for(config(tmp_path, **options), tiny_llama(VOCABULARY), [writer(3)])
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [line["step"] for line in samples(tmp_path)[::2]] == [0, 4, 6, 9, 10]


def test_several_tasks_share_the_file(tmp_path):
    other = PromptTemplate({**TEMPLATE.fields, "name": "other", "prompt": "Q: {{ question }}"})
    writers = [writer(6), writer(6, encoder=PromptEncoder(other, TOKENIZER, 100))]
    trainer_for(config(tmp_path, max_steps=6), tiny_llama(VOCABULARY), writers).train()
    found = [(line["step"], line["task"]) for line in samples(tmp_path)]
    assert found == [
        (step, task) for step in (0, 6) for task in ("questions", "other") for _ in range(2)
    ]


def test_the_last_answers_are_those_of_the_best_weights(tmp_path):
    training = config(tmp_path, num_train_epochs=50, eval_strategy="steps", eval_steps=2,
                      learning_rate=0.03)  # fmt: skip
    callbacks = [stop_early(training, 2), writer(1000)]
    trainer = trainer_for(training, tiny_llama(VOCABULARY), callbacks)
    trainer.train()
    lines = samples(tmp_path)
    assert [line["step"] for line in lines] == [0, 0] + [trainer.state.best_global_step] * 2
    assert trainer.state.best_global_step < trainer.state.global_step
    again = trainer_for(training, tiny_llama(VOCABULARY), [stop_early(training, 2), writer(1000)])
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{trainer.state.global_step}"))
    assert samples(tmp_path) == lines


def test_of_a_conversation_the_last_reply_is_written():
    chat = copy.deepcopy(tokenizer_for("gpt2"))
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = PromptTemplate(
        {"name": "talk", "form": "generative", "messages": "messages", "metric": "loss"}
    )
    turns = [
        ("user", "hello"),
        ("assistant", "good day"),
        ("user", "bye"),
        ("assistant", "so long"),
    ]
    talk = [{"role": role, "content": text} for role, text in turns]
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    unlearned = {"role": "assistant", "content": "as you wish", "weight": 0}
    again = {"role": "user", "content": "?"}
    ends = ([], [again], [again, calling], [again, unlearned])
    rows = [{"messages": [*talk, *end]} for end in ends]
    rows.append({"messages": [again, calling]})  # nothing to write
    encoder = PromptEncoder(template, chat, 100)
    found = SampleWriter(encoder, rows, 1, max_new_tokens=5).asked
    assert len(found) == 4
    for ids, end, answer in found:
        prompt = chat.decode(ids)
        assert prompt.endswith("<user>bye<|endoftext|>\n<assistant>")
        assert "good day" in prompt
        assert "so long" not in prompt
        assert answer == "so long"
        assert end == encoder.text.chat_end(rows[0]["messages"][:3])


def test_a_row_whose_prompt_does_not_fit_is_passed_over(tmp_path):
    rows = [{"question": "why? " * 200, "answer": "so"}, *OTHER_ROWS[:1]]
    assert len(writer(rows=rows).asked) == 1
    nothing = writer(rows=rows[:1])
    trainer_for(config(tmp_path, max_steps=2), tiny_llama(VOCABULARY), [nothing]).train()
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_file_that_no_run_has_written_is_one_line(tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(config(tmp_path, **saving), tiny_llama(VOCABULARY)).train()
    (tmp_path / "samples.jsonl").write_text("hello\n")
    trainer = trainer_for(config(tmp_path, **saving), tiny_llama(VOCABULARY), [writer()])
    with pytest.raises(UserError, match=r"samples.jsonl: not what a run has written; delete it$"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# NEFTune -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_trained_with_and_neither_evaluated_nor_saved(kind, tmp_path):
    found = {}
    for alpha in (None, 10.0):
        training = config(tmp_path, neftune_noise_alpha=alpha, learning_rate=0.0, max_steps=4,
                          eval_strategy="steps", eval_steps=2)  # fmt: skip
        scores = []

        class Scorer(SampleWriter):
            def _write(self, model, folder, step, scores=scores):
                super()._write(model, folder, step)
                was_training = model.training
                scores.append(evaluate_task(model, ENCODER, OTHER_ROWS).score)
                model.train(was_training)

        trainer = trainer_for(training, KINDS[kind](), [Scorer(ENCODER, OTHER_ROWS[:1], 2)])
        trainer.train()
        found[alpha] = history(trainer, "loss"), history(trainer, "eval_loss"), scores
        model = trainer.model
        assert not model.get_input_embeddings()._forward_hooks
        ids = torch.tensor([[5, 9, 40]])
        with torch.no_grad():  # the hook is gone, also where the model is trained on
            assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
        trainer.save_model(str(tmp_path / "saved"))
    (losses, evaluated, scores), (noisy, evaluated_too, scores_too) = found.values()
    assert evaluated == evaluated_too
    assert scores == scores_too
    assert len(scores) == 3
    assert math.isclose(scores[0], next(iter(evaluated.values())), rel_tol=1e-3)
    for step, loss in losses.items():
        assert abs(noisy[step] - loss) > 1e-3, step
    saved = load(kind, tmp_path / "saved").eval()
    start = KINDS[kind]().eval()
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, start(ids).logits)
