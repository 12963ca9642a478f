"""A probe says what a plain scikit-learn pipeline says, a column per class, from the seed alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from recipelib.probes.probe import KINDS, fit_probe
from recipelib.runtime import UserError

ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
NAMES = ("ham", "spam", "eggs", "tea")


def rows(count, classes, width=12, seed=0):
    """[count, width] float32 features, whose dimensions differ in place and size as those of a
    language model do, and labels that they tell with some noise.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = np.random.default_rng(99).normal(size=(classes, width))
    features = 1.2 * centers[labels] + random.normal(size=(count, width))
    place, size = np.linspace(-50, 50, width), np.geomspace(0.01, 100, width)
    return (features * size + place).astype(np.float32), labels


def fit(kind, classes=3, count=90, seed=0, **options):
    features, labels = rows(count, classes, **options)
    return fit_probe(kind, features, labels, NAMES[:classes], seed)


def pipeline(kind):
    options = dict(KINDS[kind])
    model = {
        "logistic": lambda: LogisticRegression(**options),
        "svm": lambda: LinearSVC(dual=False, **options),
        "neighbors": lambda: KNeighborsClassifier(**options),
        "boosting": lambda: HistGradientBoostingClassifier(
            early_stopping=False, random_state=7, **options
        ),
    }[kind]()
    return make_pipeline(StandardScaler(), model)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mlp"])
def test_predictions_and_scores_are_scikit_learns(kind, classes):
    features, labels = rows(90, classes)
    asked, _ = rows(60, classes, seed=1)
    naive = pipeline(kind).fit(features.astype(float), labels)

    found = fit_probe(kind, features, labels, NAMES[:classes], seed=7).scores(asked)

    assert found.shape == (60, classes)
    assert (found.argmax(1) == naive.predict(asked.astype(float))).all()
    if kind == "svm":
        expected = naive.decision_function(asked.astype(float))
        expected = np.stack([-expected, expected], 1) if classes == 2 else expected
        assert found == pytest.approx(expected, abs=1e-9)
    else:
        assert np.exp(found) == pytest.approx(naive.predict_proba(asked.astype(float)), abs=1e-9)


def test_the_scores_of_an_mlp_are_those_of_its_layers():
    probe = fit("mlp")
    asked, _ = rows(20, 3, seed=1)
    tensors = {name: torch.from_numpy(value).double() for name, value in probe.tensors.items()}
    inputs = (torch.from_numpy(asked).double() - tensors["mean"]) / tensors["scale"]
    layer = torch.nn.functional.linear
    hidden = layer(inputs, tensors["hidden_weight"], tensors["hidden_bias"]).relu()

    expected = layer(hidden, tensors["weight"], tensors["bias"]).log_softmax(-1)

    assert probe.scores(asked) == pytest.approx(expected.numpy(), abs=1e-9)


@ALL_KINDS
@pytest.mark.parametrize("classes", [2, 4])
def test_what_the_features_tell_is_learned(kind, classes):
    asked, labels = rows(200, classes, seed=1)

    scores = fit(kind, classes, count=200).scores(asked)

    assert (scores.argmax(1) == labels).mean() > 0.8


@ALL_KINDS
def test_all_but_the_svm_score_by_log_probabilities(kind):
    scores = fit(kind).scores(rows(30, 3, seed=1)[0])

    sums = np.exp(scores).sum(1)
    assert (sums == pytest.approx(np.ones(30))) == (kind != "svm")


# Standardization


@ALL_KINDS
@settings(max_examples=4)
@given(st.lists(st.integers(-20, 20), min_size=12, max_size=12))
def test_the_unit_of_a_feature_does_not_matter(kind, powers):
    (features, labels), (asked, _) = rows(24, 2), rows(10, 2, seed=1)
    units = 2.0 ** np.array(powers)  # which change no digit

    found = fit_probe(kind, features * units, labels, NAMES[:2], 0).scores(asked * units)

    assert (found == fit(kind, 2, count=24).scores(asked)).all()


