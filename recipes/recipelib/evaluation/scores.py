"""The result of an evaluation: a task's score with its records, of one draw or of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from recipelib.encoding import Asked
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
        metric, score, stderr: the template's metric, its value and its standard error over the
            rows.
        details: further figures of the metric, such as `exact_match` beside SQuAD's F1.
        records: a dict per row, for a loss one per answer; the lines of predictions.jsonl.
        rows, left_out: rows scored, and rows whose prompt did not fit.
        seconds: how long it took.
        unreadable: rows in whose generated text no answer was found; they count as wrong.
        tasks: for a mean over tasks, the score of each.
    """

    metric: str
    score: float
    stderr: float
    details: dict[str, float] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    rows: int = 0
    left_out: int = 0
    seconds: float = 0.0
    unreadable: int = 0
    tasks: dict[str, TaskScore] = field(default_factory=dict)

    def __str__(self) -> str:
        without = f", {self.unreadable} without an answer" if self.unreadable else ""
        return f"{self.metric} {self.score:.3f} ± {self.stderr:.3f} ({self.rows} rows{without})"


def mean_score(scores: Mapping[str, TaskScore]) -> TaskScore:
    """The mean over tasks, with the records of all; a task scored by its loss counts only if there
    are no others. A single task keeps its own metric.
    """
    records = [{"task": name, **record} for name, task in scores.items() for record in task.records]
    tasks = list(scores.values())
    if len(tasks) == 1:
        return replace(tasks[0], records=records)
    averaged = [task for task in tasks if task.metric != "loss"] or tasks
    return TaskScore(
        metric="loss" if averaged[0].metric == "loss" else "mean",
        score=sum(task.score for task in averaged) / len(averaged),
        stderr=math.sqrt(sum(task.stderr**2 for task in averaged)) / len(averaged),
        records=records,
        rows=sum(task.rows for task in tasks),
        left_out=sum(task.left_out for task in tasks),
        seconds=sum(task.seconds for task in tasks),
        unreadable=sum(task.unreadable for task in tasks),
    )


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
    scored = score_rows(template.metric, predictions, golds)
    for record, value in zip(records, scored.rows, strict=True):
        record["score"] = value
    return TaskScore(template.metric, scored.score, scored.stderr, scored.details, **counts)


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
