"""The loss of the gold answers, for templates whose answers cannot be compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from recipelib.encoding import (
    IGNORED,
    Counts,
    Demonstrate,
    DoesNotFit,
    PromptEncoder,
    beginning,
    with_bar,
)
from recipelib.evaluation.scores import FewShotScore, TaskScore, blocks, spool_prompts
from recipelib.inference import Journal, log_likelihoods
from recipelib.prompts import Demonstration
from recipelib.runtime import Spool, UserError


def score_loss(
    model,
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    *,
    demonstrate: Callable[[int, Mapping], Sequence[Demonstration]] | None = None,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> TaskScore:
    """Mean negative log-likelihood (nats) per answer token: the training loss, on these rows. Lower
    is better.

    Args:
        demonstrate: gives the demonstrations of a row, from its number and itself; not for
            conversations.
    """
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    records, spool = [], Spool()
    tokenizer = encoder.text.tokenizer
    for first, part, bar in blocks(rows, 1, description):
        encoding = bar and f"{bar}: prompts"
        requests, kept = _requests(encoder, with_bar(part, encoding), first, demonstrate)
        model.eval()
        scores = log_likelihoods(
            model, requests, batch_tokens=batch_tokens, description=bar, journal=journal
        )
        before = len(records)
        for number, (prompt, (answer,)), (value,) in zip(kept, requests, scores, strict=True):
            sums[number] -= value
            counts[number] += len(answer)
            records.append(
                {
                    "row": number,
                    "prompt": tokenizer.decode(prompt),
                    "answer": tokenizer.decode(answer),
                    "prediction": None,
                    "score": -value / len(answer),
                }
            )
        if len(part) < len(rows):
            spool_prompts(records[before:], spool)
    used = counts > 0
    n = int(used.sum())
    if not n:
        return TaskScore("loss", math.nan, math.nan, left_out=len(rows))
    loss = sums.sum() / counts.sum()
    # The standard error of a ratio of two sums over rows (linearized); a single row has none.
    residuals = (sums - loss * counts)[used]
    stderr = math.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum() if n > 1 else math.nan
    return TaskScore("loss", float(loss), stderr, {}, records, n, len(rows) - n)


def _requests(
    encoder: PromptEncoder,
    rows: Iterable[Mapping],
    first: int,
    demonstrate: Callable[[int, Mapping], Sequence[Demonstration]] | None,
) -> tuple[list[tuple], list[int]]:
    """What is scored of rows, each what stands before an answer and the answer, and the number of
    each one's row; rows are numbered from `first`.
    """
    template, requests, kept = encoder.template, [], []
    for number, row in enumerate(rows, first):
        shown = demonstrate(number, row) if demonstrate else ()
        for question in template.questions(row):
            try:
                if template.conversation:
                    examples = encoder.conversation(question, Counts())
                else:
                    examples = [encoder.training_example(question, shown)[:2]]
            except DoesNotFit:
                continue
            except UserError as error:  # the chat template rejects the turns
                raise UserError(
                    f"evaluation row {number + 1}{beginning(question)}: {error}"
                ) from None
            for ids, labels in examples:
                start = 0
                for ignored, run in groupby(labels, lambda label: label == IGNORED):
                    end = start + len(list(run))
                    if not ignored:  # an answer; a conversation has several
                        requests.append((ids[:start], [ids[start:end]]))
                        kept.append(number)
                    start = end
    return requests, kept


def score_losses(
    model,
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    draws: Sequence[Demonstrate | None],
    **options,
) -> FewShotScore:
    """`score_loss` for each draw of demonstrations."""
    start = time.perf_counter()
    scores = []
    for number, demonstrate in enumerate(draws):
        scores.append(score_loss(model, encoder, rows, demonstrate=demonstrate, **options))
        scores[-1].records = [{"draw": number, **record} for record in scores[-1].records]
    return FewShotScore(scores, seconds=time.perf_counter() - start)
