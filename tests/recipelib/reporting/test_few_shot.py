"""What an evaluation with demonstrations shows, and what it leaves in its folder."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for

from recipelib.data.rows import Rows
from recipelib.encoding.asking import Asked, CausalAsker
from recipelib.encoding.prompt_encoder import EncodedPrompt, PromptEncoder
from recipelib.evaluation.class_scores import class_figures
from recipelib.evaluation.metrics import score_rows
from recipelib.evaluation.scores import FewShotScore, TaskScore, score_records
from recipelib.models.quantization import count_parameters
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting import classes as class_report
from recipelib.reporting import few_shot as report
from recipelib.reporting.few_shot import confidences, interval, save_few_shot
from recipelib.runtime.errors import UserError
from recipelib.task.few_shot import FewShotTask

TOKENIZER, MODEL = tokenizer_for("gpt2"), tiny_llama(300)

# What DESIGN.md asks of every run.
KEYS = {
    *("task", "method", "model", "metric", "score", "stderr", "base_score"),
    *("eval_rows", "train_rows", "train_tokens", "supervised_tokens", "padding_fraction"),
    *("tokens_per_second", "train_seconds", "eval_seconds", "peak_memory_bytes"),
    *("trainable_parameters", "total_parameters", "world_size", "distributed_type", "seed"),
    "versions",
}

FACTS = {
    "model": "owner/base",
    "adapter": None,
    "shots": 8,
    "sampler": "balanced",
    "score_by": "sum",
    "reasoning": "template",
    "samples": 1,
    "temperature": 0.0,
    "eval_source": "rows.jsonl",
    "train_rows": 40,
    "peak_memory_bytes": 3 * 2**29,
}


# What the command line says.
ASKED = {
    "predict": None,
    "adapter": None,
    "score": "sum",
    "reasoning": "template",
    "samples": 1,
    "temperature": 0.0,
}


def records_of(answers, said, draw=0, **more):
    """Records as they are before they are scored."""
    return [
        {"draw": draw, "row": row, "prompt": f"p{row}", "answer": answer, "prediction": one}
        | {"score": None, **more}
        for row, (answer, one) in enumerate(zip(answers, said, strict=True))
    ]


def few_shot(template, answers, draws, *, left_out=0, **more) -> FewShotScore:
    """The score of made-up predictions, a list of them for each draw."""
    scores = [
        score_records(
            template, records_of(answers, said, draw, **more), len(answers) + left_out, True
        )
        for draw, said in enumerate(draws)
    ]
    return FewShotScore(scores, {}, [], 4.0)


def asked_of(row, *, shortened=False, dropped=0):
    prompt = EncodedPrompt([1], [2], None, shortened, dropped)
    return Asked(row, [None], [prompt], (), dropped)


def label_result(template) -> FewShotScore:
    """Two draws over four rows, scored in two ways: by sum 2 and 3 of them right, calibrated 4 and
    1.
    """
    answers = [list(template.verbalizer)[one] for one in (0, 0, 1, 1)]
    first, second = list(template.verbalizer)[:2]
    # The probability of the first class.
    sure = {
        "sum": [[0.9, 0.9, 0.8, 0.7], [0.9, 0.9, 0.3, 0.6]],
        "calibrated": [[0.8, 0.7, 0.4, 0.1], [0.2, 0.3, 0.4, 0.7]],
    }
    scores, by_score = [], {}
    for draw in range(2):
        records = records_of(answers, answers, draw)
        for number, record in enumerate(records):
            chance = {kind: values[draw][number] for kind, values in sure.items()}
            record["scores"] = {
                kind: {first: math.log(one), second: math.log(1 - one)}
                for kind, one in chance.items()
            }
            record["predictions"] = {
                kind: first if one > 0.5 else second for kind, one in chance.items()
            }
            record["prediction"] = record["predictions"]["sum"]
        scores.append(score_records(template, records, 5, True))
        for kind in sure:
            said = [record["predictions"][kind] for record in records]
            by_score.setdefault(kind, []).append(score_rows(template.metric, said, answers).score)
    asked = [
        [asked_of(0, shortened=True, dropped=2), asked_of(1), asked_of(2, dropped=1), asked_of(3)],
        [asked_of(0, dropped=2), asked_of(1), asked_of(2), asked_of(3)],
    ]
    return FewShotScore(scores, by_score, asked, 4.0)


def template_of(name, **changes):
    template = PromptTemplate.load(name)
    return PromptTemplate(template.fields | changes, template.path) if changes else template


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Calls `save_few_shot` as the recipe does."""
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "runs" / "mine"
    training = SimpleNamespace(
        output_dir=str(folder),
        device="cpu",
        world_size=1,
        seed=3,
        distributed_state=SimpleNamespace(distributed_type=SimpleNamespace(value="NO")),
    )

    def call(template, result, *, shots=8, sampler="balanced", **options):
        encoder = PromptEncoder(template, TOKENIZER, 200)
        task = FewShotTask(
            encoder=encoder,
            train=Rows([{}] * 40, "train.jsonl"),
            evaluation=Rows([{}] * 100, "rows.jsonl"),
            model_name="owner/base",
            budget={},
            memory=SimpleNamespace(stop=lambda: FACTS["peak_memory_bytes"]),
            asker=CausalAsker(encoder),
            masked=False,
            shots=shots,
            sampler=sampler,
            writes=False,
            adapter=None,
        )
        args = SimpleNamespace(**ASKED | options)
        return save_few_shot(result, task, args, training, MODEL)

    call.folder, call.training = folder, training
    call.files = lambda: {one.name for one in folder.iterdir()} if folder.exists() else set()
    return call


