"""recipes/instruction_sft.py run whole, on a tiny model with random weights."""

import json
from pathlib import Path

import instruction_sft
import pytest
import torch
from peft import PeftModel
from run_files import losses, read_json, read_jsonl
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.cli import parse_arguments
from recipelib.runtime.errors import UserError

REVIEWS = [
    {"sentence": f"a {word} film, number {number}", "label": label}
    for number in range(8)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
SUMS = [
    {
        "question": f"{n} pens and {n} more?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(1, 12)
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Hello {n}"},
            {"role": "assistant", "content": f"Good day {n}"},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": f"Good night {n}"},
        ]
    }
    for n in range(10)
]
HELD_OUT = """\
name: ending
form: generative
dataset: {path: nowhere, train: train, eval: validation}
columns: {text: sentence}
prompt: "{{ text }} Is that a film?"
answer: " {{ word }}"
label: label
verbalizer: {positive: ["yes"], negative: ["no"]}
metric: accuracy
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with `reviews`, `sums`, `chats.jsonl` and `ending.yaml`."""
    folder = tmp_path_factory.mktemp("data")
    splits = {
        "reviews/train": REVIEWS[:12],
        "reviews/validation": REVIEWS[12:],
        "sums/train": SUMS[:8],
        "sums/test": SUMS[8:],
        "chats": CHATS,
    }
    for name, rows in splits.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    (folder / "ending.yaml").write_text(HELD_OUT)
    return folder


@pytest.fixture
def run(model_folder, data, tmp_path):
    """Runs `main` as the command line would, on the tiny model; gives the output folder."""

    def start(*argv: str, output: str = "out") -> Path:
        folder = tmp_path / output
        given = ["--model_name_or_path", str(model_folder), "--output_dir", str(folder)]
        given += ["--max_steps", "2", "--max_new_tokens", "6", "--disable_tqdm", "true"]
        given += ["--max_train_samples", "30"]
        arguments = instruction_sft.InstructionArguments
        argv = [one.replace("DATA", str(data)) for one in argv]
        instruction_sft.main(
            *parse_arguments(arguments, "", instruction_sft.DEFAULTS, [*given, *argv])
        )
        return folder

    return start


TWO = ("--template", "movie_reviews=DATA/reviews", "gsm8k=DATA/sums")


def test_a_mixture_is_trained_and_each_task_scored_the_held_out_one_too(run, model_folder):
    held_out = ("--heldout_template", "DATA/ending.yaml=DATA/reviews")
    folder = run(*TWO, *held_out, "--learning_rate", "1e-3", "--mixing", "equal")
    metrics = read_json(folder / "metrics.json")
    assert metrics["method"] == "instruction full"
    assert metrics["task"] == "movie_reviews+gsm8k"
    assert {name: one["rows"] for name, one in metrics["mixture"].items()} == {
        "movie_reviews": 15,
        "gsm8k": 15,
    }
    tasks = metrics["tasks"]
    assert {name: one["heldout"] for name, one in tasks.items()} == {
        "movie_reviews": False,
        "gsm8k": False,
        "ending": True,
    }
    assert {one["eval_rows"] for one in tasks.values()} == {4, 3}
    trained = [tasks[name]["score"] for name in ("movie_reviews", "gsm8k")]
    assert (metrics["metric"], metrics["score"]) == ("mean", sum(trained) / 2)
    records = read_jsonl(folder / "predictions.jsonl")
    assert [one["task"] for one in records] == ["movie_reviews"] * 4 + ["gsm8k"] * 3
    assert metrics["rendering"] == "chat"
    assert {one.stem for one in (folder / "templates").iterdir()} == {"movie_reviews", "gsm8k"}
    tuned, base = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, model_folder))
    assert not torch.equal(tuned.lm_head.weight, base.lm_head.weight)


def test_a_model_without_chat_template_gets_one_that_is_saved_with_it(run, capsys):
    folder = run("--template", "movie_reviews=DATA/reviews")
    assert "no chat template: a plain one is used" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).count("</s>") == 1


