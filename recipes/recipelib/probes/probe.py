"""A probe: a small classifier of a large model's features, of one of five kinds; its fitting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from recipelib.runtime import UserError

# Chosen on states of the bundled model for SST-2 and TREC, 800 rows, over layers. The inverse of
# the regularization strength, C, is far below scikit-learn's 1, for the features are as many as the
# rows. A split looks at one in twenty of them: as accurate as all, in a quarter of the time.
KINDS: dict[str, dict[str, Any]] = {
    "logistic": {"C": 0.01, "tol": 1e-3, "max_iter": 1000},
    "svm": {"C": 1e-3},
    "boosting": {"max_iter": 100, "max_leaf_nodes": 8, "max_features": 0.05},
    "neighbors": {"n_neighbors": 10, "metric": "cosine", "weights": "distance"},
    "mlp": {"hidden": 256, "dropout": 0.5, "epochs": 20, "lr": 1e-3, "weight_decay": 0.01},
}
BATCH = 32  # rows in a step of the MLP


@dataclass(frozen=True)
class Probe:
    """A fitted probe, which holds how to standardize the features too.

    Attributes:
        kind: a key of `KINDS`.
        classes: all classes by their number, those without a training row too.
        hyperparameters: what the kind was fitted with.
        tensors: mean, scale [width]; present [k], the classes with training rows, ascending; and

            - logistic, svm: weight [k, width] and bias [k], of one row where k is 2
            - mlp: weights and biases of its two layers
            - neighbors: the training rows as given, features [rows, width], and their labels
              [rows], which are places in `present`
        trees: of the kind boosting.
    """

    kind: str
    classes: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    trees: HistGradientBoostingClassifier | None = None

    def scores(self, features: np.ndarray) -> np.ndarray:
        """[rows, classes] float64 scores; the prediction is their argmax, as scikit-learn's own.

        Log-probabilities (nats), for an svm signed distances from each class's hyperplane, in units
        of the margin. A class without training rows has -inf, and so has for neighbors one that no
        neighbor is of.

        Args:
            features: [rows, width].
        Raises:
            UserError: another width than that of the training rows, or values that are not finite.
        """
        inputs = self._standardized(checked(features))
        columns = np.full((len(inputs), len(self.classes)), -np.inf)
        if len(inputs):
            with one_thread():
                columns[:, self.tensors["present"]] = self._present_scores(inputs)
        return columns

    def _present_scores(self, inputs: np.ndarray) -> np.ndarray:
        tensors = self.tensors
        if self.kind == "neighbors":
            model = KNeighborsClassifier(**self.hyperparameters)
            model.fit(self._standardized(tensors["features"]), tensors["labels"])
            with np.errstate(divide="ignore"):
                return np.log(model.predict_proba(inputs))
        if self.kind == "boosting":
            values = self.trees.decision_function(inputs)
        elif self.kind == "mlp":
            hidden = inputs @ tensors["hidden_weight"].T + tensors["hidden_bias"]
            values = np.maximum(hidden, 0) @ tensors["weight"].T + tensors["bias"]
        else:
            values = inputs @ tensors["weight"].T + tensors["bias"]
        values = values.reshape(len(inputs), -1)
        if values.shape[1] == 1:  # of two classes scikit-learn scores the second
            first = -values if self.kind == "svm" else np.zeros_like(values)
            values = np.concatenate([first, values], axis=1)
        return values if self.kind == "svm" else log_softmax(values, axis=1)

    def _standardized(self, features: np.ndarray) -> np.ndarray:
        width = len(self.tensors["mean"])
        if features.shape[1] != width:
            raise UserError(
                f"features: {features.shape[1]} wide, where the probe was trained on {width}; "
                "compute them with the model and the layer that it was trained on"
            )
        return (features - self.tensors["mean"]) / self.tensors["scale"]


def fit_probe(
    kind: str, features: np.ndarray, labels: Sequence[int], classes: Sequence[str], seed: int
) -> Probe:
    """Train a probe.

    The features are standardized by the mean and scale of these rows. The result depends on the
    seed, not on the number of threads: there is one, which for a thousand rows is also many times
    faster than two.

    Args:
        kind: a key of `KINDS`.
        features: [rows, width].
        labels: [rows] numbers of classes.
        classes: names of all classes, in the order of their numbers.
    Raises:
        UserError: an unknown kind, values that are not finite, or rows of fewer than two classes.
    """
    if kind not in KINDS:
        raise UserError(f"probe {kind}: there is no such kind; choose from {', '.join(KINDS)}")
    features, present, labels = checked_rows(features, labels, classes)
    with one_thread():
        scaler = StandardScaler().fit(features.astype(np.float64))
        tensors = {"mean": scaler.mean_, "scale": scaler.scale_, "present": present}
        hyperparameters, trees = dict(KINDS[kind]), None
        inputs = (features - scaler.mean_) / scaler.scale_
        if kind == "logistic":
            tensors |= _linear(LogisticRegression(**hyperparameters).fit(inputs, labels))
        elif kind == "svm":
            # The primal problem is the one without randomness.
            tensors |= _linear(LinearSVC(dual=False, **hyperparameters).fit(inputs, labels))
        elif kind == "mlp":
            tensors |= _fit_mlp(inputs, labels, seed, **hyperparameters)
        elif kind == "neighbors":
            hyperparameters["n_neighbors"] = min(hyperparameters["n_neighbors"], len(labels))
            tensors |= {"features": features, "labels": labels}
        else:
            trees = HistGradientBoostingClassifier(
                **hyperparameters, early_stopping=False, random_state=seed
            ).fit(inputs, labels)
    # In the order in which they are loaded, for the order decides how products are rounded.
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return Probe(kind, tuple(classes), hyperparameters, tensors, trees)


def checked(features: np.ndarray) -> np.ndarray:
    """The features, all finite.

    Raises:
        UserError: some are not.
    """
    features = np.asarray(features)
    bad = len(features) - int(np.isfinite(features).all(axis=1).sum())
    if bad:
        raise UserError(
            f"features: {bad} of {len(features)} rows hold NaN or infinity; run the large model in "
            "float32"
        )
    return features


def checked_rows(
    features: np.ndarray, labels: Sequence[int], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows: their features, the classes that they are of [k], ascending, and each row's
    place in these [rows].

    Raises:
        UserError: values that are not finite, or fewer than two classes.
    """
    features = checked(features)
    present, places = np.unique(np.asarray(labels), return_inverse=True)
    if len(present) < 2:
        found = (
            f"all {len(places)} are {classes[present[0]]!r}" if len(present) else "there are none"
        )
        raise UserError(f"training rows: {found}; a probe needs rows of at least two classes")
    return features, present, places


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra and OpenMP on one thread. On a second one, sums are rounded otherwise; and the
    pools of several libraries, which take turns in a small fit, wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _linear(model: LogisticRegression | LinearSVC) -> dict[str, np.ndarray]:
    return {"weight": model.coef_, "bias": model.intercept_}


def _fit_mlp(
    inputs: np.ndarray,
    labels: np.ndarray,
    seed: int,
    *,
    hidden: int,
    dropout: float,
    epochs: int,
    lr: float,
    weight_decay: float,
) -> dict[str, np.ndarray]:
    rows = torch.from_numpy(inputs).float()
    targets = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):  # whoever calls keeps their random numbers
        torch.manual_seed(seed)
        first = torch.nn.Linear(rows.shape[1], hidden)
        second = torch.nn.Linear(hidden, int(targets.max()) + 1)
        model = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Dropout(dropout), second)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        for _ in range(epochs):
            for batch in torch.randperm(len(rows)).split(BATCH):
                loss = torch.nn.functional.cross_entropy(model(rows[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    layers = {"hidden_weight": first.weight, "hidden_bias": first.bias}
    layers |= {"weight": second.weight, "bias": second.bias}
    return {name: value.detach().numpy() for name, value in layers.items()}
