"""A run's template names the rows that the run had, and reads them from any folder."""

import json
from types import SimpleNamespace

import pytest
from recipe_runs import REVIEWS, write_rows

from recipelib.data import load_splits, origin_of
from recipelib.prompts import PromptTemplate

SPLITS = {"dataset": None, "train_split": None, "eval_split": None}
ARGS = {**SPLITS, "max_train_samples": None, "max_eval_samples": None, "skip_bad_rows": False}
REVIEW = {
    "name": "mine",
    "form": "generative",
    "prompt": "{{ sentence }}",
    "label": "label",
    "verbalizer": {"positive": "good", "negative": "bad"},
}


def args_of(**named):
    return SimpleNamespace(**{**ARGS, "encoding": None, "field": None, **named})


@pytest.mark.parametrize(
    ("dataset", "named", "kept"),
    [
        (None, {"dataset": "rows/train.jsonl"}, {}),
        (None, {"dataset": "rows"}, {"train": "train", "eval": "val"}),
        # The template's own split is not there: another one is scored.
        ({"path": "x/y", "eval": "test"}, {"dataset": "rows"}, {"train": "train", "eval": "val"}),
        ({"path": "rows", "train": "more"}, {"eval_split": "train"}, {"train": "more"}),
        (None, {"dataset": "nested.json", "field": "data.rows"}, {"field": "data.rows"}),
        (None, {"dataset": "latin.csv", "encoding": "latin-1"}, {"encoding": "latin-1"}),
    ],
)
def test_the_same_rows_are_read_again(tmp_path, monkeypatch, dataset, named, kept):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows", train=REVIEWS, val=REVIEWS[:3], more=REVIEWS[3:8])
    (tmp_path / "nested.json").write_text(json.dumps({"data": {"rows": REVIEWS}}))
    lines = ["sentence,label", *(f"caf\xe9 {n},positive" for n in range(9))]
    (tmp_path / "latin.csv").write_text("\n".join(lines), encoding="latin-1")
    template = PromptTemplate({**REVIEW, **({"dataset": dataset} if dataset else {})}, "mine.yaml")
    origin = origin_of(template, args_of(**named))
    assert origin.items() >= kept.items()
    assert origin["path"].startswith(f"{tmp_path}/")
    assert origin_of(template, args_of(**named), published=True) == {}
    before = load_splits(template, args_of(**named), 0)
    (tmp_path / "run").mkdir()
    template.with_dataset(origin).save("run/template.yaml")
    monkeypatch.chdir("/")
    again = PromptTemplate.load(str(tmp_path / "run" / "template.yaml"))
    for one, other in zip(load_splits(again, args_of(), 0), before, strict=True):
        assert one.rows == other.rows


def test_bundled_rows_and_those_of_the_hub_are_named_as_templates_do():
    template = PromptTemplate.load("movie_reviews")
    path = template.dataset["path"]
    assert origin_of(template, args_of())["path"] == path
    hub = {"path": "owner/name", "revision": "v1", "eval": "test"}
    own = PromptTemplate({**REVIEW, "dataset": hub})
    assert origin_of(own, args_of(dataset="a/b:c", eval_split="dev")) == {
        "path": "a/b", "name": "c", "train": "train", "eval": "dev",
    }  # fmt: skip
    assert origin_of(own, args_of(), published=True) == {**hub, "train": "train"}
