"""A saved probe scores to the bit as before; what else may lie there is refused in one line."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import skops.io
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_selection import VarianceThreshold
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import FunctionTransformer

from recipelib.probes import saved
from recipelib.probes.probe import KINDS, fit_probe
from recipelib.probes.saved import load_probe, save_probe
from recipelib.runtime import UserError, replacing, write_json

ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
NAMES = ("ham", "spam", "ägg\n")


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch):
    monkeypatch.setitem(KINDS, "boosting", KINDS["boosting"] | {"max_iter": 3})


def fitted(kind, count=24, classes=3, width=5, seed=0):
    random = np.random.default_rng(seed)
    features = random.normal(3, 2, size=(count, width)).astype(np.float32)
    return fit_probe(kind, features, np.arange(count) % classes, NAMES[:classes], seed), features


def kept(kind, folder, **options):
    """A saved probe, and features."""
    probe, features = fitted(kind, **options)
    save_probe(probe, folder, {})
    return probe, features


def mend_digests(folder):
    """As somebody would who wants their own files to be taken for a probe's."""
    described = json.loads((folder / "probe.json").read_text())
    for name in described["sha256"]:
        described["sha256"][name] = saved._sha256((folder / name).read_bytes())
    (folder / "probe.json").write_text(json.dumps(described))


def refusal(folder) -> str:
    """The one line in which a folder is refused."""
    with pytest.raises(UserError) as caught:
        load_probe(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert "train" in line
    assert str(folder) in line
    return line


@ALL_KINDS
@pytest.mark.parametrize("classes", [2, 3])
def test_a_loaded_probe_scores_to_the_bit_as_the_one_that_was_saved(kind, classes, tmp_path):
    probe, features = kept(kind, tmp_path, classes=classes)

    found, _ = load_probe(tmp_path)

    assert (found.scores(features) == probe.scores(features)).all()
    assert (found.kind, found.classes) == (kind, NAMES[:classes])
    assert found.hyperparameters == probe.hyperparameters


@given(
    st.sampled_from(["logistic", "svm", "neighbors"]),
    st.integers(2, 30),
    st.integers(1, 40),
    st.sets(st.integers(0, 6), min_size=2, max_size=4),
    st.integers(0, 100),
)
def test_any_shape_comes_back(tmp_path_factory, kind, count, width, numbers, seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(count, width)).astype(np.float32)
    labels = np.resize(sorted(numbers), count)
    probe = fit_probe(kind, features, labels, list("abcdefg"), seed)
    folder = tmp_path_factory.mktemp("probe")

    save_probe(probe, folder, {})

    assert (load_probe(folder)[0].scores(features) == probe.scores(features)).all()


def test_the_callers_facts_come_back(tmp_path):
    facts = {"model": "some/model", "layer": 12, "pooling": None, "rows": [1, {"ä": 0.25}]}
    save_probe(fitted("svm")[0], tmp_path / "new" / "folder", facts)

    assert load_probe(tmp_path / "new" / "folder")[1] == facts


@ALL_KINDS
def test_nothing_is_pickled(kind, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    kept(kind, tmp_path)
    load_probe(tmp_path)

    files = {"probe.json", "probe.safetensors"} | ({"probe.skops"} if kind == "boosting" else set())
    assert {path.name for path in tmp_path.iterdir()} == files


# Whole or not at all


def killed_at(name, write):
    """The way to write, but the run ends at the file of this name."""

    def killed(path, *data):
        if path.name == name:
            raise KeyboardInterrupt
        return write(path, *data)

    return killed


@ALL_KINDS
def test_a_run_that_is_killed_while_it_saves_leaves_no_probe(kind, tmp_path, monkeypatch):
    kept("boosting", tmp_path)
    probe, _ = fitted(kind)

    last = ["probe.safetensors", *(["probe.skops"] if kind == "boosting" else []), "probe.json"]
    for name in last:
        with monkeypatch.context() as patch:
            patch.setattr(saved, "replacing", killed_at(name, replacing))
            patch.setattr(saved, "write_json", killed_at(name, write_json))
            with pytest.raises(KeyboardInterrupt):
                save_probe(probe, tmp_path, {})
        assert "no such file" in refusal(tmp_path)
    assert (tmp_path / "probe.safetensors").exists()


def test_a_probe_in_the_place_of_another_kind_leaves_nothing_of_it(tmp_path):
    kept("boosting", tmp_path)
    probe, features = kept("svm", tmp_path)

    assert not (tmp_path / "probe.skops").exists()
    assert (load_probe(tmp_path)[0].scores(features) == probe.scores(features)).all()


@pytest.mark.parametrize("name", ["probe.json", "probe.safetensors", "probe.skops"])
def test_a_missing_file_is_named(name, tmp_path):
    kept("boosting", tmp_path)
    (tmp_path / name).unlink()

    assert name in refusal(tmp_path)


@pytest.mark.parametrize("name", ["probe.json", "probe.safetensors", "probe.skops"])
@pytest.mark.parametrize("damage", ["cut", "empty", "one byte"])
def test_a_damaged_file_is_refused(name, damage, tmp_path):
    kept("boosting", tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    if damage == "one byte":
        place = 2 if name == "probe.json" else len(data) // 2
        data[place] ^= 0x40
    (tmp_path / name).write_bytes({"cut": data[:-9], "empty": b"", "one byte": data}[damage])

    assert refusal(tmp_path)


@pytest.mark.parametrize(
    "described", ["[]", "{}", '{"kind": "forest"}', "null", '{"kind": ["svm"], "classes": "ab"}']
)
def test_a_probe_json_of_something_else_is_refused(described, tmp_path):
    kept("svm", tmp_path)
    (tmp_path / "probe.json").write_text(described)

    assert refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "forest"),
        ("kind", "mlp"),
        ("classes", ["ham", "spam"]),
        ("classes", [1, 2, 3]),
        ("hyperparameters", {"n_neighbors": 25}),
    ],
)
def test_a_description_that_does_not_fit_the_tensors_is_refused(key, value, tmp_path):
    kept("neighbors", tmp_path)
    described = json.loads((tmp_path / "probe.json").read_text()) | {key: value}
    (tmp_path / "probe.json").write_text(json.dumps(described))

    assert refusal(tmp_path)