@pytest.mark.parametrize("kind", ["logistic", "svm", "neighbors"])
def test_the_origin_of_a_feature_does_not_matter(kind):
    (features, labels), (asked, _) = rows(24, 2), rows(10, 2, seed=1)
    origin = np.linspace(-9, 9, 12)

    found = fit_probe(kind, features + origin, labels, NAMES[:2], 0).scores(asked + origin)

    assert found == pytest.approx(fit(kind, 2, count=24).scores(asked), abs=1e-6)


@ALL_KINDS
def test_a_feature_that_never_changes_does_no_harm(kind):
    features, labels = rows(40, 2)
    features[:, 3] = 1e6

    found = fit_probe(kind, features, labels, NAMES[:2], 0).scores(features)

    assert not np.isnan(found).any()
    assert (found.argmax(1) == labels).mean() > 0.8


# Classes


@ALL_KINDS
def test_a_class_without_training_rows_keeps_its_column_and_is_never_predicted(kind):
    features, labels = rows(60, 2)
    numbers = np.array([0, 2])[labels]
    two = fit_probe(kind, features, labels, ("ham", "eggs"), 0).scores(features)

    found = fit_probe(kind, features, numbers, NAMES, 0).scores(features)

    assert (found[:, [0, 2]] == two).all()
    assert (found[:, [1, 3]] == -np.inf).all()


@pytest.mark.parametrize(
    ("labels", "says"), [([1] * 8, "all 8 are 'spam'"), ([], "there are none")]
)
@ALL_KINDS
def test_rows_of_one_class_are_refused_in_one_line(kind, labels, says):
    features, _ = rows(8, 2)

    with pytest.raises(UserError, match=f"^training rows: {says}; .*two classes$"):
        fit_probe(kind, features[: len(labels)], labels, NAMES, 0)


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match=r"^probe forest: .*svm, boosting, neighbors, mlp"):
        fit("forest")


# Rows


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_counted_and_refused(value):
    features, labels = rows(20, 2)
    probe = fit_probe("svm", features, labels, NAMES[:2], 0)
    features[3, 1] = features[3, 2] = features[11, 0] = value

    for use in (
        lambda: fit_probe("svm", features, labels, NAMES[:2], 0),
        lambda: probe.scores(features),
    ):
        with pytest.raises(UserError, match=r"^features: 2 of 20 rows hold NaN or infinity; "):
            use()


def test_features_of_another_width_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^features: 5 wide, where the probe was trained on 12; "):
        fit("logistic").scores(np.zeros((2, 5)))


@ALL_KINDS
def test_two_rows_are_enough_and_no_rows_get_no_scores(kind):
    probe = fit(kind, classes=2, count=2)

    assert probe.scores(rows(4, 2)[0]).shape == (4, 2)
    assert probe.scores(np.zeros((0, 12))).shape == (0, 2)


def test_more_neighbors_than_rows_are_all_of_them():
    probe = fit("neighbors", classes=2, count=4)

    assert probe.hyperparameters["n_neighbors"] == 4
    assert np.isfinite(probe.scores(rows(20, 2, seed=1)[0])).all()


# The same again


@ALL_KINDS
def test_the_same_seed_gives_the_same_probe_over_any_number_of_threads(kind):
    asked, _ = rows(30, 3, seed=1)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            torch.manual_seed(number)  # whatever was drawn before
            np.random.seed(number)
            found.append(fit(kind).scores(asked))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)

    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("kind", ["boosting", "mlp"])
def test_another_seed_gives_another_probe(kind):
    asked, _ = rows(30, 3, seed=1)

    assert (fit(kind, seed=0).scores(asked) != fit(kind, seed=1).scores(asked)).any()


def test_the_callers_random_numbers_go_on_as_if_nothing_was_fitted():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    fit("mlp")

    assert (torch.rand(3) == expected).all()
