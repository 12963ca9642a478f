"""Cross-validation is scikit-learn's over a pipeline: no row is tested that was trained on."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from recipelib.probes import comparison
from recipelib.probes.comparison import compare_probes, cross_validate
from recipelib.probes.probe import KINDS
from recipelib.runtime import UserError


def rows(counts, width=8, seed=0):
    """Features of `counts[c]` rows of each class c, in a random order, and their labels."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    features = random.normal(size=(len(labels), width)) * np.geomspace(0.01, 100, width)
    features[:, 0] += 0.01 * labels
    return features.astype(np.float32), labels


def test_the_accuracy_is_scikit_learns_with_standardization_inside_each_fold():
    features, labels = rows([40, 30, 25])
    naive = cross_val_score(
        make_pipeline(StandardScaler(), LogisticRegression(**KINDS["logistic"])),
        features.astype(float),
        labels,
        cv=StratifiedKFold(5, shuffle=True, random_state=3),
    )

    found = cross_validate("logistic", features, labels, folds=5, seed=3)

    assert found == pytest.approx((naive.mean(), naive.std()))
    assert naive.std() > 0


def test_every_row_is_tested_once_by_a_probe_that_has_not_seen_it(monkeypatch):
    features, labels = rows([12, 9])
    features[:, 1] = np.arange(21)  # which row it is
    trained, tested = [], []
    fit = comparison.fit_probe

    def spy(kind, features, *args):
        probe = fit(kind, features, *args)
        trained.append(set(features[:, 1]))

        class Spy:
            def scores(self, features):
                tested.append(set(features[:, 1]))
                return probe.scores(features)

        return Spy()

    monkeypatch.setattr(comparison, "fit_probe", spy)
    cross_validate("svm", features, labels, folds=3, seed=0)

    assert [len(some) for some in tested] == [7, 7, 7]
    assert set.union(*tested) == set(range(21))
    for seen, asked in zip(trained, tested, strict=True):
        assert seen == set(range(21)) - asked


def test_kinds_come_in_the_order_given_each_with_its_own_accuracy():
    features, labels = rows([20, 20])
    kinds = ["neighbors", "logistic", "svm"]

    found = compare_probes(features, labels, kinds, folds=2, seed=1)

    assert [one.kind for one in found] == kinds
    for one in found:
        assert (one.mean, one.std) == cross_validate(one.kind, features, labels, 2, 1)
        assert one.seconds > 0


def test_labels_without_signal_are_guessed_no_better_than_chance():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(200, 50)), np.arange(200) % 2

    mean, _ = cross_validate("logistic", features, labels)

    assert 0.35 < mean < 0.65


def test_the_seed_decides_the_folds():
    features, labels = rows([30, 30])

    found = {cross_validate("svm", features, labels, seed=seed) for seed in (0, 0, 1, 2)}

    assert len(found) > 1
    assert cross_validate("svm", features, labels, seed=2) in found


# Small classes


@pytest.mark.parametrize(("smallest", "folds"), [(2, 2), (3, 3), (5, 5), (9, 5)])
def test_there_are_no_more_folds_than_rows_of_the_smallest_class(smallest, folds, monkeypatch):
    fits = []
    fit = comparison.fit_probe
    monkeypatch.setattr(
        comparison, "fit_probe", lambda *args: fits.append(set(args[2])) or fit(*args)
    )

    cross_validate("svm", *rows([20, smallest, 15]), folds=5)

    assert fits == [{0, 1, 2}] * folds


def test_a_class_with_a_single_row_is_named():
    with pytest.raises(UserError, match=r"^training rows: a single one is 'spam', .*leave it out$"):
        cross_validate("svm", *rows([5, 1, 4]), classes=("ham", "spam", "eggs"))
    with pytest.raises(UserError, match="a single one is '2'"):
        compare_probes(*rows([5, 3, 1]), ["svm"])


@pytest.mark.parametrize("counts", [[7], [1], []])
def test_fewer_than_two_classes_are_refused(counts):
    with pytest.raises(UserError, match=r"needs rows of at least two classes$"):
        cross_validate("logistic", *rows(counts))


def test_fewer_than_two_folds_are_refused():
    with pytest.raises(UserError, match=r"^folds 1: must be 2 or more"):
        cross_validate("logistic", *rows([5, 5]), folds=1)


def test_class_numbers_need_not_be_without_gaps():
    features, labels = rows([15, 15])

    found = cross_validate("logistic", features, np.array([1, 4])[labels])

    assert found == cross_validate("logistic", features, labels)
