"""recipes/instruction_sft.py run whole, on a tiny model with random weights."""

import json

import instruction_sft
import pytest
from peft import PeftModel
from recipe_runs import REVIEWS, changed, watched_training, write_rows
from run_files import losses, read_json, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.runtime.errors import UserError

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


QUICK = {"max_steps": 2, "max_new_tokens": 6, "max_train_samples": 30}


@pytest.fixture(scope="module")
def data(tmp_path_factory, reviews, sums):
    """A folder with `reviews`, `sums`, `chats.jsonl` and `ending.yaml`."""
    folder = write_rows(tmp_path_factory.mktemp("data"), chats=CHATS)
    (folder / "reviews").symlink_to(reviews)
    (folder / "sums").symlink_to(sums)
    (folder / "ending.yaml").write_text(HELD_OUT)
    return folder


@pytest.fixture
def run(runs, data):
    """Runs the recipe, with the folder of data where options say DATA; gives the output folder."""
    start = runs(instruction_sft, dataset=None, **QUICK)

    def run(**options):
        for name, value in options.items():
            if isinstance(value, list):
                options[name] = [word.replace("DATA", str(data)) for word in value]
            elif isinstance(value, str):
                options[name] = value.replace("DATA", str(data))
        return start(**options)

    return run


TWO = ["movie_reviews=DATA/reviews", "gsm8k=DATA/sums"]


def test_a_mixture_is_trained_and_each_task_scored_the_held_out_one_too(run, capsys):
    with watched_training() as seen:
        folder = run(
            template=TWO,
            heldout_template=["DATA/ending.yaml=DATA/reviews"],
            learning_rate=1e-3,
            mixing="equal",
            whole=True,
        )
    metrics = read_json(folder / "metrics.json")
    assert metrics["method"] == "instruction full"
    assert metrics["task"] == "movie_reviews+gsm8k"
    shares = metrics["mixture"].values()
    assert [(share["rows"], share["rows_per_pass"]) for share in shares] == [(15, 15), (8, 15)]
    assert (metrics["train_rows"], metrics["train_examples"]) == (23, 30)
    said = capsys.readouterr().out
    assert "gsm8k: 8 rows, each 1 or 2 times in a pass, for --mixing equal" in said
    tasks = metrics["tasks"]
    assert {name: task["heldout"] for name, task in tasks.items()} == {
        "movie_reviews": False,
        "gsm8k": False,
        "ending": True,
    }
    assert [task["eval_rows"] for task in tasks.values()] == [6, 4, 6]
    trained = [tasks[name]["score"] for name in ("movie_reviews", "gsm8k")]
    assert (metrics["metric"], metrics["score"]) == ("share right", sum(trained) / 2)
    assert metrics["estimated_memory_bytes"] > 0
    records = read_jsonl(folder / "predictions.jsonl")
    assert [record["task"] for record in records] == (
        ["movie_reviews"] * 6 + ["gsm8k"] * 4 + ["ending"] * 6
    )
    assert {"line", "answer_text", "log_likelihoods"} <= records[-1].keys()
    assert tasks["movie_reviews"]["classes"].keys() == {"negative", "positive"}
    drawn = {file.stem for file in (folder / "confusion").iterdir()}
    assert drawn == {"movie_reviews", "ending"}
    assert metrics["rendering"] == "chat"
    assert {file.stem for file in (folder / "templates").iterdir()} == {"movie_reviews", "gsm8k"}
    assert changed(seen) == seen.before.keys()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(seen.trainer.model.get_parameter(name))


def test_a_model_without_chat_template_gets_one_that_is_saved_with_it(run, capsys):
    folder = run(template=TWO[:1])
    assert "no chat template: a plain one is used" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).count("</s>") == 1


def test_conversations_are_recognized_and_only_the_assistant_is_trained(run, capsys):
    run(dataset="DATA/chats.jsonl", preview=3)
    shown = capsys.readouterr().out
    assert "messages" in shown
    assert shown.count("⟦Good day") == shown.count("⟦Good night") == 3
    assert shown.count("⟦") == 6
    assert shown.count("Be kind.") == 3


def test_a_preview_shows_each_task_the_held_out_one_too(run, capsys):
    run(template=TWO, heldout_template=["DATA/ending.yaml=DATA/reviews"], preview=2)
    shown = capsys.readouterr().out
    for name in ("movie_reviews", "gsm8k", "ending (held out)"):
        assert [shown.count(f" {name}, example {number}: ") for number in (1, 2, 3)] == [1, 1, 0]


