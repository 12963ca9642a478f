"""The layer and the kind of small model that do best in cross-validation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recipelib.probes.comparison import ProbeAccuracy, compare_probes, cross_validate
from recipelib.probes.probe import KINDS, Probe, fit_probe
from recipelib.runtime import print_table, progress_bar


@dataclass(frozen=True)
class ProbeChoice:
    """A probe that was trained on all rows, and what it was chosen by.

    Attributes:
        probe, layer: the probe, and the layer whose features it reads.
        layers: by its number the mean and the standard deviation of each layer's accuracy over the
            folds; empty where there was no choice.
        kinds: the same of the kinds of probes, on that layer; empty where there was no choice.
        seconds: for all of it.
    """

    probe: Probe
    layer: int
    layers: Mapping[int, tuple[float, float]]
    kinds: Sequence[ProbeAccuracy]
    seconds: float


def choose_probe(
    features: Mapping[int, np.ndarray],
    labels: Sequence[int],
    kind: str,
    classes: Sequence[str],
    seed: int,
) -> ProbeChoice:
    """Train a probe on the layer that is best by cross-validation on the training rows; of equals
    on the lowest, which is computed soonest.

    Args:
        features: by the layer's number, [rows, width].
        labels: [rows] numbers of classes.
        kind: of probe, or "all": layers are then compared by the first, and the best one is taken.
        classes: names of all classes.
    Raises:
        UserError: as `cross_validate`.
    """
    start = time.perf_counter()
    first = next(iter(KINDS)) if kind == "all" else kind
    layers: dict[int, tuple[float, float]] = {}
    if len(features) > 1:
        with progress_bar("comparing layers", len(features)) as bar:
            for number in sorted(features):
                layers[number] = cross_validate(
                    first, features[number], labels, seed=seed, classes=classes
                )
                bar.update()
    layer = max(sorted(features), key=lambda number: layers.get(number, (0.0, 0.0))[0])
    kinds = []
    if kind == "all":
        kinds = compare_probes(features[layer], labels, [*KINDS], seed=seed, classes=classes)
        print_table(
            f"Small models on layer {layer}, by cross-validation",
            {
                tried.kind: f"accuracy {tried.mean:.3f} ± {tried.std:.3f}, {tried.seconds:.1f} s"
                for tried in kinds
            },
        )
    best = max(kinds, key=lambda tried: tried.mean).kind if kinds else kind
    probe = fit_probe(best, features[layer], labels, classes, seed)
    return ProbeChoice(probe, layer, layers, kinds, time.perf_counter() - start)
