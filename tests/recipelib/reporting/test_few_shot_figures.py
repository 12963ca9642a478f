"""Intervals, figures of classes and confidences of an evaluation with demonstrations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from recipelib.reporting.few_shot import class_figures, confidences, interval


@pytest.mark.parametrize(
    ("right", "rows", "expected"),
    [  # statsmodels' proportion_confint(method="wilson")
        (8, 10, (0.4902, 0.9433)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (50, 100, (0.4038, 0.5962)),
        (1, 1, (0.2065, 1.0)),
    ],
)
@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "numeric_match"])
def test_the_interval_of_what_is_right_or_wrong_is_wilsons(metric, right, rows, expected):
    found = interval(metric, right / rows, math.nan, rows)  # it needs no standard error
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("metric", "score", "stderr", "expected"),
    [
        ("squad", 0.5, 0.1, (0.304, 0.696)),
        ("entity_f1", 0.95, 0.1, (0.754, 1.0)),
        ("macro_f1", 0.1, 0.1, (0.0, 0.296)),
        ("loss", 2.0, 0.5, (1.02, 2.98)),
        ("loss", 0.1, 0.5, (0.0, 1.08)),
        ("squad", 1.0, math.nan, (math.nan, math.nan)),  # a single row
    ],
)
def test_other_intervals_are_within_what_the_metric_can_be(metric, score, stderr, expected):
    found = interval(metric, score, stderr, 20)
    assert found == pytest.approx(expected, nan_ok=True)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 3),
)
def test_class_figures_are_scikit_learns_over_all_draws(pairs, draws):
    rng = np.random.default_rng(0)
    answers = [answer for answer, _ in pairs]
    records = []
    for _ in range(draws):  # other predictions for the same rows
        said = [pairs[place][1] for place in rng.permutation(len(pairs))]
        records += [
            {"row": row, "answer": answer, "prediction": one}
            for row, (answer, one) in enumerate(zip(answers, said, strict=True))
        ]
    found = class_figures(records, "abcd")  # of d there is none
    golds = [one["answer"] for one in records]
    said = [one["prediction"] or "" for one in records]
    expected = precision_recall_fscore_support(golds, said, labels=[*"abcd"], zero_division=0.0)
    for label, *figures in zip("abcd", *expected, strict=True):
        names = ("precision", "recall", "f1")
        assert [found[label][name] for name in names] == pytest.approx(figures[:3])
        assert found[label]["rows"] == answers.count(label)


def test_a_confidence_is_the_probability_of_what_that_way_of_scoring_predicts():
    # Not normalized, as sums of log-likelihoods are not.
    record = {
        "answer": "b",
        "prediction": "a",
        "predictions": {"sum": "a", "calibrated": "b"},
        "scores": {
            "sum": {"a": math.log(0.06), "b": math.log(0.03), "c": math.log(0.01)},
            "calibrated": {"a": -1000.0, "b": 0.0, "c": -math.inf},
        },
    }
    sure, right = confidences([record], "sum")
    assert (sure, right) == (pytest.approx([0.6]), [False])
    sure, right = confidences([record], "calibrated")
    assert (sure, right) == (pytest.approx([1.0]), [True])