def test_conversations_and_tasks_go_together(run):
    folder = run(template=["auto=DATA/chats.jsonl", "movie_reviews=DATA/reviews"])
    tasks = read_json(folder / "metrics.json")["tasks"]
    assert sorted(task["metric"] for task in tasks.values()) == ["accuracy", "loss"]
    assert read_json(folder / "metrics.json")["metric"] is None


def test_a_pass_over_few_rows_is_one_pass(run, capsys):
    asked = {"max_steps": -1, "num_train_epochs": 1, "max_train_samples": 300}
    folder = run(dataset="DATA/chats.jsonl", per_device_train_batch_size=2, **asked)
    metrics = read_json(folder / "metrics.json")
    assert (metrics["train_rows"], metrics["train_examples"]) == (9, 9)
    assert metrics["steps"] == 3  # of 2 x 2 rows
    assert "times" not in capsys.readouterr().out


ASKED = CHATS[0]["messages"][:4]  # that ends with the user's turn
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "time", "arguments": {}}}]}
TOOLS = [{"name": "time", "description": "Tells it.", "parameters": {}}]


@pytest.mark.parametrize("lora", [True, False])
def test_a_model_tuned_on_conversations_writes_the_next_turn(run, tmp_path, lora, causal_model):
    folder = run(dataset="DATA/chats.jsonl", lora=lora, learning_rate=0.01)
    rows = [
        {"messages": ASKED},
        {"messages": CHATS[0]["messages"]},  # its last answer is the one to compare with
        {"messages": json.dumps([{"from": "human", "value": "And now?"}])},
        {"messages": [*ASKED, {"role": "assistant", "content": None}], "tools": TOOLS},
        {"messages": [*ASKED, CALL, {"role": "tool", "content": "9"}], "tools": json.dumps(TOOLS)},
    ]
    run(predict=write_rows(tmp_path, asked=rows) / "asked.jsonl")
    records = read_jsonl(folder / "predictions_asked.jsonl")
    assert [record["answer"] for record in records] == [[], ["Good night 0"], [], [], []]
    assert records[0]["prediction"] == records[1]["prediction"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(causal_model if lora else folder)
    model = PeftModel.from_pretrained(model, folder) if lora else model
    turns = [ASKED, ASKED, [{"role": "user", "content": "And now?"}], ASKED, rows[4]["messages"]]
    for asked, record, row in zip(turns, records, rows, strict=True):
        tools = [{"type": "function", "function": tool} for tool in TOOLS if "tools" in row]
        ids = tokenizer.apply_chat_template(
            asked, tools=tools or None, add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        said = model.generate(ids, max_new_tokens=QUICK["max_new_tokens"], do_sample=False)
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert record["prompt"] == tokenizer.decode(ids[0])
        assert (record["prediction"], record["generated"]) == (text.strip(), text)
    # Answers end where they did in training, which of an adapter its folder says.
    config = read_json(folder / "generation_config.json")
    first = said[0, ids.shape[1]].item()
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [first]}))
    run(predict=tmp_path / "asked.jsonl")
    assert read_jsonl(folder / "predictions_asked.jsonl")[-1]["generated"] == ""


def test_turns_behind_a_history_and_trls_prompts_are_answered_without_their_answers(run, tmp_path):
    history = [["Hello", "Good day"], ["And you?", "Well"]]
    kinds = {
        "alpaca": {"instruction": "And now?", "input": "", "output": "Fine", "history": history},
        "trl": {"prompt": ASKED[3:], "completion": ASKED[2:3]},
    }
    for kind, row in kinds.items():
        data = write_rows(tmp_path / kind, rows=[row] * 4)
        folder = run(dataset=str(data / "rows.jsonl"), max_steps=1, output=kind)
        bare = {key: value for key, value in row.items() if key not in ("output", "completion")}
        run(predict=write_rows(tmp_path, asked=[bare, row]) / "asked.jsonl", output=kind)
        less, more = read_jsonl(folder / "predictions_asked.jsonl")
        assert (less["answer"], len(more["answer"])) == ([], 1)
        assert less["prompt"] == more["prompt"]
        assert less["prompt"].endswith("And now?\n\n### Assistant:\n")
        assert less["prompt"].count("### User:") == (3 if kind == "alpaca" else 1)


