"""A task's score, against scores computed here by other means, for every kind of task."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scoring_process
import torch
from scoring_process import CASES, RENDERINGS, TOKENIZER, encoder_for, outspoken_llama

from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation import answers
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.evaluation.losses import score_losses
from recipelib.inference.generation import Written
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

MODEL = outspoken_llama()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def log_likelihood(prompt: list[int], answer: list[int]) -> float:
    logits = MODEL(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    where = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logits[where, answer].sum().item()


def greedy(prompt: list[int], new_tokens: int) -> str:
    ids = torch.tensor([prompt])
    end = TOKENIZER.eos_token_id
    written = MODEL.generate(
        ids, do_sample=False, max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=end
    )
    return TOKENIZER.decode(written[0, len(prompt) :], skip_special_tokens=True)


def written_by(monkeypatch, texts: list[str]) -> dict:
    """Has `texts` written instead of what the model would; gives what was asked for."""
    asked = {}

    def generate(model, tokenizer, prompts, **options):
        asked.update(options, prompts=[tokenizer.decode(ids) for ids in prompts])
        assert len(prompts) == len(texts)
        return [[Written(text, 0.0)] for text in texts]

    monkeypatch.setattr(answers, "generate", generate)
    return asked


# Labels ------------------------------------------------------------------------------------------

REVIEWS = PromptTemplate(
    {
        "name": "reviews",
        "form": "generative",
        "prompt": "A review: {{ text }}",
        "label": "label",
        "verbalizer": {"neg": ["bad", "really bad"], "pos": ["yes", "best"], "so": ["thin"]},
    }
)
TEXTS = ["a great film", "the story is thin", "nobody knows why", "the best one", "it is worse"]
ROWS = [
    {"text": text, "label": label}
    for text, label in zip(TEXTS, ["pos", "neg", "so", "neg", "pos"], strict=True)
]


def test_a_label_is_the_one_whose_words_are_likeliest_together():
    result = evaluate_task(MODEL, PromptEncoder(REVIEWS, TOKENIZER, 60), ROWS)
    right = []
    for number, (row, record) in enumerate(zip(ROWS, result.records, strict=True)):
        prompt = f"A review: {row['text']}"
        scores = {
            label: math.log(
                sum(math.exp(log_likelihood(encode(prompt), encode(f" {word}"))) for word in words)
            )
            for label, words in REVIEWS.verbalizer.items()
        }
        assert record["log_likelihoods"] == pytest.approx(scores, abs=1e-5)
        prediction = max(scores, key=scores.__getitem__)
        right.append(float(prediction == row["label"]))
        assert record["row"] == number
        assert record["prompt"] == prompt
        assert record["answer"] == row["label"]
        assert record["prediction"] == prediction
        assert record["score"] == right[-1]
    assert [one["prediction"] for one in result.records] == ["pos", "pos", "neg", "neg", "pos"]
    # Likelier together: of the second text's words "bad" alone is the likeliest.
    prompt = encode(f"A review: {TEXTS[1]}")
    assert log_likelihood(prompt, encode(" bad")) > log_likelihood(prompt, encode(" yes"))
    assert (result.metric, result.rows, result.left_out) == ("accuracy", 5, 0)
    assert result.score == pytest.approx(np.mean(right))
    assert result.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    assert result.seconds > 0
    said = f"accuracy {result.score:.3f} ± {result.stderr:.3f}"
    assert str(result) == f"{said} (5 rows; majority class 'neg': 0.400)"


def test_an_answer_that_begins_another_is_scored_with_its_end():
    fields = {**REVIEWS.fields, "verbalizer": {"a": ["insurance"], "b": ["insurance change"]}}
    encoder = PromptEncoder(PromptTemplate(fields), TOKENIZER, 60)
    (record,) = evaluate_task(MODEL, encoder, [{"text": "all people", "label": "a"}]).records
    end = TOKENIZER.eos_token_id
    for label, word in (("a", " insurance"), ("b", " insurance change")):
        expected = log_likelihood(encode("A review: all people"), [*encode(word), end])
        assert record["log_likelihoods"][label] == pytest.approx(expected, abs=1e-5)


def test_a_pair_is_asked_once_per_label_and_the_likeliest_yes_wins():
    template = PromptTemplate.load("next_sentence")
    rows = CASES["next_sentence"].rows
    result = evaluate_task(MODEL, PromptEncoder(template, TOKENIZER, 120), rows)
    for row, record in zip(rows, result.records, strict=True):
        scores = {}
        for label, words in template.verbalizer.items():
            prompt = encode(
                f"{row['text']}\nThis article is about {words[0]}.\n"
                "Does the last sentence fit the article, yes or no?\nAnswer:"
            )
            yes, no = (log_likelihood(prompt, encode(word)) for word in (" yes", " no"))
            scores[label] = yes - no
        assert record["scores"] == pytest.approx(scores, abs=2e-5)
        assert record["prediction"] == max(scores, key=scores.__getitem__)
        assert record["answer"] == row["label"]
        assert len(record["prompt"]) == len(scores)


def test_a_chat_scores_the_stripped_word_behind_the_generation_prompt():
    encoder = PromptEncoder(REVIEWS, TOKENIZER, 80, "chat")
    (record,) = evaluate_task(MODEL, encoder, ROWS[:1]).records
    turns = [{"role": "user", "content": "A review: a great film"}]
    prompt = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert record["prompt"] == TOKENIZER.decode(prompt)
    expected = log_likelihood(prompt, encode("thin"))
    assert record["log_likelihoods"]["so"] == pytest.approx(expected, abs=1e-5)


# Written answers ---------------------------------------------------------------------------------

QUESTIONS = PromptTemplate(
    {
        "name": "questions",
        "form": "generative",
        "prompt": "Question: {{ question }}\nAnswer:",
        "answer": " {{ answer }}",
    }
)


def test_free_text_is_generated_greedily_and_compared_with_the_gold_answer():
    prompts = [f"Question: {text}\nAnswer:" for text in TEXTS]
    written = [greedy(encode(prompt), 6) for prompt in prompts]
    rows = [{"question": text, "answer": "no such thing"} for text in TEXTS]
    rows[2]["answer"] = written[2].strip()
    encoder = PromptEncoder(QUESTIONS, TOKENIZER, 60)
    result = evaluate_task(MODEL, encoder, rows, max_new_tokens=6, batch_tokens=70)
    assert [record["generated"] for record in result.records] == written
    assert [record["prompt"] for record in result.records] == prompts
    for number, record in enumerate(result.records):
        assert record["prediction"] == written[number].strip()
        assert record["answer"] == [rows[number]["answer"]]
        assert record["score"] == float(number == 2)
    assert result.score == pytest.approx(0.2)


def test_generation_gets_the_end_the_stops_and_the_limits_that_the_task_names(monkeypatch):
    template = PromptTemplate({**QUESTIONS.fields, "stop": ["\nQuestion:"]})
    asked = written_by(monkeypatch, [" yes it is\nQuestion: no"])
    encoder = PromptEncoder(template, TOKENIZER, 80, "chat")
    row = {"question": "Is it?", "answer": "yes it is"}
    result = evaluate_task(MODEL, encoder, [row], max_new_tokens=5, batch_tokens=99)
    assert result.score == 1
    assert asked["end_ids"] == {TOKENIZER.convert_tokens_to_ids("<|im_end|>")}
    assert (asked["stop"], asked["max_new_tokens"]) == (["\nQuestion:"], 5)
    assert asked["batch_tokens"] == 99


def test_a_question_without_room_for_the_longest_answer_is_left_out():
    encoder = PromptEncoder(QUESTIONS, TOKENIZER, 40)
    row = {"question": "Is it?", "answer": "yes"}
    assert evaluate_task(MODEL, encoder, [row, row], max_new_tokens=4).rows == 2
    long = {**row, "question": "Is it? " * 9}
    assert evaluate_task(MODEL, encoder, [row, long], max_new_tokens=4).left_out == 1
    nothing = evaluate_task(MODEL, encoder, [row, row], max_new_tokens=35, answers=False)
    assert (nothing.rows, nothing.left_out, nothing.records) == (0, 2, [])
    assert math.isnan(nothing.score)
    assert math.isnan(nothing.stderr)


def test_a_span_scores_by_all_gold_answers(monkeypatch):
    template = PromptTemplate.load("squad")
    rows = CASES["squad"].rows
    written_by(monkeypatch, [" the Ada wrote.\nmore", " costs 1", " Rhein"])
    result = evaluate_task(MODEL, PromptEncoder(template, TOKENIZER, 300), rows)
    assert [one["prediction"] for one in result.records] == ["the Ada wrote.", "costs 1", "Rhein"]
    assert [one["answer"] for one in result.records] == [["Ada", "Ada wrote"], ["1"], ["Spree»."]]
    assert [one["score"] for one in result.records] == pytest.approx([1, 2 / 3, 0])
    assert result.score == pytest.approx(5 / 9)
    assert result.details == {"exact_match": pytest.approx(1 / 3)}


def test_entities_are_asked_by_type_and_scored_as_pairs_of_type_and_text(monkeypatch):
    template = PromptTemplate.load("wnut17")
    rows = CASES["wnut17"].rows[:2]
    names = list(template.entity_spans["types"])
    said = [dict.fromkeys(names, " none") for _ in rows]
    said[0] |= {"location": " Paris", "person": " Hilton || Ed Lee || Paris\nText:"}
    said[1] |= {"location": " Rome", "product": " M&amp;M ,"}
    written_by(monkeypatch, [texts[name] for texts in said for name in names])
    result = evaluate_task(MODEL, PromptEncoder(template, TOKENIZER, 400), rows)
    first, second = result.records
    people = ["person", "Hilton"], ["person", "Ed Lee"]
    assert first["answer"] == [["location", "Paris"], *people]
    assert first["prediction"] == [["location", "Paris"], *people, ["person", "Paris"]]
    assert second["prediction"] == [["location", "Rome"], ["product", "M&amp;M ,"]]
    # Hits 3 and 2, said 4 and 2, gold 3 and 3.
    assert [first["score"], second["score"]] == pytest.approx([6 / 7, 4 / 5])
    assert result.score == pytest.approx(2 * 5 / (6 + 6))
    assert result.details == pytest.approx({"precision": 5 / 6, "recall": 5 / 6})
    assert (len(first["prompt"]), len(first["generated"])) == (len(names), len(names))


def test_a_label_behind_a_rationale_is_read_from_what_is_written(monkeypatch):
    template = PromptTemplate.load("esnli")
    rows = CASES["esnli"].rows
    written_by(
        monkeypatch,
        [" A beach is no house.\nThe answer is yes", " Because.\nThe answer is maybe", " Hm"],
    )
    result = evaluate_task(MODEL, PromptEncoder(template, TOKENIZER, 400), rows)
    assert [one["prediction"] for one in result.records] == ["entailment", "neutral", None]
    assert [one["answer"] for one in result.records] == ["entailment", "contradiction", "neutral"]
    assert [one["score"] for one in result.records] == [1, 0, 0]
    assert result.score == pytest.approx(1 / 3)


# Loss --------------------------------------------------------------------------------------------


def mean_loss(examples: list[dict]) -> float:
    """The trainer's mean: over all supervised tokens of all rows, by the model's own loss."""
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            loss = MODEL(**{key: torch.tensor([ids]) for key, ids in example.items()}).loss
        supervised = sum(label != -100 for label in example["labels"])
        total, count = total + loss.item() * supervised, count + supervised
    return total / count


def test_the_loss_is_the_one_that_training_sees_on_the_same_rows():
    encoder = encoder_for("alpaca")
    rows = CASES["alpaca"].rows
    examples = []
    for row in rows:
        (question,) = encoder.template.questions(row)
        ids, labels, _ = encoder.training_example(question)
        examples.append({"input_ids": ids, "labels": labels})
    result = evaluate_task(MODEL, encoder, rows)
    assert (result.metric, result.rows) == ("loss", 3)
    assert result.score == pytest.approx(mean_loss(examples), abs=1e-5)
    for record, example in zip(result.records, examples, strict=True):
        assert record["score"] == pytest.approx(mean_loss([example]), abs=1e-5)
        supervised = [label for label in example["labels"] if label != -100]
        assert record["answer"] == TOKENIZER.decode(supervised)
        assert record["prompt"] + record["answer"] == TOKENIZER.decode(example["input_ids"])


def test_the_loss_of_a_conversation_counts_every_answer_in_it(capsys):
    encoder = encoder_for("conversations")
    turn = [
        {"role": "user", "content": "who wrote the book?"},
        {"role": "assistant", "content": "the teacher"},
    ]
    rows = [{"messages": turn * 3}, {"messages": turn}]
    ids = TOKENIZER.apply_chat_template(turn * 3)["input_ids"][:-1]  # the newline is not trained
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    answer = [*encode("the teacher"), end]
    labels = [-100] * len(ids)
    for start in range(len(ids)):
        if ids[start : start + len(answer)] == answer:
            labels[start : start + len(answer)] = answer
    length = len(TOKENIZER.apply_chat_template(turn)["input_ids"]) - 1
    examples = [
        {"input_ids": ids, "labels": labels},
        {"input_ids": ids[:length], "labels": labels[:length]},
    ]
    result = evaluate_task(MODEL, encoder, rows, description="scoring")
    assert "2/2" in capsys.readouterr().err.rpartition("scoring: prompts: ")[2]  # a bar of its own
    assert result.score == pytest.approx(mean_loss(examples), abs=1e-5)
    assert [record["row"] for record in result.records] == [0, 0, 0, 1]
    assert result.rows == 2


def test_the_error_of_a_loss_is_that_of_a_mean_where_answers_are_equally_long():
    encoder = PromptEncoder(PromptTemplate({**QUESTIONS.fields, "metric": "loss"}), TOKENIZER, 60)
    rows = [{"question": text, "answer": "yes"} for text in TEXTS]
    result = evaluate_task(MODEL, encoder, rows)
    each = [record["score"] for record in result.records]
    assert result.stderr == pytest.approx(np.std(each, ddof=1) / math.sqrt(5))
    assert math.isnan(evaluate_task(MODEL, encoder, rows[:1]).stderr)


# Left out, and without answers -------------------------------------------------------------------


@pytest.mark.parametrize("template", ["label", "text", "loss"])
def test_rows_that_do_not_fit_are_left_out_and_counted(template):
    long = "the story is thin, the music is worse " * 9
    if template == "label":
        fields, rows = REVIEWS.fields, [dict(row) for row in ROWS]
        rows[1]["text"] = long
    else:
        fields = {**QUESTIONS.fields, **({"metric": "loss"} if template == "loss" else {})}
        rows = [{"question": text, "answer": "yes"} for text in TEXTS]
        rows[1]["question"] = long
    encoder = PromptEncoder(PromptTemplate(fields), TOKENIZER, 45)
    result = evaluate_task(MODEL, encoder, rows, max_new_tokens=4)
    assert (result.rows, result.left_out) == (4, 1)
    assert [record["row"] for record in result.records] == [0, 2, 3, 4]
    with pytest.raises(UserError, match=r"--max_length 45: no evaluation row of \w+ fits") as error:
        evaluate_task(MODEL, encoder, rows[1:2], max_new_tokens=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["movie_reviews", "next_sentence", "alpaca", "squad", "wnut17"])
def test_rows_without_answers_get_the_same_predictions_and_no_score(name):
    encoder = encoder_for(name)
    rows = CASES[name].rows
    unknown = encoder.template.answer_variables - {"context"}
    hidden = {encoder.template.column(variable) for variable in unknown}
    bare = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    assert all(len(less) < len(row) for less, row in zip(bare, rows, strict=True))
    result = evaluate_task(MODEL, encoder, bare, answers=False, max_new_tokens=8)
    assert (result.rows, result.left_out) == (3, 0)
    assert math.isnan(result.score)
    assert [record["score"] for record in result.records] == [None] * 3
    if encoder.template.metric != "loss":
        scored = evaluate_task(MODEL, encoder, rows, max_new_tokens=8)
        predictions = [record["prediction"] for record in scored.records]
        assert [record["prediction"] for record in result.records] == predictions
    assert not any(record["answer"] for record in result.records)


def test_of_conversations_the_next_turn_is_written_and_no_answer_compared():
    encoder = encoder_for("conversations")
    rows = CASES["conversations"].rows[:1]
    asked = [{**row, "messages": row["messages"][:-1]} for row in rows]
    known, unknown = (
        evaluate_task(MODEL, encoder, some, answers=False, max_new_tokens=4).records
        for some in (rows, asked)
    )
    for one, other, row in zip(known, unknown, rows, strict=True):
        assert (one["prompt"], one["generated"]) == (other["prompt"], other["generated"])
        assert (one["answer"], other["answer"]) == ([row["messages"][-1]["content"]], [])
    fields = {**encoder.template.fields, "metric": "exact_match"}
    with pytest.raises(UserError, match="messages: conversations are scored by their loss; write"):
        evaluate_task(MODEL, encoder.with_template(PromptTemplate(fields)), rows)


# Several processes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_each_row_once_in_order_with_the_same_scores(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, scoring_process.__file__, str(tmp_path)]
    second = subprocess.Popen(command, env=environment)
    try:
        alone = scoring_process.score_all()
        together = [scoring_process.score_as_one_of_two(tmp_path, rank=0)]
        assert second.wait(60) == 0
    finally:
        second.kill()
    together.append(json.loads((tmp_path / "records.json").read_text()))
    assert set(alone) == {f"{name}, {size}" for name in RENDERINGS for size in ("odd", "one")}
    for process in together:
        for case, expected in alone.items():
            found = process[case]
            for one, other in zip(found["records"], expected["records"], strict=True):
                for key, value in other.items():
                    close = pytest.approx(value, abs=1e-5)
                    assert one[key] == (
                        close if key in ("score", "scores", "log_likelihoods") else value
                    )
    for case, expected in alone.items():
        passes = [process[case]["passes"] for process in together]
        assert max(passes) <= expected["passes"], case
        if case == "movie_reviews, one":  # the other process has nothing to do
            assert sorted(passes) == [0, 1]
    assert max(one["passes"] for one in alone.values()) > 4


# Losses


def test_losses_are_taken_behind_demonstrations():
    encoder = encoder_for("alpaca")
    rows = CASES["alpaca"].rows

    def shown(number, row):
        return [("### Instruction:\nname a color\n\n### Response:", "\nred")]

    plain, behind = score_losses(MODEL, encoder, rows, [None, shown]).draws
    assert plain.score != pytest.approx(behind.score, abs=1e-3)
    for one, other in zip(plain.records, behind.records, strict=True):
        assert one["answer"] == other["answer"]
        assert "name a color" in other["prompt"]
