"""The result of an evaluation: a task's score with its records, of one draw or of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from recipelib.data import StoredRows
from recipelib.encoding import Asked
from recipelib.evaluation.class_scores import Majority, class_figures, class_names, majority_class
from recipelib.evaluation.metrics import score_rows
from recipelib.prompts import PromptTemplate
from recipelib.runtime import Spool

_BLOCK = 2000  # prompts that are held in memory at once


def blocks(
    rows: Sequence[Mapping], draws: int, description: str | None
) -> Iterator[tuple[int, Sequence[Mapping], str | None]]:
    """Rows in parts whose prompts fit into memory, with all draws of demonstrations: the number of
    a part's first row, the rows, and the description of their progress bar.
    """
    size = max(1, _BLOCK // max(1, draws))
    for start in range(0, max(1, len(rows)), size):
        part = rows[start : start + size]
        if description and len(rows) > size:
            yield start, part, f"{description}, from row {start + 1:,} of {len(rows):,}"
        else:
            yield start, part, description


def spool_prompts(records: Sequence[dict], spool: Spool) -> None:
    """Move the prompts of records out of memory."""
    for record in records:
        record["prompt"] = spool.keep(record["prompt"])


@dataclass
class TaskScore:
    """How well a model does a task.

    Attributes:
        metric, score, stderr: the template's first metric, its value and its standard error over
            the rows. The metric is None for a mean over tasks whose metrics differ, and the score
            NaN.
        details: further figures of that metric, such as `exact_match` beside SQuAD's F1.
        records: a dict per row, for a loss one per answer; the lines of predictions.jsonl.
        rows, left_out: rows scored, and rows whose prompt did not fit.
        seconds: how long it took.
        unreadable: rows in whose generated text no answer was found; they count as wrong.
        more: the template's further metrics, each with its value and its standard error.
        majority: what always answering with the most frequent class would get; None without
            classes.
        class_names: class -> how it is shown; empty where rows share no classes.
        tasks: for a mean over tasks, the score of each.
    """

    metric: str | None
    score: float
    stderr: float
    details: dict[str, float] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    rows: int = 0
    left_out: int = 0
    seconds: float = 0.0
    unreadable: int = 0
    more: dict[str, tuple[float, float]] = field(default_factory=dict)
    majority: Majority | None = None
    class_names: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)

    def __str__(self) -> str:
        notes = (f"{name} {said}" for name, said in self.notes().items())
        return "; ".join([self.brief().removesuffix(")"), *notes]) + ")"

    def brief(self) -> str:
        """Each metric and the rows, without what the score is worth."""
        without = f", {self.unreadable} without an answer" if self.unreadable else ""
        values = self.by_metric.items()
        scores = ", ".join(f"{name} {one:.3f} ± {error:.3f}" for name, (one, error) in values)
        if self.metric is None:
            scores = "the tasks' metrics differ, see each"
        return f"{scores} ({self.rows} rows{without})"

    @property
    def by_metric(self) -> dict[str, tuple[float, float]]:
        """Each metric with its value and its standard error, the one that counts first."""
        return {self.metric: (self.score, self.stderr), **self.more}

    def class_figures(self) -> dict[str, dict]:
        """Precision, recall, F1 and rows of each class; empty where rows share none."""
        return class_figures(self.records, list(self.class_names)) if self.class_names else {}

    def figures(self, base: TaskScore | None = None) -> dict[str, Any]:
        """What metrics.json says of the score, beside that of the model before training."""
        before = base.by_metric if base else {}
        found: dict[str, Any] = {
            "metric": self.metric,
            "score": self.score,
            "stderr": self.stderr,
            **self.details,
        }
        if base:
            found |= {"base_score": base.score, "base_stderr": base.stderr}
        if self.majority:
            found["majority_class"] = self.majority.label
            found["majority_accuracy"] = self.majority.scores["accuracy"]
            found["majority_score"] = self.majority.scores[self.metric]
        if self.more:  # else the score is all there is
            found["metrics"] = {
                name: {"score": score, "stderr": stderr}
                | ({"base_score": before[name][0]} if name in before else {})
                | ({"majority_score": self.majority.scores[name]} if self.majority else {})
                for name, (score, stderr) in self.by_metric.items()
            }
        if classes := self.class_figures():
            found["classes"] = classes
        return found

    def notes(self) -> dict[str, str]:
        """What the score is worth: how many classes no scored row has, where they count, and what
        always answering with the most frequent class would get by each metric.
        """
        notes = {}
        if self.class_names and "macro_f1" in self.by_metric:
            empty = self.class_names.keys() - {record["answer"] for record in self.records}
            count = f"{len(empty)} of {len(self.class_names)}"
            if empty:
                notes["classes without rows"] = f"{count}, which macro_f1 counts as 0"
        if self.majority:
            values = {name: self.majority.scores[name] for name in ("accuracy", *self.by_metric)}
            said = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            said = said.removeprefix("accuracy ") if len(values) == 1 else said
            notes["majority class"] = f"{self.majority.shown!r}: {said}"
        return notes


# What is the share of rows that are right.
RIGHT_OR_WRONG = ("accuracy", "exact_match", "numeric_match")


def mean_score(tasks: Sequence[TaskScore]) -> TaskScore:
    """The mean over tasks that have the same metric, or metrics which all are the share of right
    rows; otherwise there is none. A single task keeps all of its own.
    """
    if len(tasks) == 1:
        return tasks[0]
    metrics = {task.metric for task in tasks}
    counts = {
        name: sum(getattr(task, name) for task in tasks)
        for name in ("rows", "left_out", "seconds", "unreadable")
    }
    if len(metrics) > 1 and not metrics <= {*RIGHT_OR_WRONG}:
        return TaskScore(None, math.nan, math.nan, **counts)
    return TaskScore(
        metric=metrics.pop() if len(metrics) == 1 else "share right",
        score=sum(task.score for task in tasks) / len(tasks),
        stderr=math.sqrt(sum(task.stderr**2 for task in tasks)) / len(tasks),
        **counts,
    )


def records_of(scores: Mapping[str, TaskScore]) -> list[dict]:
    """The records of several tasks, each with its task."""
    return [{"task": name, **record} for name, task in scores.items() for record in task.records]


def score_records(
    template: PromptTemplate, records: list[dict], total: int, answers: bool
) -> TaskScore:
    """The score over all records; each record is given its own `score`.

    Args:
        total: how many rows there were; those without a record were left out.
        answers: False for rows without answers, which have no score.
    """
    rows, left_out = len(records), total - len(records)
    unreadable = sum(record["prediction"] is None for record in records)
    counts = {"records": records, "rows": rows, "left_out": left_out, "unreadable": unreadable}
    if not answers or not records:
        return TaskScore(template.metric, math.nan, math.nan, **counts)
    # A prediction that could not be read (None) is wrong, not missing.
    predictions = [record["prediction"] or "" for record in records]
    if template.entity_spans:
        predictions = [record["prediction"] for record in records]
    golds = [record["answer"] for record in records]
    classes = list(template.verbalizer) or None
    scored, *others = (score_rows(name, predictions, golds, classes) for name in template.metrics)
    for record, value in zip(records, scored.rows, strict=True):
        record["score"] = value
    return TaskScore(
        template.metric,
        scored.score,
        scored.stderr,
        scored.details,
        **counts,
        more={
            name: (other.score, other.stderr)
            for name, other in zip(template.metrics[1:], others, strict=True)
        },
        majority=majority_class(template, golds) if template.label else None,
        class_names=class_names(template),
    )


# Columns, in this order; one string, for "_id" by itself looks like a name of a library's own.
_IDS = "id idx guid uid _id qid".split()  # noqa: SIM905


def identify_rows(records: Sequence[dict], rows: Sequence[Mapping]) -> None:
    """Say in each record, behind the number of its row among these, which row that is: its `line`
    in its file and, where the data has one, its `id`.
    """
    stored = isinstance(rows, StoredRows)
    known = rows.locations() if stored else [{} for _ in rows]
    for said, row in zip(known, rows, strict=True):
        columns = {column.casefold(): value for column, value in row.items()}
        ids = (columns[name] for name in _IDS if isinstance(columns.get(name), str | int))
        if (found := next(ids, None)) is not None:
            said["id"] = found
    for record in records:
        items = list(record.items())
        record.clear()
        for key, value in items:
            record |= {key: value, **(known[value] if key == "row" else {})}


@dataclass
class FewShotScore:
    """The results of the draws of demonstrations.

    Attributes:
        draws: the score of each draw; its records say which draw they belong to.
        by_score: kind of candidates' score -> the metric of each draw; empty where answers are
            written.
        asked: the rows that were asked in each draw.
        seconds: how long the model took.
    """

    draws: list[TaskScore]
    by_score: dict[str, list[float]] = field(default_factory=dict)
    asked: list[list[Asked]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def together(self) -> TaskScore:
        """The mean over draws, with the records of all."""
        first, *_ = draws = self.draws
        return replace(
            first,
            score=fmean(draw.score for draw in draws),
            stderr=fmean(draw.stderr for draw in draws),
            details={name: fmean(draw.details[name] for draw in draws) for name in first.details},
            more={
                name: tuple(map(fmean, zip(*(draw.more[name] for draw in draws), strict=True)))
                for name in first.more
            },
            records=[record for draw in draws for record in draw.records],
        )
