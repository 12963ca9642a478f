"""A score is said with what it is worth: every metric, the majority class, each class, each row."""

import json
import math

import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from recipelib.data.rows import load_rows
from recipelib.evaluation.scores import FewShotScore, identify_rows, score_records
from recipelib.prompts.template import PromptTemplate

GOLDS = ["pos", "neg", "pos", "pos", "neg", "pos"]
SAID = ["pos", "pos", "neg", "pos", "neg", None]
SORT = {
    "name": "sort",
    "form": "generative",
    "prompt": "{{ text }}",
    "label": "label",
    "verbalizer": {"neg": ["bad"], "pos": ["good"], "1": ["so so"]},
}


def records(golds=GOLDS, said=SAID):
    pairs = enumerate(zip(golds, said, strict=True))
    return [{"row": n, "answer": gold, "prediction": one} for n, (gold, one) in pairs]


def scored(*metrics, **more):
    return score_records(PromptTemplate({**SORT, "metric": [*metrics]}), records(**more), 6, True)


def test_the_first_metric_counts_and_all_are_said():
    result = scored("macro_f1", "accuracy", "f1 neg", "matthews")
    said = [one or "" for one in SAID]
    # Always over the template's three classes, of which one has no row.
    expected = f1_score(GOLDS, said, labels=["neg", "pos", "1"], average="macro", zero_division=0)
    assert (result.metric, result.score) == ("macro_f1", pytest.approx(expected))
    assert result.more["accuracy"][0] == 0.5
    assert result.more["f1 neg"][0] == pytest.approx(0.5)
    assert result.more["matthews"][0] == pytest.approx(matthews_corrcoef(GOLDS, said))
    assert all(error > 0 for _, error in result.by_metric.values())
    figures = result.figures(base=scored("macro_f1", "accuracy", "f1 neg", "matthews", said=GOLDS))
    assert (figures["majority_class"], figures["majority_accuracy"]) == ("pos", 4 / 6)
    always = (0.8 + 0 + 0) / 3
    assert figures["majority_score"] == pytest.approx(always)
    assert list(figures["metrics"]) == ["macro_f1", "accuracy", "f1 neg", "matthews"]
    assert figures["metrics"]["accuracy"] == {
        "score": 0.5,
        "stderr": result.more["accuracy"][1],
        "base_score": 1.0,
        "majority_score": 4 / 6,
    }
    assert figures["classes"]["neg"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert figures["classes"]["1"] == {"precision": None, "recall": None, "f1": None, "rows": 0}
    text = str(result)
    assert "; classes without rows 1 of 3, which macro_f1 counts as 0; " in text
    assert f"majority class 'pos': accuracy 0.667, macro_f1 {always:.3f}, f1 neg 0.000" in text


def test_the_majority_class_of_a_tie_is_the_first_and_a_number_is_shown_with_its_word():
    assert scored("accuracy", golds=["pos", "neg"] * 3).majority.label == "neg"
    result = scored("accuracy", golds=["1"] * 6)
    assert "(6 rows, 1 without an answer; majority class 'so so (1)': 1.000)" in str(result)
    assert "metrics" not in result.figures()


def test_draws_are_averaged_by_each_metric():
    draws = [scored("accuracy", "matthews"), scored("accuracy", "matthews", said=GOLDS)]
    together = FewShotScore(draws).together
    assert together.score == pytest.approx(0.75)
    assert together.more["matthews"][0] == pytest.approx((draws[0].more["matthews"][0] + 1) / 2)
    assert len(together.records) == 12


def test_rows_without_answers_and_texts_have_no_majority_class():
    result = score_records(PromptTemplate(SORT), records(), 6, False)
    assert math.isnan(result.score)
    assert result.majority is None
    assert result.class_figures() == {}


@pytest.mark.parametrize("column", ["id", "guid", "_id", "QID"])
def test_a_record_says_where_its_row_stands_as_errors_count(column, tmp_path):
    rows = [{"text": f"{n}", "label": "pos" if n != 1 else "?", column: f"r{n}"} for n in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))  # an empty line between two
    checked = load_rows(PromptTemplate(SORT), str(file), "train", skip_bad_rows=True).rows
    some = [{"draw": 0, "row": n, "prompt": "p"} for n in (0, 2, 1, 0)]
    identify_rows(some, checked.select([2, 1, 0]))
    assert [(one["line"], one["id"]) for one in some] == [
        (7, "r3"),
        (1, "r0"),
        (5, "r2"),
        (7, "r3"),
    ]
    assert list(some[0]) == ["draw", "row", "line", "id", "prompt"]


def test_of_a_split_in_several_files_the_file_is_said_too(tmp_path):
    from datasets import Dataset

    for part in range(2):
        data = Dataset.from_dict({"text": ["a", "b"], "label": ["pos", "neg"], "idx": [5, 6]})
        data.to_parquet(tmp_path / f"train-0000{part}-of-00002.parquet")
    (said,) = some = [{"row": 3}]
    identify_rows(some, load_rows(PromptTemplate(SORT), str(tmp_path), "train").rows)
    file = str(tmp_path / "train-00001-of-00002.parquet")
    assert said == {"row": 3, "line": 2, "file": file, "id": 6}