def test_turns_that_cannot_be_answered_are_one_line(run, tmp_path):
    run(dataset="DATA/chats.jsonl", max_steps=1, max_length=512)
    for turns, more, line in (
        (ASKED[:1], {}, r"asked\.jsonl:1: messages: no turn of the user, so nothing to answer"),
        (ASKED, {"max_new_tokens": 1024}, "--max_length 512: none of the 1 rows fits with room"),
        # What is named goes before what the folder says.
        (ASKED, {"max_length": 8}, "--max_length 8: none of the 1 rows fits with room"),
        (ASKED, {"template": ["alpaca"]}, r"asked\.jsonl: no column .*'instruction'"),
    ):
        rows = [{"messages": turns}] * (1 + ("template" in more))
        file = write_rows(tmp_path, asked=rows) / "asked.jsonl"
        with pytest.raises(UserError, match=line) as error:
            run(predict=file, **more)
        assert "\n" not in str(error.value)


def test_lora_trains_an_adapter_instead(run, causal_model):
    folder = run(template=TWO, lora=True)
    metrics = read_json(folder / "metrics.json")
    assert metrics["method"] == "instruction lora"
    assert metrics["trainable_parameters"] < metrics["total_parameters"] / 2
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    assert PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("more", [{}, {"packing": True}, {"neftune_noise_alpha": 5}], ids=str)
def test_resuming_gives_the_uninterrupted_runs_losses(run, tmp_path, more):
    steps = {"template": TWO, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **more}
    whole = run(**steps, output="whole")
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again = run(**steps, resume_from_checkpoint="last", output="again")
    assert losses(again) == losses(whole)


def test_packing_changes_no_loss_and_leaves_no_padding(run):
    options = {"template": TWO, "per_device_train_batch_size": 4}
    plain = run(**options, output="plain")
    packed = run(**options, packing=True, output="packed")
    assert losses(packed) == pytest.approx(losses(plain), abs=1e-5)
    assert read_json(packed / "metrics.json")["padding_fraction"] == 0
    assert read_json(plain / "metrics.json")["padding_fraction"] > 0


def test_samples_are_written_on_the_way(run):
    folder = run(template=TWO, max_steps=4, sample_steps=2)
    lines = read_jsonl(folder / "samples.jsonl")
    assert {line["step"] for line in lines} == {0, 2, 4}
    assert {line["task"] for line in lines} == {"movie_reviews", "gsm8k"}


def test_training_stops_when_the_evaluation_loss_no_longer_falls(run):
    options = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1}
    options |= {"save_strategy": "steps", "save_steps": 2}
    folder = run(template=TWO, **options, early_stopping_patience=2)
    assert read_json(folder / "metrics.json")["steps"] < 40


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dataset": "DATA/reviews"}, "--dataset: goes with one task"),
        ({"columns": ["text=sentence"]}, "--columns text=sentence: of which task"),
        ({"columns": ["sst2.text=a"]}, "--columns sst2.text=a: there is no such task"),
        ({"template": TWO[:1] * 2}, "a task 'movie_reviews' is there; rename one"),
        ({"mixing": "much"}, "--mixing much: must be size, equal"),
    ],
)
def test_a_mistake_is_one_line(run, options, line):
    with pytest.raises(UserError) as error:
        run(**{"template": TWO, **options})
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_of_one_of_several_tasks_are_named_by_it(run, tmp_path):
    rows = [{"review": row["sentence"], "label": row["label"]} for row in REVIEWS]
    file = write_rows(tmp_path, renamed=rows) / "renamed.jsonl"
    columns = ["movie_reviews.text=review"]
    folder = run(template=[f"movie_reviews={file}", TWO[1]], columns=columns, max_steps=1)
    assert read_json(folder / "metrics.json")["tasks"]["movie_reviews"]["eval_rows"] == 2


def test_one_of_several_templates_answers_new_rows(run, tmp_path):
    run(template=TWO[:1], max_steps=1)  # whose template is not that of the next run
    run(template=TWO, max_steps=1)
    file = write_rows(tmp_path, asked=[{"sentence": "a fine film"}]) / "asked.jsonl"
    with pytest.raises(UserError, match="--template: the run has gsm8k, movie_reviews; name"):
        run(predict=file)
    folder = run(predict=file, template=["movie_reviews"])
    (answered,) = read_jsonl(folder / "predictions_asked.jsonl")
    assert answered["prediction"] in ("negative", "positive")