# Files made by others


CHANGES = {
    "a row less": lambda value: value[:-1],
    "an axis more": lambda value: value[None],
    "NaN": lambda value: value * np.nan,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["logistic", "svm", "mlp", "neighbors"])
def test_tensors_of_another_shape_are_refused(kind, change, tmp_path):
    probe, _ = kept(kind, tmp_path)
    for name, value in probe.tensors.items():
        if change == "NaN" and value.dtype.kind == "i":
            continue
        tensors = dict(probe.tensors) | {name: CHANGES[change](value)}
        safetensors.numpy.save_file(tensors, tmp_path / "probe.safetensors")
        mend_digests(tmp_path)
        assert refusal(tmp_path)


@pytest.mark.parametrize("present", [[0, 1, 3], [-1, 0, 1], [1, 0, 2], [0, 0, 1]])
def test_classes_that_are_not_there_are_refused(present, tmp_path):
    probe, _ = kept("svm", tmp_path)
    tensors = dict(probe.tensors) | {"present": np.array(present)}
    safetensors.numpy.save_file(tensors, tmp_path / "probe.safetensors")
    mend_digests(tmp_path)

    assert "classes" in refusal(tmp_path)


class Malicious:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["probe.safetensors", "probe.skops"])
def test_a_pickle_is_refused_and_not_loaded(name, tmp_path):
    kept("boosting", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    mend_digests(tmp_path)

    assert refusal(tmp_path)

    assert not (tmp_path / "ran").exists()


def test_a_pickle_among_the_arrays_of_the_trees_is_refused_and_not_loaded(tmp_path):
    kept("boosting", tmp_path)
    with zipfile.ZipFile(tmp_path / "probe.skops") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "probe.skops", "w") as archive:
        for name, data in members.items():
            pickled = pickle.dumps(Malicious(tmp_path / "ran"))
            archive.writestr(name, pickled if name.endswith(".npy") else data)
    mend_digests(tmp_path)

    assert refusal(tmp_path)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stranger", "says"),
    [
        (FunctionTransformer(Path.touch), "touch"),  # a function that nobody trusts
        (Path("x"), "Path"),
        (LinearRegression(), "other features or classes"),  # trusted, but no trees
        ([1, 2], "other features or classes"),
    ],
)
def test_foreign_types_in_the_place_of_the_trees_are_refused(stranger, says, tmp_path):
    kept("boosting", tmp_path)
    skops.io.dump(stranger, tmp_path / "probe.skops")
    mend_digests(tmp_path)

    assert says in refusal(tmp_path)


@pytest.mark.parametrize("options", [{"width": 6}, {"classes": 2}])
def test_the_trees_of_another_probe_are_refused(options, tmp_path):
    kept("boosting", tmp_path)
    other, _ = fitted("boosting", **options)
    skops.io.dump(other.trees, tmp_path / "probe.skops")
    assert "not as it was saved" in refusal(tmp_path)

    mend_digests(tmp_path)

    assert "other features or classes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("left", 10_000),
        ("right", 10_000),
        ("left", 0),  # a circle
        ("feature_idx", 5),
        ("feature_idx", -1),
        ("is_categorical", 1),
    ],
)
def test_a_node_that_leads_out_of_the_tree_is_refused(field, value, tmp_path):
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 5)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(int)
    probe = fit_probe("boosting", features, labels, NAMES[:2], 0)
    save_probe(probe, tmp_path, {})
    load_probe(tmp_path)

    nodes = probe.trees._predictors[-1][0].nodes
    assert not nodes["is_leaf"][0]
    nodes[field][0] = value
    save_probe(probe, tmp_path, {})

    assert "node out of place" in refusal(tmp_path)


def test_trees_that_are_asked_about_other_features_are_refused(tmp_path):
    probe, features = fitted("boosting")
    probe.trees._preprocessor = VarianceThreshold().fit(features)
    save_probe(probe, tmp_path, {})

    assert "changes its features" in refusal(tmp_path)


@pytest.mark.parametrize("owner", ["trees", "a tree"])
def test_trees_with_a_method_of_their_own_are_refused(owner, tmp_path):
    probe, _ = fitted("boosting")
    if owner == "trees":
        probe.trees._preprocess_X = np.exp  # which skops trusts
    else:
        probe.trees._predictors[0][0].predict = np.exp
    save_probe(probe, tmp_path, {})

    assert "a method of its own" in refusal(tmp_path)


def test_a_tree_without_nodes_is_refused(tmp_path):
    probe, _ = fitted("boosting")
    predictor = probe.trees._predictors[0][0]
    predictor.nodes = predictor.nodes[:0]
    save_probe(probe, tmp_path, {})

    assert "node out of place" in refusal(tmp_path)


def test_nothing_of_a_fitted_boosting_is_foreign_but_its_trees():
    """What skops says of scikit-learn's type; more than this list means a review at an upgrade."""
    probe, _ = fitted("boosting")

    found = skops.io.get_untrusted_types(data=skops.io.dumps(probe.trees))

    assert found == [saved.TREE_TYPE]
