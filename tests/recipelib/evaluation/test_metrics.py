"""Metrics are those of their papers and of scikit-learn; each has a standard error."""

import ast
import itertools
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from recipelib.evaluation import metrics
from recipelib.evaluation.metrics import METRICS, load_metric, score_rows
from recipelib.runtime.errors import UserError

LABELS = st.sampled_from(["positive", "negative", "neutral", "", "日本語", "very good"])
ENTITIES = st.lists(
    st.tuples(st.sampled_from(["person", "place"]), st.sampled_from("xyz")), max_size=5
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
fewer = settings(max_examples=40, deadline=None)


def compute(name, predictions, references):
    return load_metric(name).compute(predictions=predictions, references=references)


def pairs(element):
    return st.lists(st.tuples(element, element), min_size=1, max_size=12)


def test_every_name_gives_an_evaluate_metric():
    import evaluate

    for name in METRICS:
        metric = load_metric(name)
        assert isinstance(metric, evaluate.Metric)
        assert metric.name == name


def test_an_unknown_name_is_a_user_error_that_lists_the_metrics():
    with pytest.raises(UserError, match=r"no 'acuracy'.*accuracy, macro_f1"):
        load_metric("acuracy")


@pytest.mark.parametrize("name", METRICS)
def test_no_rows_is_a_clear_error(name):
    with pytest.raises(ValueError, match=f"{name}: there are no rows to score"):
        score_rows(name, [], [])
    with pytest.raises(ValueError, match=f"{name}: there are no rows to score"):
        compute(name, [], [])


@pytest.mark.parametrize("name", ["accuracy", "squad", "numeric_match"])
@pytest.mark.parametrize("score", [score_rows, compute])
def test_predictions_without_their_references_are_an_error(name, score):
    with pytest.raises(ValueError, match=f"metric {name}: 2 predictions and 1 references"):
        score(name, ["1", "2"], ["1"])


def test_a_missing_prediction_is_an_error_in_any_row():
    with pytest.raises(ValueError, match="row 2: None"):
        score_rows("exact_match", ["a", None], ["a", "b"])


def test_metrics_leave_no_file_or_folder(tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    score_rows("accuracy", ["a"], ["a"])
    score_rows("entity_f1", [[]], [[]])
    score_rows("squad", ["a"], [["a"]])
    assert list(tmp_path.rglob("*")) == []


def test_what_takes_seconds_to_import_waits_until_a_metric_is_computed():
    tree = ast.parse(Path(metrics.__file__).read_text())
    at_once = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", ""), *(alias.name for alias in node.names)]
    }
    assert not at_once & {"evaluate", "sklearn", "sklearn.metrics", "datasets"}


def test_metrics_can_be_combined_and_fed_in_batches():
    import evaluate

    both = evaluate.combine([load_metric("accuracy"), load_metric("macro_f1")])
    both.add_batch(predictions=["a", "b"], references=["a", "a"])
    both.add_batch(predictions=["b"], references=["b"])
    result = both.compute()
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["macro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("reference", ["b", ["a", "b"]])
def test_rows_can_be_added_one_by_one(reference):
    metric = load_metric("exact_match")
    metric.add(prediction="b", reference=reference)
    metric.add(prediction="c", reference=reference)
    assert metric.compute() == {"exact_match": 0.5}


# accuracy and macro F1


@fewer
@given(pairs(LABELS))
def test_label_metrics_agree_with_scikit_learn(rows):
    predictions, references = map(list, zip(*rows, strict=True))
    scored = score_rows("accuracy", predictions, references)
    assert scored.score == pytest.approx(accuracy_score(references, predictions))
    assert scored.rows == [float(p == r) for p, r in rows]
    options = {"labels": sorted({*references, *predictions} - ({""} - {*references}))}
    expected = f1_score(references, predictions, average="macro", zero_division=0, **options)
    assert score_rows("macro_f1", predictions, references).score == pytest.approx(expected)


def test_macro_f1_by_hand():
    # a: 2 of 2 found, 1 false alarm: 4/5; b: 1 of 2 found, 1 false alarm: 1/2; c: not found: 0
    predictions, references = ["a", "a", "a", "b", "b"], ["a", "a", "b", "b", "c"]
    assert compute("macro_f1", predictions, references)["macro_f1"] == pytest.approx(
        (4 / 5 + 1 / 2) / 3
    )


def test_no_answer_is_a_miss_and_no_class_of_its_own():
    predictions = ["a"] * 50 + ["b"] * 49 + [""]
    references = ["a"] * 50 + ["b"] * 50
    scored = score_rows("macro_f1", predictions, references)
    expected = f1_score(references, predictions, labels=["a", "b"], average="macro")
    assert scored.score == pytest.approx(expected)
    assert scored.stderr < 0.02


# standard errors


@fewer
@given(pairs(LABELS).filter(lambda rows: len(rows) > 1))
def test_stderr_of_a_mean_is_the_sample_deviation_over_sqrt_n(rows):
    predictions, references = zip(*rows, strict=True)
    scored = score_rows("accuracy", predictions, references)
    n = len(rows)
    variance = sum((value - scored.score) ** 2 for value in scored.rows) / (n - 1)
    assert scored.stderr == pytest.approx(math.sqrt(variance / n))


def test_one_row_has_no_standard_error():
    for name, row in [("accuracy", "a"), ("macro_f1", "a"), ("entity_f1", [["person", "x"]])]:
        scored = score_rows(name, [row], [row])
        assert (scored.score, scored.rows) == (1.0, [1.0])
        assert math.isnan(scored.stderr)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("macro_f1", partial(f1_score, labels=[*"abcd"], average="macro", zero_division=0)),
        ("f1 c", partial(f1_score, labels=["c"], average="macro", zero_division=0)),
        ("matthews", matthews_corrcoef),
    ],
)
def test_stderr_of_what_is_no_mean_is_that_of_a_bootstrap_with_scikit_learn(
    name, score, monkeypatch
):
    monkeypatch.setattr(metrics, "RESAMPLES", 40)
    draw = np.random.default_rng(7)
    references = draw.choice(["a", "b", "c"], 80, p=[0.6, 0.35, 0.05])
    predictions = np.where(draw.random(80) < 0.7, references, draw.choice(["a", "b", "c", ""], 80))
    scored = score_rows(name, predictions.tolist(), references.tolist(), [*"abcd"])
    assert scored.score == pytest.approx(score(references, predictions))

    same_draws = np.random.default_rng(0)
    scores = []
    for _ in range(40):
        rows = same_draws.integers(80, size=80)
        scores.append(score(references[rows], predictions[rows]))
    assert scored.stderr == pytest.approx(np.std(scores, ddof=1))
    assert scored.stderr > 0


