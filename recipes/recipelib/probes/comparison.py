"""Kinds of probes, or layers, beside one another: accuracy by stratified cross-validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedKFold

from recipelib.probes.probe import checked_rows, fit_probe
from recipelib.runtime import UserError


@dataclass(frozen=True)
class ProbeAccuracy:
    """How well a kind of probe does on rows that it was not trained on.

    Attributes:
        kind: of the probe.
        mean, std: of the accuracy over the folds, from 0 to 1; std is the population's.
        seconds: for all folds, scoring included.
    """

    kind: str
    mean: float
    std: float
    seconds: float


def compare_probes(
    features: np.ndarray,
    labels: Sequence[int],
    kinds: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> list[ProbeAccuracy]:
    """The accuracy of each kind on the same folds, in the order given; see `cross_validate`."""
    found = []
    for kind in kinds:
        start = time.perf_counter()
        mean, std = cross_validate(kind, features, labels, folds, seed, classes)
        found.append(ProbeAccuracy(kind, mean, std, time.perf_counter() - start))
    return found


def cross_validate(
    kind: str,
    features: np.ndarray,
    labels: Sequence[int],
    folds: int = 5,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation (the population's) of a kind's accuracy over stratified folds.

    A probe is trained on all folds but one, whose rows neither its weights nor its standardization
    have seen. The folds depend on the labels and the seed only. There are no more of them than rows
    of the smallest class, so that every fold tests every class.

    Args:
        features: [rows, width].
        labels: [rows] numbers of classes.
        classes: their names, for errors.
    Raises:
        UserError: as `fit_probe`; fewer than two folds, or a class with a single row, which cannot
            be both trained on and tested.
    """
    if folds < 2:
        raise UserError(f"folds {folds}: must be 2 or more, to train on some and test on others")
    classes = classes or [str(number) for number in range(max(labels, default=-1) + 1)]
    features, present, places = checked_rows(features, labels, classes)
    counts = np.bincount(places)
    if min(counts) == 1:
        raise UserError(
            f"training rows: a single one is {classes[present[counts.argmin()]]!r}, and "
            "cross-validation needs two of each class; add rows of it, or leave it out"
        )
    split = StratifiedKFold(min(folds, *counts), shuffle=True, random_state=seed)
    accuracies = []
    for train, test in split.split(features, places):
        probe = fit_probe(kind, features[train], present[places[train]], classes, seed)
        predictions = probe.scores(features[test]).argmax(axis=1)
        accuracies.append(np.mean(predictions == present[places[test]]))
    return float(np.mean(accuracies)), float(np.std(accuracies))
