"""What is asked for several draws, and what is made of the answers."""

import pytest
from scoring_process import encoder_for, outspoken_llama
from template_cases import CASES
from template_fields import ASK

from recipelib.data.demonstrations import Demonstrations
from recipelib.evaluation import answers
from recipelib.evaluation.answers import score_answers, vote
from recipelib.inference.generation import Written
from recipelib.prompts.template import PromptTemplate

MODEL = outspoken_llama()


def said(*pairs):
    return [text for text, _ in pairs], [Written(text or "", value) for text, value in pairs]


@pytest.mark.parametrize(
    ("pairs", "metric", "expected"),
    [
        ([("a", -9.0), ("b", -1.0), ("a", -8.0)], "exact_match", "a"),
        ([("a", -2.0), ("b", -1.0)], "exact_match", "b"),  # a tie: the likelier
        ([("a", -2.0), ("b", -5.0), ("b", -4.0), ("a", -9.0)], "exact_match", "a"),
        ([("18", -9.0), ("$18.00", -8.0), ("7", -1.0)], "numeric_match", "$18.00"),
        ([("The Rhine", -9.0), ("rhine.", -8.0), ("Spree", -1.0)], "squad", "rhine."),
        ([(None, -0.1), (None, -0.1), ("a", -9.0)], "exact_match", "a"),
        ([(None, -0.1), (None, -0.2)], "exact_match", None),
    ],
)
def test_the_majority_counts_and_of_equals_the_likeliest_sample(pairs, metric, expected):
    template = PromptTemplate({**ASK, "metric": metric})
    assert vote(*said(*pairs), template) == expected


def test_votes_are_for_classes_however_their_words_are_written():
    template = PromptTemplate.load("esnli")
    said = ["yes", "Yes", "YES", "no", "no"]
    written = [Written(text, -1.0) for text in said]
    assert template.read_label(vote(said, written, template)) == "entailment"
    unclear = ["unclear", "unclear", "yes"]
    assert vote(unclear, written[:3], template) == "yes"
    assert vote(unclear[:2], written[:2], template) is None


def draws_for(name: str, count: int, shots: int = 1):
    template, rows = PromptTemplate.load(name), CASES[name].rows
    pool = [{**row, "text": f"{row.get('text')} {n}"} for n in range(4) for row in rows]
    if name == "movie_reviews":
        pool = [{**row, "sentence": f"{row['sentence']} {n}"} for n in range(4) for row in rows]
    return [Demonstrations(template, pool, shots, "random", draw=draw) for draw in range(count)]


def written_by(monkeypatch, *texts: list[list[str]]):
    """Has answers written, call by call, instead of what the model would; gives the prompts."""
    calls, waiting = [], list(texts)

    def generate(model, tokenizer, prompts, **options):
        calls.append([tokenizer.decode(ids) for ids in prompts])
        texts = waiting.pop(0)
        assert len(texts) == len(prompts)
        return [[Written(text, -float(at)) for at, text in enumerate(some)] for some in texts]

    monkeypatch.setattr(answers, "generate", generate)
    return calls


def test_reasoning_that_a_trigger_began_is_led_to_an_answer(monkeypatch):
    encoder = encoder_for("gsm8k")
    (row, *_) = CASES["gsm8k"].rows
    gold = encoder.template.questions(row)[0].references[0]
    calls = written_by(monkeypatch, [[" First, count.\nQuestion: more?"]], [[f" {gold}."]])
    result = score_answers(MODEL, encoder, [row], [None], trigger="Step by step:")
    assert calls[0][0].endswith("Answer: Step by step:")
    assert calls[1][0] == f"{calls[0][0]} First, count.\nThe answer is"
    (record,) = result.draws[0].records
    assert record["generated"] == f" First, count.\nThe answer is {gold}."
    assert record["score"] == 1


def test_without_patterns_the_answer_is_what_comes_behind_the_lead(monkeypatch):
    encoder = encoder_for("movie_reviews")
    row = CASES["movie_reviews"].rows[0]
    calls = written_by(monkeypatch, [[" It is warm."]], [[" Positive."]])
    result = score_answers(MODEL, encoder, [row], [None], trigger="Hm:")
    assert calls[1][0].endswith(" Hm: It is warm.\nTherefore, the answer is")
    assert result.draws[0].records[0]["prediction"] == "positive"


@pytest.mark.parametrize(
    ("said", "prediction"),
    [
        (" positive. I would watch it again.\n\nThe movie", "positive"),
        (" surely NEGATIVE, not positive", "negative"),
        (" that it is unpositively so", None),
        (" open", None),
    ],
)
def test_behind_reasoning_the_first_label_word_is_the_answer(monkeypatch, said, prediction):
    encoder = encoder_for("movie_reviews")
    written_by(monkeypatch, [[" It is warm."]], [[said]])
    result = score_answers(MODEL, encoder, CASES["movie_reviews"].rows[:1], [None], trigger="Hm:")
    assert result.draws[0].records[0]["prediction"] == prediction


def test_samples_vote_and_are_all_kept(monkeypatch):
    encoder = encoder_for("gsm8k")
    row = CASES["gsm8k"].rows[0]
    gold = encoder.template.questions(row)[0].references[0]
    texts = [f" The answer is {gold}", " The answer is 5", f" The answer is {gold}.0"]
    written_by(monkeypatch, [texts])
    (record,) = score_answers(MODEL, encoder, [row], [None], samples=3).draws[0].records
    assert record["generated"] == texts
    assert record["score"] == 1