def test_matthews_is_0_where_all_rows_are_said_to_be_of_one_class():
    assert score_rows("matthews", ["a"] * 4, ["a", "b", "a", "b"]).score == 0
    assert score_rows("matthews", ["a"] * 4, ["a", "b", "a", "b"]).stderr == 0


def test_stderr_of_entity_f1_is_that_of_a_naive_bootstrap(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 40)
    draw = np.random.default_rng(3)
    gold = [[("person", str(i)) for i in range(draw.integers(4))] for _ in range(40)]
    said = [[(kind, name) for kind, name in row if draw.random() < 0.7] for row in gold]
    stderr = score_rows("entity_f1", said, gold).stderr

    same_draws = np.random.default_rng(0)
    scores = []
    for _ in range(40):
        rows = same_draws.integers(40, size=40)
        scores.append(compute("entity_f1", [said[i] for i in rows], [gold[i] for i in rows]))
    assert stderr == pytest.approx(np.std([score["entity_f1"] for score in scores], ddof=1))
    assert stderr > 0


def test_the_same_rows_always_have_the_same_stderr():
    rows = (["a", "b", "b", "a"], ["a", "a", "b", "c"])
    assert score_rows("macro_f1", *rows) == score_rows("macro_f1", *rows)


# exact match and SQuAD


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (" Paris\n", "Paris", 1),
        ("paris", "Paris", 0),
        ("b", ["a", " b "], 1),
        ("", ["", "x"], 1),
        ("", [], 1),
        ("x", [], 0),
        ("\u00c9", "E\u0301", 0),  # composed and decomposed: no hidden Unicode normalization
        ("👍🏽", ["👍🏽"], 1),
    ],
)
def test_exact_match(prediction, reference, expected):
    assert score_rows("exact_match", [prediction], [reference]).score == expected


def test_rows_with_one_gold_and_rows_with_several_can_be_mixed():
    assert score_rows("exact_match", ["a", "b", "c"], ["a", ["x", "b"], "d"]).rows == [1, 1, 0]
    assert compute("exact_match", ["a", "b"], ["a", ["x", "b"]]) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("a  cat", ["The cat."], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("cat cat dog", ["cat cat"], 0, 4 / 5),  # words count as often as they occur
        ("Broncos", ["Panthers", "the Broncos"], 1, 1),
        ("in 1998", ["1998", "the year 1998"], 0, 2 / 3),
        ("x", ["y"], 0, 0),
        ("", ["y"], 0, 0),
        ("the", ["..."], 1, 1),
        ("", [""], 1, 1),
        ("theory", ["ory"], 0, 0),  # an article is a word, not a beginning
        ("Đại Việt", ["đại việt"], 1, 1),
    ],
)
def test_squad(prediction, golds, exact, f1):
    result = compute("squad", [prediction], [golds])
    assert result == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_the_score_of_squad_is_the_f1_over_rows():
    scored = score_rows("squad", ["Denver", "x"], [["Denver Broncos"], ["x"]])
    assert scored.score == pytest.approx(5 / 6)
    assert scored.rows == [pytest.approx(2 / 3), 1.0]
    assert scored.details == {"exact_match": 0.5}


