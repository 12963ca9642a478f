"""Several tasks are scored one by one, and together by the mean over those that are trained."""

import math
from dataclasses import replace

import pytest
from tokenizers_for_tests import tokenizer_for

from recipelib.data.rows import Rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.scores import TaskScore
from recipelib.prompts.template import PromptTemplate
from recipelib.task import task as one_task
from recipelib.task.mixture import Mixture
from recipelib.task.task import Task

# As a model before training and after it would score them, by template.
BEFORE = {
    "movie_reviews": TaskScore("accuracy", 0.5, 0.03, {}, [{"row": 0}], rows=10, left_out=1),
    "squad": TaskScore("squad", 0.2, 0.04, {"exact_match": 0.1}, [{"row": 0}], rows=20, seconds=2),
    "gsm8k": TaskScore("numeric_match", 0.2, 0.04, {}, [{"row": 0}], rows=20, seconds=2),
    "alpaca": TaskScore("loss", 3.0, 0.1, {}, [{"row": 0}, {"row": 0}], rows=2),
    "trec": TaskScore("accuracy", 0.9, 0.01, {}, [{"row": 0}], rows=5, unreadable=1),
}
AFTER = {name: replace(score, score=score.score / 2) for name, score in BEFORE.items()}


def task_of(name: str, trained: bool) -> Task:
    return Task(
        encoder=PromptEncoder(PromptTemplate.load(name), tokenizer_for("gpt2"), 100),
        train=Rows([], f"{name} train", skipped=3) if trained else None,
        evaluation=Rows([{"of": name}], f"{name} eval"),
        model_name="a model",
        budget={"max_new_tokens": 7, "batch_tokens": 90},
    )


def mixture_of(*trained: str, heldout: tuple[str, ...] = ()) -> Mixture:
    tasks = [task_of(name, name in trained) for name in (*trained, *heldout)]
    shares = {
        name: {"rows": 1000 * place, "rows_per_pass": 2500} for place, name in enumerate(trained, 1)
    }
    first = tasks[0]
    return Mixture(
        tasks=tasks,
        shares=shares,
        encoder=first.encoder,
        train=None,
        evaluation=first.evaluation,
        model_name=first.model_name,
        budget=first.budget,
    )


@pytest.fixture
def scored(monkeypatch):
    """Scores come from a table, by default BEFORE; gives what was asked for."""
    asked = []

    def evaluate(model, encoder, rows, **options):
        asked.append({"model": model, "rows": rows, **options})
        return evaluate.scores[encoder.template.name]

    evaluate.scores, evaluate.asked = BEFORE, asked
    monkeypatch.setattr(one_task, "evaluate_task", evaluate)
    return evaluate


def test_the_score_is_the_mean_over_trained_tasks_and_each_is_kept(scored, capsys):
    mixture = mixture_of("movie_reviews", "gsm8k", heldout=("trec",))
    result = mixture.score("the model", "before")
    assert (result.metric, result.score) == ("share right", pytest.approx(0.35))
    assert result.stderr == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert (result.rows, result.left_out, result.seconds) == (30, 1, 2)
    assert result.tasks == {name: BEFORE[name] for name in ("movie_reviews", "gsm8k", "trec")}
    assert [record["task"] for record in result.records] == ["movie_reviews", "gsm8k", "trec"]
    said = capsys.readouterr().out
    assert "before, movie_reviews: accuracy 0.500 ± 0.030 (10 rows)" in said
    assert "before, trec (held out): accuracy 0.900 ± 0.010 (5 rows, 1 without an answer)" in said
    assert [call["rows"] for call in scored.asked] == [
        [{"of": name}] for name in ("movie_reviews", "gsm8k", "trec")
    ]
    assert {call["model"] for call in scored.asked} == {"the model"}


@pytest.mark.parametrize("other", ["alpaca", "squad"])
def test_metrics_that_are_unlike_have_no_mean(scored, other):
    result = mixture_of("movie_reviews", other).score(None, "before")
    assert result.metric is None
    assert math.isnan(result.score)
    assert "the tasks' metrics differ, see each (" in str(result)
    result = mixture_of("movie_reviews", "trec").score(None, "before")
    assert (result.metric, result.score) == ("accuracy", pytest.approx(0.7))
    result = mixture_of("alpaca", heldout=("trec",)).score(None, "before")
    assert (result.metric, result.score) == ("loss", 3.0)


def test_a_single_trained_task_keeps_its_metric_and_its_details(scored):
    result = mixture_of("squad", heldout=("trec",)).score(None, "before")
    assert (result.metric, result.score) == ("squad", 0.2)
    assert result.details == {"exact_match": 0.1}
    assert result.tasks.keys() == {"squad", "trec"}


def test_each_task_is_compared_before_and_after(scored):
    mixture = mixture_of("movie_reviews", "squad", heldout=("trec",))
    base = mixture.score(None, "before")
    scored.scores = AFTER
    compared = mixture.compare(base, mixture.score(None, "after"))
    assert compared.keys() == {"movie_reviews", "squad", "trec"}
    assert compared["squad"] == {
        "metric": "squad",
        "score": 0.1,
        "stderr": 0.04,
        "exact_match": 0.1,
        "base_score": 0.2,
        "base_stderr": 0.04,
        "eval_rows": 20,
        "heldout": False,
    }
    assert [compared[name]["heldout"] for name in compared] == [False, False, True]
    assert [compared[name]["base_score"] for name in compared] == [0.5, 0.2, 0.9]


def test_what_a_run_shows_and_keeps_is_of_the_trained_tasks():
    mixture = mixture_of("movie_reviews", "squad", heldout=("trec",))
    assert [template.name for template in mixture.templates] == ["movie_reviews", "squad"]
    assert mixture.sources == {
        "movie_reviews": "1,000 rows, each 2 or 3 times",
        "squad": "2,000 rows, each 1 or 2 times",
    }
    mixture.shares["squad"]["rows_per_pass"] = 2000
    mixture.shares["movie_reviews"]["rows_per_pass"] = 3000
    assert mixture.sources == {
        "movie_reviews": "1,000 rows, each 3 times",
        "squad": "2,000 rows",
    }
    assert mixture.skipped_rows == 6
