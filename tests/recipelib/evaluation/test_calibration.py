"""Every way of scoring candidates is the formula of its paper, and calibration mends a bias."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipelib.evaluation.calibration import Word, candidate_scores, pair_scores, probabilities

INF = math.inf


def likelihoods(**labels):
    """Words of one token each, by label, from their probabilities."""
    return {label: [Word(math.log(value), 1, 4)] for label, value in labels.items()}


def winner(scores):
    return max(scores, key=scores.__getitem__)


@st.composite
def drawn_words(draw, shape):
    """Likelihoods for as many words of each label as `shape` says."""
    values = st.floats(-40, 0)
    word = st.builds(Word, values, st.integers(1, 6), st.integers(1, 30))
    return {
        label: draw(st.lists(word, min_size=count, max_size=count))
        for label, count in shape.items()
    }


@st.composite
def drawn_rows(draw):
    counts = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    shape = {f"label {number}": count for number, count in enumerate(counts)}
    free = draw(st.lists(drawn_words(shape), min_size=1, max_size=3))
    return draw(drawn_words(shape)), free, draw(drawn_words(shape))


def sums_of(words):
    """[labels] probabilities that any of a label's words is the answer."""
    return np.array(
        [np.exp([word.log_likelihood for word in some]).sum() for some in words.values()]
    )


@given(drawn_rows())
def test_each_kind_is_its_formula(row):
    words, free, alone = row

    scores = candidate_scores(words, free, alone)

    def best(length):
        return [max(w.log_likelihood / getattr(w, length) for w in some) for some in words.values()]

    # Zhao et al. 2021: W = diag(p_cf)^-1, p_cf the mean of the normalized probabilities.
    prior = np.mean([sums_of(one) / sums_of(one).sum() for one in free], axis=0)
    calibrated = sums_of(words) / sums_of(words).sum() / prior
    expected = {
        "sum": np.log(sums_of(words)),
        "mean": best("tokens"),
        "bytes": best("bytes"),
        "pmi": np.log(sums_of(words)) - np.log(sums_of(alone)),
        "calibrated": np.log(calibrated / calibrated.sum()),
    }
    assert list(scores) == list(expected)
    for kind, values in scores.items():
        assert list(values) == list(words)
        assert list(values.values()) == pytest.approx(list(expected[kind]), abs=1e-9)


@given(drawn_rows(), st.floats(-30, 30))
def test_calibration_does_not_depend_on_how_likely_the_labels_are_together(row, shift):
    words, free, _ = row
    moved = {
        label: [word._replace(log_likelihood=word.log_likelihood + shift) for word in some]
        for label, some in words.items()
    }

    one, other = (candidate_scores(some, free)["calibrated"] for some in (words, moved))

    assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-9)


def test_what_is_not_given_is_left_out():
    words = likelihoods(good=0.3, bad=0.1)

    assert list(candidate_scores(words)) == ["sum", "mean", "bytes"]
    assert list(candidate_scores(words, [words])) == ["sum", "mean", "bytes", "calibrated"]
    assert list(candidate_scores(words, alone=words)) == ["sum", "mean", "bytes", "pmi"]


def test_a_model_that_always_says_one_label_is_mended():
    """A model whose prompts make "good" nine times as likely, whatever is asked."""
    evidence = {"good": [0.8, 0.7, 0.6, 0.9], "bad": [0.2, 0.3, 0.4, 0.25]}
    free = [likelihoods(good=0.9 * 0.5, bad=0.1 * 0.5), likelihoods(good=0.18, bad=0.02)]
    found = {kind: [] for kind in ("sum", "mean", "bytes", "pmi", "calibrated")}
    for label, some in evidence.items():
        for good in some:
            words = likelihoods(good=0.9 * good, bad=0.1 * (1 - good))
            scores = candidate_scores(words, free, free[0])
            for kind, values in scores.items():
                found[kind].append((label, winner(values)))

    for kind in ("sum", "mean", "bytes"):
        assert {said for _, said in found[kind]} == {"good"}
    for kind in ("pmi", "calibrated"):
        assert all(label == said for label, said in found[kind])