@fewer
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_squad_is_bounded_and_a_gold_answer_is_right(prediction, golds):
    result = compute("squad", [prediction, golds[0]], [golds, golds])
    assert 0 <= result["exact_match"] <= result["f1"] <= 1
    assert score_rows("squad", [golds[0]], [golds]).score == 1.0


# numbers


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("1,000", "1000.0"),
        ("$5", "5"),
        ("-3", "-3.00"),
        ("−3", "-3"),
        ("-$5", "$-5"),
        ("1/2", "0.5"),
        (".5", "0.50"),
        ("The answer is 18.", "#### 18"),
        ("16 - 3 - 4 = 9, so $18 a day", "18"),
        ("1e3", "1,000"),
        ("1,234,567.5", "1234567.5"),
        ("10-3", "3"),
        ("(-2)", "-2"),
        ("the answer is...42", "42"),
        ("0.1", "0.10000"),
        ("7" * 5000, "7" * 5000),  # int() would refuse it
    ],
)
def test_numbers_are_compared_as_numbers(prediction, reference):
    assert score_rows("numeric_match", [prediction], [reference]).score == 1


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("", "5"), ("five", "5"), ("3", "-3"), ("1000", "1,000.5"), ("0.3", "0.30000000000000004")],
)
def test_other_numbers_and_no_number_are_wrong(prediction, reference):
    assert score_rows("numeric_match", [prediction], [reference]).score == 0


def test_a_huge_exponent_costs_nothing():
    assert score_rows("numeric_match", ["1e999999999"], ["5"]).score == 0


def test_any_of_several_gold_numbers_is_right():
    assert score_rows("numeric_match", ["2", "3"], [["1", "2.0"], ["1", "none"]]).rows == [1, 0]


def test_a_reference_without_a_number_is_a_user_error_with_its_row():
    with pytest.raises(UserError, match=r"row 2: no number in the reference .*'yes'"):
        score_rows("numeric_match", ["1", "2"], ["1", "yes"])


@fewer
@given(st.decimals(-(10**9), 10**9, places=3), TEXTS)
def test_a_number_equals_itself_however_it_is_written(number, noise):
    written = [f"{number}", f"{number:,}", f"so: {number:,}", f"{number}000", f"{noise}\n{number}"]
    assert score_rows("numeric_match", written, [str(number)] * len(written)).score == 1


# entities


def naive_entity_counts(said, gold):
    left = list(gold)
    hits = 0
    for entity in said:
        if entity in left:
            left.remove(entity)
            hits += 1
    return hits, len(said), len(gold)


@fewer
@given(pairs(ENTITIES))
def test_entity_f1_agrees_with_a_naive_count(rows):
    said, gold = map(list, zip(*rows, strict=True))
    counts = [naive_entity_counts(*row) for row in rows]
    hits, predicted, wanted = (sum(column) for column in zip(*counts, strict=True))
    result = compute("entity_f1", said, gold)
    if predicted and wanted:
        assert result["precision"] == pytest.approx(hits / predicted)
        assert result["recall"] == pytest.approx(hits / wanted)
        if hits:
            harmonic = 2 / (1 / result["precision"] + 1 / result["recall"])
            assert result["entity_f1"] == pytest.approx(harmonic)
    assert (result["entity_f1"] == 1) == all(Counter(s) == Counter(g) for s, g in rows)
    assert (result["entity_f1"] == 0) == (hits == 0 and predicted + wanted > 0)


def test_a_repeated_entity_counts_as_often_as_it_occurs():
    twice, once = [["person", "Ann"], ["person", "Ann"]], [["person", "Ann"]]
    assert compute("entity_f1", [once], [twice])["recall"] == 0.5
    assert compute("entity_f1", [twice], [once])["precision"] == 0.5
    assert compute("entity_f1", [twice], [twice])["entity_f1"] == 1.0


def test_entities_match_only_within_their_row_and_with_their_type():
    assert (
        compute("entity_f1", [[["person", "Ann"]], []], [[], [["person", "Ann"]]])["entity_f1"] == 0
    )
    assert compute("entity_f1", [[["place", "Ann"]]], [[["person", "Ann"]]])["entity_f1"] == 0


def test_finding_nothing_where_nothing_is_counts_as_right():
    scored = score_rows("entity_f1", [[], []], [[], [["person", "Ann"]]])
    assert scored.score == 0
    assert scored.rows == [1, 0]
    assert compute("entity_f1", [[]], [[]]) == {"entity_f1": 1, "precision": 1, "recall": 1}


def test_order_of_rows_does_not_change_a_score():
    predictions, references = ["a", "b", "c"], ["a", "c", "c"]
    scores = set()
    for order in itertools.permutations(range(3)):
        said, gold = ([labels[place] for place in order] for labels in (predictions, references))
        scores.add(score_rows("macro_f1", said, gold).score)
    assert max(scores) == pytest.approx(min(scores))