def test_conversations_are_recognized_and_only_the_assistant_is_trained(run, capsys):
    run("--dataset", "DATA/chats.jsonl", "--preview", "3")
    shown = capsys.readouterr().out
    assert "messages" in shown
    assert shown.count("⟦Good day") == shown.count("⟦Good night") == 3
    assert shown.count("⟦") == 6
    assert shown.count("Be kind.") == 3


def test_conversations_and_tasks_go_together(run):
    folder = run("--template", "auto=DATA/chats.jsonl", "movie_reviews=DATA/reviews")
    tasks = read_json(folder / "metrics.json")["tasks"]
    assert sorted(one["metric"] for one in tasks.values()) == ["accuracy", "loss"]
    assert read_json(folder / "metrics.json")["metric"] == "mean"


def test_lora_trains_an_adapter_instead(run, model_folder):
    folder = run(*TWO, "--lora", "true")
    metrics = read_json(folder / "metrics.json")
    assert metrics["trainable_parameters"] < metrics["total_parameters"] / 2
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("more", [(), ("--packing", "true"), ("--neftune_noise_alpha", "5")])
def test_resuming_gives_the_uninterrupted_runs_losses(run, tmp_path, more):
    steps = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    whole = run(*TWO, *steps, *more, output="whole")
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again = run(*TWO, *steps, *more, "--resume_from_checkpoint", "last", output="again")
    assert losses(again) == losses(whole)


def test_packing_changes_no_loss_and_leaves_no_padding(run):
    plain = run(*TWO, "--per_device_train_batch_size", "4", output="plain")
    packed = run(*TWO, "--per_device_train_batch_size", "4", "--packing", "true", output="packed")
    assert losses(packed) == pytest.approx(losses(plain), abs=1e-5)
    assert read_json(packed / "metrics.json")["padding_fraction"] == 0
    assert read_json(plain / "metrics.json")["padding_fraction"] > 0


def test_samples_are_written_on_the_way(run):
    folder = run(*TWO, "--max_steps", "4", "--sample_steps", "2")
    lines = read_jsonl(folder / "samples.jsonl")
    assert {one["step"] for one in lines} == {0, 2, 4}
    assert {one["task"] for one in lines} == {"movie_reviews", "gsm8k"}


def test_training_stops_when_the_evaluation_loss_no_longer_falls(run):
    options = ("--max_steps", "40", "--eval_strategy", "steps", "--eval_steps", "2")
    options += ("--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "1")
    folder = run(*TWO, *options, "--early_stopping_patience", "2")
    assert read_json(folder / "metrics.json")["steps"] < 40


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ((*TWO, "--dataset", "DATA/reviews"), "--dataset: goes with one task"),
        ((*TWO, "--columns", "text=sentence"), "--columns text=sentence: of which task"),
        ((*TWO, "--columns", "sst2.text=a"), "--columns sst2.text=a: there is no such task"),
        (("--template", *TWO[1:2] * 2), "a task 'movie_reviews' is there; rename one"),
        ((*TWO, "--mixing", "much"), "--mixing much: must be size, equal"),
    ],
)
def test_a_mistake_is_one_line(run, argv, line):
    with pytest.raises(UserError) as error:
        run(*argv)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_of_one_of_several_tasks_are_named_by_it(run, tmp_path):
    file = tmp_path / "renamed.jsonl"
    rows = [{"review": row["sentence"], "label": row["label"]} for row in REVIEWS]
    file.write_text("\n".join(map(json.dumps, rows)))
    columns = ("--columns", "movie_reviews.text=review")
    folder = run("--template", f"movie_reviews={file}", "gsm8k=DATA/sums", *columns)
    assert read_json(folder / "metrics.json")["tasks"]["movie_reviews"]["eval_rows"] == 1


def test_one_of_several_templates_answers_new_rows(run, tmp_path):
    run("--template", "movie_reviews=DATA/reviews")  # whose template is not that of the next run
    run(*TWO)
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"sentence": "a fine film"}))
    with pytest.raises(UserError, match="--template: the run has gsm8k, movie_reviews; name"):
        run("--predict", str(file))
    folder = run("--predict", str(file), "--template", "movie_reviews")
    (answered,) = read_jsonl(folder / "predictions_asked.jsonl")
    assert answered["prediction"] in ("negative", "positive")
