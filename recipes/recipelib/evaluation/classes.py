"""The score of what reads classes from states: a classification head, or a small model."""

from __future__ import annotations

import time

import numpy as np

from recipelib.encoding import ClassRows, PromptEncoder, record_of
from recipelib.evaluation.scores import TaskScore, score_records
from recipelib.inference import class_scores


def score_classes(
    model,
    encoder: PromptEncoder,
    rows: ClassRows,
    *,
    batch_tokens: int = 4096,
    answers: bool = True,
    description: str | None = "scoring",
) -> TaskScore:
    """Let a classification head choose the class of every row, and compare with the gold labels.

    Args:
        rows: as `encode_class_rows` gives them.
        answers: False for rows without answers: the records then hold predictions only.
    """
    start = time.perf_counter()
    model.eval()
    pad = encoder.text.tokenizer.pad_token_id
    scores = class_scores(model, rows.ids, pad, batch_tokens=batch_tokens, description=description)
    result = score_chosen(encoder, rows, scores.numpy(), answers=answers)
    result.seconds = time.perf_counter() - start
    return result


def score_chosen(
    encoder: PromptEncoder, rows: ClassRows, scores: np.ndarray, *, answers: bool = True
) -> TaskScore:
    """Take the class with the highest score of each row, and compare with the gold labels.

    Args:
        scores: [rows, classes].
    """
    template = encoder.template
    classes, records = list(template.verbalizer), []
    for row, values in zip(rows.asked, scores.tolist(), strict=True):
        said = dict(zip(classes, values, strict=True))
        chosen = max(said, key=said.__getitem__)
        record = record_of(encoder, row, row.questions[0].label, chosen, None)
        records.append({**record, "scores": said})
    return score_records(template, records, rows.counts.rows, answers)