def test_a_prompt_that_says_as_much_as_none_is_undecided():
    free = likelihoods(good=0.27, bad=0.03)

    scores = candidate_scores(likelihoods(good=0.9, bad=0.1), [free])

    assert probabilities(scores["sum"]) == pytest.approx({"good": 0.9, "bad": 0.1})
    assert probabilities(scores["calibrated"]) == pytest.approx({"good": 0.5, "bad": 0.5})


def test_the_mean_over_prompts_without_content_is_one_of_probabilities():
    free = [likelihoods(good=0.9, bad=0.1), likelihoods(good=0.05, bad=0.05)]

    scores = candidate_scores(likelihoods(good=0.35, bad=0.15), free)

    odds = (0.7 / np.mean([0.9, 0.5])) / (0.3 / np.mean([0.1, 0.5]))
    assert probabilities(scores["calibrated"])["good"] == pytest.approx(odds / (1 + odds))


def test_long_words_win_by_their_length_only_where_it_counts():
    words = {"short": [Word(-3.0, 1, 4)], "long": [Word(-6.0, 3, 6)]}

    scores = candidate_scores(words)

    assert [winner(scores[kind]) for kind in ("sum", "mean", "bytes")] == ["short", "long", "short"]
    assert scores["mean"] == {"short": -3.0, "long": -2.0}
    assert scores["bytes"] == {"short": -0.75, "long": -1.0}


def test_of_a_pair_per_candidate_yes_leads_by_its_difference_in_every_kind():
    words, free = likelihoods(yes=0.2, no=0.6), likelihoods(yes=0.1, no=0.8)
    scores = candidate_scores(words, [free], free)

    found = pair_scores(scores)

    assert found == pytest.approx(
        {
            "sum": math.log(0.2 / 0.6),
            "mean": math.log(0.2 / 0.6),
            "bytes": math.log(0.2 / 0.6) / 4,
            "pmi": math.log(0.2 / 0.6) - math.log(0.1 / 0.8),
            "calibrated": math.log(0.2 / 0.6) - math.log(0.1 / 0.8),
        }
    )


# Impossible words


@pytest.mark.parametrize("prior", [-INF, -1.0])
def test_what_is_impossible_stays_so_whatever_it_is_compared_with(prior):
    words = {"good": [Word(-2.0, 1, 1)], "bad": [Word(-INF, 2, 3), Word(-INF, 1, 1)]}
    free = {"good": [Word(-1.0, 1, 1)], "bad": [Word(prior, 2, 3), Word(-INF, 1, 1)]}

    scores = candidate_scores(words, [free], free)

    assert {kind: values["bad"] for kind, values in scores.items()} == dict.fromkeys(scores, -INF)
    assert scores["calibrated"]["good"] == 0.0
    assert scores["pmi"]["good"] == -1.0
    assert pair_scores({"sum": {"yes": -INF, "no": -INF}}) == {"sum": -INF}


def test_what_only_a_prompt_with_content_makes_possible_wins():
    words = {"good": [Word(-1.0, 1, 1)], "bad": [Word(-9.0, 1, 1)]}
    free = {"good": [Word(-1.0, 1, 1)], "bad": [Word(-INF, 1, 1)]}

    scores = candidate_scores(words, [free], free)

    assert winner(scores["pmi"]) == winner(scores["calibrated"]) == "bad"
    assert scores["calibrated"] == {"good": -INF, "bad": 0.0}


def test_where_no_label_is_possible_all_are_equally_likely():
    words = {label: [Word(-INF, 1, 1)] for label in "abcd"}

    scores = candidate_scores(words, [words], words)

    assert set(scores["sum"].values()) == set(scores["pmi"].values()) == {-INF}
    assert probabilities(scores["calibrated"]) == pytest.approx(dict.fromkeys("abcd", 0.25))
    assert probabilities(scores["sum"]) == pytest.approx(dict.fromkeys("abcd", 0.25))


@given(st.dictionaries(st.text(max_size=3), st.floats(-700, 700), min_size=1, max_size=5))
def test_probabilities_sum_to_one_in_the_order_of_the_scores(scores):
    found = probabilities(scores)

    assert sum(found.values()) == pytest.approx(1)
    assert found[winner(scores)] == max(found.values())
    for label, value in scores.items():
        ratio = math.exp(value - max(scores.values()))
        assert found[label] / max(found.values()) == pytest.approx(ratio, abs=1e-12)
