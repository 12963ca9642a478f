"""A label's score from its words' scores."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipelib.prompts.verbalizer import COMBINE, combine_words, label_scores

scores = st.lists(st.floats(-700, 0), min_size=1, max_size=5)


@given(words=st.dictionaries(st.text(min_size=1), scores, min_size=1, max_size=4))
def test_a_label_is_as_likely_as_any_of_its_words_together(words):
    found = label_scores(words)
    assert list(found) == list(words)
    for label, values in words.items():
        expected = math.fsum(math.exp(value) for value in values)
        assert math.exp(found[label]) == pytest.approx(expected, rel=1e-9)


def test_a_single_word_is_its_label_and_a_second_as_likely_doubles_it():
    assert label_scores({"one": [-3.25]}) == {"one": -3.25}
    assert label_scores({"two": [-3.0, -3.0]})["two"] == pytest.approx(-3 + math.log(2))


def test_scores_too_low_for_exp_are_still_told_apart():
    found = label_scores({"low": [-5000.0, -5001.0], "lower": [-5002.0, -5001.5]})
    assert found["low"] == pytest.approx(-5000 + math.log(1 + math.exp(-1)))
    assert found["low"] > found["lower"] > -5002


def test_an_impossible_word_adds_nothing_and_only_impossible_words_are_impossible():
    never = -math.inf
    assert label_scores({"a": [never, -2.0], "b": [never, never]}) == {"a": -2.0, "b": never}


# Tensors of scores

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/openprompt_verbalizer.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_labels_score_as_in_openprompt(name):
    case = GOLDEN[name]  # made by tests/golden/openprompt_verbalizer.py
    tokens = [token for some in case["words"].values() for token in some]
    labels = torch.tensor([n for n, some in enumerate(case["words"].values()) for _ in some])
    words = torch.tensor(case["logits"]).log_softmax(-1)[:, tokens]
    free = torch.tensor(case["content_free"]).log_softmax(-1)[tokens]
    for key, content_free in (("plain", None), ("calibrated", free)):
        found = combine_words(words, labels, "mean", content_free)
        assert torch.allclose(found, torch.tensor(case[key]), atol=1e-5), key


@given(
    values=st.lists(st.floats(-50, 0), min_size=4, max_size=4),
    shift=st.floats(-100, 100),
    combine=st.sampled_from(COMBINE),
)
def test_only_differences_between_words_count(values, shift, combine):
    labels = torch.tensor([0, 0, 1, 1])
    one, other = (torch.tensor([[v + s for v in values]]).double() for s in (0, shift))
    found = combine_words(one, labels, combine)
    assert torch.allclose(found, combine_words(other, labels, combine), atol=1e-9)


def test_words_are_combined_as_the_name_says():
    words = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    labels = torch.tensor([0, 0, 1, 1])
    expected = {
        "logsumexp": [0.75, 0.25],
        "mean": [0.125**0.5, 0.125],
        "max": [0.5, 0.125],
    }
    for combine in COMBINE:
        found = combine_words(words, labels, combine).exp()[0]
        assert found.tolist() == pytest.approx(expected[combine])
    # The words of a label need not stand side by side.
    mixed = combine_words(words[:, [0, 2, 1, 3]], labels[[0, 2, 1, 3]], "max").exp()[0]
    assert mixed.tolist() == pytest.approx(expected["max"])


# What a tokenizer makes of the words