def from_json(path):
    return json.loads(path.read_text("utf-8"))


# metrics.json


def test_metrics_hold_what_the_design_names_and_what_the_draws_came_to(save):
    template = template_of("movie_reviews")
    result = label_result(template)
    metrics = save(template, result)
    assert from_json(save.folder / "metrics.json") == metrics
    assert set(metrics) >= KEYS
    spread = math.sqrt(0.25**2 / 2)
    stderr = np.mean([np.std(one, ddof=1) / 2 for one in ([1, 1, 0, 0], [1, 1, 1, 0])])
    expected = {
        **FACTS,
        "task": "movie_reviews",
        "method": "in-context learning",
        "metric": "accuracy",
        "score": 0.625,
        "stderr": pytest.approx(stderr),
        "confidence_interval": pytest.approx(interval("accuracy", 0.625, stderr, 4)),
        "draws": 2,
        "draw_scores": [0.5, 0.75],
        "std_over_draws": pytest.approx(spread),
        "scores": {
            "sum": {
                "mean": 0.625,
                "std_over_draws": pytest.approx(spread),
                "draws": [0.5, 0.75],
            },
            "calibrated": {
                "mean": 0.625,
                "std_over_draws": pytest.approx(3 * spread),
                "draws": [1.0, 0.25],
            },
        },
        "base_score": 0.625,
        "eval_rows": 4,
        "eval_rows_left_out": 1,
        "prompts_shortened": 1,
        "demonstrations_dropped": 5,
        "rows_with_dropped_demonstrations": 2,
        "eval_seconds": 4.0,
        "rows_per_second": 2.0,
        "trainable_parameters": 0,
        "total_parameters": count_parameters(MODEL)[1],
        "rendering": "text",
        "chat_template_kwargs": {},
        "max_length": 200,
        "world_size": 1,
        "distributed_type": "NO",
        "seed": 3,
        "classes": {
            "negative": {
                "precision": pytest.approx(4 / 7),
                "recall": 1.0,
                "f1": pytest.approx(8 / 11),
                "rows": 2,
            },
            "positive": {"precision": 1.0, "recall": 0.25, "f1": 0.4, "rows": 2},
        },
    }
    assert {name: metrics[name] for name in expected} == expected
    errors = metrics["calibration_error"]
    assert list(errors) == ["uncalibrated", "calibrated"]
    # By sum, both draws: 0.9 four times right; 0.8 wrong; 0.7 once right, once wrong; 0.6 wrong.
    naive = (abs(3.6 - 4) + abs(0.8 - 0) + abs(1.4 - 1) + abs(0.6 - 0)) / 8
    assert errors["uncalibrated"] == pytest.approx(naive)


def test_one_draw_has_no_spread_and_an_adapter_no_base_score(save):
    template = template_of("movie_reviews")
    result = few_shot(template, ["positive", "negative"], [["positive", "positive"]])
    metrics = save(template, result, adapter="runs/lora")
    assert math.isnan(metrics["std_over_draws"])
    stored = from_json(save.folder / "metrics.json")
    assert stored["std_over_draws"] is None
    assert (stored["score"], stored["base_score"]) == (0.5, None)


