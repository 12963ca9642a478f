"""A label's score from its words' scores."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.verbalizer import label_scores

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
