"""Probes on disk: safetensors and JSON, and scikit-learn's trees in skops' format. Nothing pickled.

skops builds only types that are trusted, and a tree is not among those that it trusts by itself:
scikit-learn follows the indices in its nodes without looking at bounds. So they are checked here,
before anything is predicted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED

import numpy as np
import safetensors.numpy
import skops.io
from sklearn.ensemble import HistGradientBoostingClassifier

from recipelib.probes.probe import KINDS, Probe
from recipelib.runtime import UserError, first_line, replacing, write_json

FACTS, TENSORS, TREES = "probe.json", "probe.safetensors", "probe.skops"
TREE_TYPE = "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"


def save_probe(probe: Probe, folder: Path | str, facts: Mapping[str, Any]) -> None:
    """Write a probe: probe.safetensors, for boosting probe.skops, and last probe.json, without
    which it is none.

    Args:
        facts: whatever JSON can write about the features: the model, the layer, the pooling.
    """
    folder = Path(folder)
    (folder / FACTS).unlink(missing_ok=True)  # an earlier probe's would go with the new tensors
    (folder / TREES).unlink(missing_ok=True)
    files = {TENSORS: safetensors.numpy.save(dict(probe.tensors))}
    if probe.trees is not None:
        files[TREES] = skops.io.dumps(probe.trees, compression=ZIP_DEFLATED)
    for name, data in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    described = {
        "kind": probe.kind,
        "classes": probe.classes,
        "hyperparameters": probe.hyperparameters,
        "sha256": {name: _sha256(data) for name, data in files.items()},
        "facts": facts,
    }
    write_json(folder / FACTS, described)


def load_probe(folder: Path | str) -> tuple[Probe, dict]:
    """A saved probe, whose scores are those of the one that was saved to the bit, and the facts
    that were saved with it.

    Raises:
        UserError: a file is missing, cut, changed, of another shape, or holds what no probe does.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise UserError(f"{folder / FACTS}: no such file, so no whole probe; train one there first")
    try:
        described = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        kind, classes = described["kind"], tuple(described["classes"])
        hyperparameters, facts = dict(described["hyperparameters"]), described["facts"]
        _require(kind in KINDS, f"kind {kind!r} is none of {', '.join(KINDS)}")
        _require(all(isinstance(name, str) for name in classes), "a class without a name")
        tensors = safetensors.numpy.load(_read(folder / TENSORS, described["sha256"]))
        _check_tensors(kind, len(classes), hyperparameters, tensors)
        trees = None
        if kind == "boosting":
            trees = _load_trees(_read(folder / TREES, described["sha256"]), tensors)
    except Exception as error:  # safetensors, skops and zipfile each have their own
        problem = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{folder}: no usable probe ({problem}); train it again") from None
    return Probe(kind, classes, hyperparameters, tensors, trees), facts


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, sha256: Mapping[str, str]) -> bytes:
    data = path.read_bytes()
    _require(_sha256(data) == sha256[path.name], f"{path.name} is not as it was saved")
    return data


def _check_tensors(
    kind: str,
    classes: int,
    hyperparameters: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Refuse tensors that are not those of the kind, by name, shape and range."""
    (width,), (count,) = tensors["mean"].shape, tensors["present"].shape
    shapes = {"mean": (width,), "scale": (width,), "present": (count,)}
    if kind in ("logistic", "svm"):
        outputs = 1 if count == 2 else count
        shapes |= {"weight": (outputs, width), "bias": (outputs,)}
    elif kind == "mlp":
        hidden = hyperparameters["hidden"]
        shapes |= {"hidden_weight": (hidden, width), "hidden_bias": (hidden,)}
        shapes |= {"weight": (count, hidden), "bias": (count,)}
    elif kind == "neighbors":
        rows = len(tensors["labels"])
        shapes |= {"features": (rows, width), "labels": (rows,)}
        _require(1 <= hyperparameters["n_neighbors"] <= rows, "more neighbors than rows")
        _require(
            np.array_equal(np.unique(tensors["labels"]), np.arange(count)),
            "labels that do not fit the classes",
        )
    found = {name: tensor.shape for name, tensor in tensors.items()}
    _require(found == shapes, f"{TENSORS} has the shapes {found}, not {shapes}")
    _require(all(np.isfinite(tensor).all() for tensor in tensors.values()), "NaN or infinity")
    _require((tensors["scale"] > 0).all(), "a scale of zero or less")
    present = tensors["present"]
    _require(
        count >= 2 and present[0] >= 0 and present[-1] < classes and (np.diff(present) > 0).all(),
        "classes that are not there",
    )


def _load_trees(data: bytes, tensors: Mapping[str, np.ndarray]) -> HistGradientBoostingClassifier:
    trees = skops.io.loads(data, trusted=[TREE_TYPE])  # which refuses any other foreign type
    width = len(tensors["mean"])
    _require(
        type(trees) is HistGradientBoostingClassifier
        and trees.n_features_in_ == width
        and np.array_equal(trees.classes_, np.arange(len(tensors["present"]))),
        f"{TREES} is of other features or classes",
    )
    predictors = [predictor for iteration in trees._predictors for predictor in iteration]
    # Either would bring a tree other rows than those whose width was looked at.
    _require(trees._preprocessor is None, f"{TREES} changes its features")
    for one in (trees, *predictors):
        _require(not any(hasattr(type(one), name) for name in vars(one)), "a method of its own")
    for predictor in predictors:
        _check_nodes(predictor.nodes, width)
    return trees


def _check_nodes(nodes: np.ndarray, width: int) -> None:
    """Refuse a tree that would be followed out of its nodes, out of a row, or in a circle."""
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    feature, left, right = (nodes[name][inner] for name in ("feature_idx", "left", "right"))
    children = np.concatenate([left, right])
    _require(
        len(nodes) > 0
        and (children > np.tile(inner, 2)).all()  # below their parent, as they are written
        and (children < len(nodes)).all()
        and ((feature >= 0) & (feature < width)).all()
        and not nodes["is_categorical"].any(),
        "a tree with a node out of place",
    )
