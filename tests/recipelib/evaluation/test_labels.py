"""What is asked to choose a label by its likelihood, and what is made of it."""

import pytest
from scoring_process import TOKENIZER, encoder_for, outspoken_llama
from template_cases import CASES

from recipelib.data.demonstrations import Demonstrations
from recipelib.encoding.asking import CausalAsker
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation import labels
from recipelib.evaluation.labels import score_labels
from recipelib.prompts.template import PromptTemplate

MODEL = outspoken_llama()


def draws_for(name: str, count: int, shots: int = 1):
    template, rows = PromptTemplate.load(name), CASES[name].rows
    pool = [{**row, "text": f"{row.get('text')} {n}"} for n in range(4) for row in rows]
    if name == "movie_reviews":
        pool = [{**row, "sentence": f"{row['sentence']} {n}"} for n in range(4) for row in rows]
    return [Demonstrations(template, pool, shots, "random", draw=draw) for draw in range(count)]


def test_what_draws_and_rows_have_in_common_is_asked_once(monkeypatch):
    encoder = PromptEncoder(PromptTemplate.load("movie_reviews"), TOKENIZER, 1000)
    asker = CausalAsker(encoder)
    asked = []

    def likelihoods(model, requests, **options):
        asked.extend(requests)
        return [[-1.0] * len(continuations) for _, continuations in requests]

    monkeypatch.setattr(labels, "log_likelihoods", likelihoods)
    rows = [{"sentence": f"a fine film {number}", "label": "positive"} for number in range(3)]
    result = score_labels(MODEL, asker, rows, draws_for("movie_reviews", 2, shots=3))
    # For each draw three rows and two inputs without content; once the input without anything.
    assert len(asked) == 2 * (3 + 2) + 1
    assert len({str(one) for one in asked}) == len(asked)
    assert [len(one.records) for one in result.draws] == [3, 3]
    assert [one["draw"] for draw in result.draws for one in draw.records] == [0] * 3 + [1] * 3


def test_every_way_of_scoring_is_measured_for_every_draw():
    encoder = encoder_for("movie_reviews")
    result = score_labels(
        MODEL, CausalAsker(encoder), CASES["movie_reviews"].rows, draws_for("movie_reviews", 2)
    )
    for kind, scores in result.by_score.items():
        for score, draw in zip(scores, result.draws, strict=True):
            right = [one["predictions"][kind] == one["answer"] for one in draw.records]
            assert score == pytest.approx(sum(right) / 3)
    assert set(result.by_score) == {"sum", "mean", "bytes", "pmi", "calibrated"}


def test_a_pair_that_is_asked_per_word_is_won_by_the_surest_yes():
    encoder = encoder_for("next_sentence")
    rows = CASES["next_sentence"].rows
    result = score_labels(MODEL, CausalAsker(encoder), rows, [None])
    for one in result.draws[0].records:
        assert len(one["prompt"]) == len(encoder.template.verbalizer)
        assert set(one["scores"]["calibrated"]) == set(encoder.template.verbalizer)
