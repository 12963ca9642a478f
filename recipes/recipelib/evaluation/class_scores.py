"""What a score says of each class, and what always answering with the most frequent one gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from recipelib.evaluation.metrics import score_rows
from recipelib.prompts import PromptTemplate


class Majority(NamedTuple):
    """The most frequent class of the scored rows, how it is shown, and what always answering with
    it would get: by accuracy and by each of the template's metrics.
    """

    label: str
    shown: str
    scores: dict[str, float]


def class_names(template: PromptTemplate) -> dict[str, str]:
    """The classes as a reader knows them: numbers with their word."""
    return {
        label: f"{words[0].strip()} ({label})" if label.isdecimal() else label
        for label, words in template.verbalizer.items()
    }


def majority_class(template: PromptTemplate, golds: Sequence[str]) -> Majority:
    """The most frequent class among gold answers, of a tie the template's first; of rows with
    options of their own the most frequent name of the right one.
    """
    counts = Counter(golds)
    label = max(template.verbalizer or counts, key=counts.__getitem__)
    names = dict.fromkeys(["accuracy", *template.metrics])
    options = {"classes": list(template.verbalizer) or None, "uncertainty": False}
    said = [label] * len(golds)
    scores = {name: score_rows(name, said, golds, **options).score for name in names}
    return Majority(label, class_names(template).get(label, label), scores)


def class_figures(records: Iterable[Mapping], labels: Sequence[str]) -> dict[str, dict]:
    """Precision, recall and F1 of each class over records, of all draws where there are several,
    and how many rows the class has. A class that is never predicted has a precision of 0; one
    without rows has neither recall nor F1, and no precision either if it is never predicted.
    """
    from sklearn.metrics import precision_recall_fscore_support

    golds, predictions, rows = [], [], set()
    for record in records:
        golds.append(record["answer"])
        predictions.append(record["prediction"] or "")  # none is no class
        rows.add((record["row"], record["answer"]))
    *found, _ = precision_recall_fscore_support(
        golds, predictions, labels=list(labels), zero_division=0
    )
    counts, said = Counter(answer for _, answer in rows), set(predictions)
    figures = {}
    for label, *values in zip(labels, *found, strict=True):
        precision, recall, f1 = map(float, values)
        if not counts[label]:
            precision, recall, f1 = (precision if label in said else None), None, None
        figures[label] = {"precision": precision, "recall": recall, "f1": f1, "rows": counts[label]}
    return figures