def test_the_largest_process_gives_the_peak_memory(save, monkeypatch):
    def all_reduce(peak, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        peak.fill_(max(int(peak), 7 * 2**40))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    save.training.world_size = 2
    template = template_of("movie_reviews")
    metrics = save(template, label_result(template))
    assert (metrics["peak_memory_bytes"], metrics["world_size"]) == (7 * 2**40, 2)


def test_macro_f1_is_averaged_over_draws_and_its_interval_stays_within_0_and_1(save):
    template = template_of("movie_reviews", metric="macro_f1")
    result = label_result(template)
    metrics = save(template, result)
    assert metrics["metric"] == "macro_f1"
    assert metrics["score"] == pytest.approx(np.mean([one.score for one in result.draws]))
    low, high = metrics["confidence_interval"]
    assert 0 <= low < metrics["score"] < high <= 1
    assert {"confusion.png", "reliability.png"} <= save.files()


# Files

GENERATED = {
    "squad": ([["Ada", "Ada wrote"], ["1"]], [["Ada", "2"], ["wrote", "1"]]),
    "gsm8k": ([["5"], ["7"]], [["5", None], ["6", "7"]]),
    "wnut17": (
        [[["person", "Ada"]], []],
        [[[["person", "Ada"]], []], [[["group", "Ada"], ["person", "Ada"]], [["group", "x"]]]],
    ),
}


def test_a_label_task_leaves_its_predictions_and_its_figures(save):
    template = template_of("movie_reviews")
    result = label_result(template)
    save(template, result)
    assert save.files() == {
        *("metrics.json", "predictions.jsonl", "template.yaml"),
        *("confusion.png", "reliability.png"),
    }
    lines = (save.folder / "predictions.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records == [record for draw in result.draws for record in draw.records]
    assert [(one["draw"], one["row"]) for one in records] == [
        (draw, row) for draw in range(2) for row in range(4)
    ]
    assert list(records[0])[:6] == ["draw", "row", "prompt", "answer", "prediction", "score"]
    assert PromptTemplate.load(str(save.folder / "template.yaml")).fields == template.fields


@pytest.mark.parametrize("name", GENERATED)
def test_a_task_without_classes_has_no_figures(name, save, capsys):
    template = template_of(name)
    answers, draws = GENERATED[name]
    result = few_shot(template, answers, draws, generated="x")
    metrics = save(template, result)
    assert save.files() == {"metrics.json", "predictions.jsonl", "template.yaml"}
    assert from_json(save.folder / "metrics.json") == metrics
    assert not {"classes", "calibration_error"} & set(metrics)
    assert metrics["scores"] == {}
    for detail in result.draws[0].details:  # SQuAD's exact match, precision and recall
        expected = np.mean([one.details[detail] for one in result.draws])
        assert metrics[detail] == pytest.approx(expected)
    assert metrics["metric"] in capsys.readouterr().out


def test_a_loss_has_no_figures_and_counts_rows_not_answers(save, capsys):
    records = [
        {"draw": 0, "row": row, "prompt": "p", "answer": "a", "prediction": None, "score": 1.5}
        for row in (0, 0, 1)
    ]
    result = FewShotScore([TaskScore("loss", 1.5, 0.5, {}, records, 2, 1)], seconds=4.0)
    metrics = save(template_of("alpaca"), result)
    assert save.files() == {"metrics.json", "predictions.jsonl", "template.yaml"}
    assert metrics["rows_per_second"] == 0.5
    assert metrics["confidence_interval"] == pytest.approx([0.52, 2.48])
    assert metrics["demonstrations_dropped"] is None  # not counted
    assert "2, 1 rows left out: too long" in capsys.readouterr().out


def test_labels_that_are_written_may_be_unreadable(save, monkeypatch):
    drawn = {}
    real = class_report.plot_confusion

    def plot(golds, predictions, labels, path, **options):
        drawn.update(golds=golds, predictions=predictions, labels=labels)
        real(golds, predictions, labels, path, **options)

    monkeypatch.setattr(class_report, "plot_confusion", plot)
    template = template_of("esnli")
    answers = ["entailment", "neutral", "contradiction"]
    draws = [["entailment", None, None], [None, "neutral", "entailment"]]
    metrics = save(template, few_shot(template, answers, draws, generated="x"))
    assert save.files() == {
        *("metrics.json", "predictions.jsonl", "template.yaml", "confusion.png"),
    }
    assert drawn["golds"] == answers * 2
    assert drawn["predictions"] == draws[0] + draws[1]
    assert drawn["labels"] == answers
    assert metrics["classes"]["neutral"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "rows": 1,
    }


def test_classes_that_are_numbers_are_shown_with_their_words(save, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(class_report, "plot_confusion", lambda *data, **_: drawn.extend(data))
    template = template_of("sst2")
    result = few_shot(template, ["0", "1"], [["1", "1"]])
    assert list(save(template, result)["classes"]) == ["0", "1"]
    golds, predictions, labels, _ = drawn
    assert golds == labels == ["negative (0)", "positive (1)"]
    assert predictions == ["positive (1)"] * 2
    assert "positive (1)" in capsys.readouterr().out


def test_predicting_leaves_the_predictions_and_nothing_else(save, capsys):
    template = template_of("movie_reviews")
    records = records_of([None, None], ["positive", "negative"])
    score = TaskScore("accuracy", math.nan, math.nan, {}, records, 2, 1)
    assert save(template, FewShotScore([score]), predict="data/new rows.jsonl") is None
    assert save.files() == {"predictions_new rows.jsonl"}
    lines = (save.folder / "predictions_new rows.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records
    assert "2 rows answered, 1 left out as too long: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["movie_reviews", "squad", "wnut17", "alpaca"])
@pytest.mark.parametrize("predict", [None, "rows.jsonl"])
def test_rows_that_all_do_not_fit_end_in_one_line_with_the_cure(name, predict, save):
    template = template_of(name)
    draws = [score_records(template, [], 7, predict is None)] * 2
    with pytest.raises(UserError, match=r"^--max_length 200: none of the 7 rows fits") as error:
        save(template, FewShotScore(draws, {}, [[], []]), predict=predict)
    assert "\n" not in str(error.value)
    assert save.files() == set()


def test_metrics_come_last_so_that_a_failure_before_leaves_none(save, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    template = template_of("movie_reviews")
    for name in ("plot_classes", "plot_reliability", "write_jsonl"):
        with monkeypatch.context() as context:
            context.setattr(report, name, broken)
            with pytest.raises(OSError, match="disk full"):
                save(template, label_result(template))
        assert "metrics.json" not in save.files()
    save(template, label_result(template))
    assert "metrics.json" in save.files()


def test_other_processes_write_nothing_and_know_the_same(save, monkeypatch, capsys):
    template = template_of("movie_reviews")
    metrics = save(template, label_result(template))
    capsys.readouterr()
    save.training.output_dir += "/other"
    monkeypatch.setenv("RANK", "1")
    assert save(template, label_result(template)) == metrics
    assert "other" not in save.files()
    assert capsys.readouterr().out == ""


# The summary


def test_the_summary_shows_what_the_evaluation_came_to(save, capsys):
    template = template_of("movie_reviews")
    save(template, label_result(template), adapter="runs/lora", score="calibrated")
    out = " ".join(capsys.readouterr().out.split())
    for shown in (
        "owner/base with runs/lora",
        "8 per prompt, balanced; 5 dropped from prompts of 2 rows, which were too long",
        "accuracy │ 0.625 ± 0.269 over rows, ± 0.177 over 2 draws",
        "by sum │ 0.625, ± 0.177 over 2 draws │",
        "by calibrated │ 0.625, ± 0.530 over 2 draws (counts)",
        "majority class │ 'negative': 0.500",
        "│ negative │ 2 │ 0.571 │ 1.000 │ 0.727 │",
        "│ positive │ 2 │ 1.000 │ 0.250 │ 0.400 │",
        "4; 1 prompts shortened, 1 rows left out: too long",
        "4.0 s, 2.0 rows/s",
        "1.50 GiB",
        "metrics.json, predictions.jsonl, confusion.png, reliability.png",
    ):
        assert shown in out


def test_the_summary_of_one_draw_without_demonstrations_says_no_more_than_there_is(save, capsys):
    template = template_of("movie_reviews")
    result = few_shot(template, ["positive", "negative"], [["positive", "positive"]])
    save(template, result, shots=0)
    out = " ".join(capsys.readouterr().out.split())
    assert "demonstrations │ 0 per prompt │" in out
    for absent in ("over 1 draws", "by sum", "dropped", "left out", "nan"):
        assert absent not in out


def test_of_many_classes_the_worst_and_the_best_are_shown_and_no_name_is_broken(
    save, capsys, monkeypatch
):
    monkeypatch.setattr(class_report, "plot_confusion", lambda *data, **_: None)  # slow
    template = template_of("banking77")
    classes = list(template.verbalizer)
    worst, best = classes[10:16], classes[20:26]
    golds = classes[8:60]
    said = [{**dict.fromkeys(worst, None)}.get(one, one) for one in golds]
    for gold in set(golds) - {*worst, *best}:  # one of two rows is right
        golds, said = [*golds, gold], [*said, None]
    folder = "a/rather/long/folder/" * 5
    save.training.output_dir += folder
    result = few_shot(template, golds, [said])
    save(template, result)
    table = capsys.readouterr().out.partition("Done")[0]
    assert [one for one in classes if one in table.split()] == sorted(worst + best)
    assert "the 6 worst and the 6 best of 77 by F1" in table
    assert "... 40 more" in table
    assert "25 other classes" in table
    assert "no rows" in table


# Intervals, figures of classes and confidences


@pytest.mark.parametrize(
    ("right", "rows", "expected"),
    [  # statsmodels' proportion_confint(method="wilson")
        (8, 10, (0.4902, 0.9433)),
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (50, 100, (0.4038, 0.5962)),
        (1, 1, (0.2065, 1.0)),
    ],
)
@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "numeric_match"])
def test_the_interval_of_what_is_right_or_wrong_is_wilsons(metric, right, rows, expected):
    found = interval(metric, right / rows, math.nan, rows)  # it needs no standard error
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("metric", "score", "stderr", "expected"),
    [
        ("squad", 0.5, 0.1, (0.304, 0.696)),
        ("entity_f1", 0.95, 0.1, (0.754, 1.0)),
        ("macro_f1", 0.1, 0.1, (0.0, 0.296)),
        ("matthews", -0.9, 0.1, (-1.0, -0.704)),
        ("loss", 2.0, 0.5, (1.02, 2.98)),
        ("loss", 0.1, 0.5, (0.0, 1.08)),
        ("squad", 1.0, math.nan, (math.nan, math.nan)),  # a single row
    ],
)
def test_other_intervals_are_within_what_the_metric_can_be(metric, score, stderr, expected):
    found = interval(metric, score, stderr, 20)
    assert found == pytest.approx(expected, nan_ok=True)


def test_the_figures_of_a_class_count_the_records_of_all_draws_and_its_rows_once():
    said = [["a", "b", None, "a"], ["a", "a", "b", "c"]]
    records = [
        {"row": row, "answer": answer, "prediction": prediction}
        for draw in said
        for row, (answer, prediction) in enumerate(zip("aabb", draw, strict=True))
    ]
    figures = class_figures(records, "abcd")
    assert figures["a"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "rows": 2}
    assert figures["b"] == {"precision": 0.5, "recall": 0.25, "f1": pytest.approx(1 / 3), "rows": 2}
    # Nobody is of the class c, though it was said once; of d there is nothing.
    nothing = {"precision": None, "recall": None, "f1": None, "rows": 0}
    assert figures["c"] == {**nothing, "precision": 0.0}
    assert figures["d"] == nothing


def test_a_confidence_is_the_probability_of_what_that_way_of_scoring_predicts():
    # Not normalized, as sums of log-likelihoods are not.
    record = {
        "answer": "b",
        "prediction": "a",
        "predictions": {"sum": "a", "calibrated": "b"},
        "scores": {
            "sum": {"a": math.log(0.06), "b": math.log(0.03), "c": math.log(0.01)},
            "calibrated": {"a": -1000.0, "b": 0.0, "c": -math.inf},
        },
    }
    sure, right = confidences([record], "sum")
    assert (sure, right) == (pytest.approx([0.6]), [False])
    sure, right = confidences([record], "calibrated")
    assert (sure, right) == (pytest.approx([1.0]), [True])
