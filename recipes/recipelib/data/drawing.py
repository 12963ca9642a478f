"""Draws rows: how many of each task in a mixture, and which; few-shot rows of each class."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipelib.data.checking import row_labels, select
from recipelib.prompts import PromptTemplate
from recipelib.runtime import UserError


def mixture_counts(sizes: Sequence[int], mixing: str, total: int | None = None) -> list[int]:
    """How many rows of each task an epoch has. A task whose share is larger than the task is
    repeated within the epoch, see `draw_rows`.

    Args:
        sizes: how many rows each task has, at least one.
        mixing: "size", "equal", or a temperature T as text: shares in proportion to size ** (1 / T)
            (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2), which is "size" at T = 1 and
            comes close to "equal" for a large T.
        total: the most rows of the epoch, all tasks together, which are never more than there are;
            None for all.
    Raises:
        UserError: any other `mixing`, or fewer rows than tasks.
    """
    try:
        exponent = {"size": 1.0, "equal": 0.0}.get(mixing)
        exponent = 1 / float(mixing) if exponent is None else exponent
    except (ValueError, ZeroDivisionError):
        exponent = -1.0
    if not 0 <= exponent <= 1:
        raise UserError(f"--mixing {mixing}: must be size, equal, or a temperature of 1 or more")
    total = sum(sizes) if total is None else min(total, sum(sizes))
    if total < len(sizes):
        raise UserError(f"--max_train_samples {total}: fewer than the {len(sizes)} tasks; raise it")
    weights = [size**exponent for size in sizes]
    shares = [total * weight / sum(weights) for weight in weights]
    # Rounded down, but to at least one row. Rows still missing go to the shares that lost most;
    # rows too many are taken from the largest counts.
    counts = [max(1, int(share)) for share in shares]
    order = sorted(range(len(sizes)), key=lambda task: int(shares[task]) - shares[task])
    for task in order[: max(0, total - sum(counts))]:
        counts[task] += 1
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    return counts


def draw_rows(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> Sequence[Mapping]:
    """`count` rows of a task: each as often as every other, or once more."""
    drawn: list[np.ndarray] = []
    generator, left = random.Random(seed), count
    while left >= len(rows):
        drawn.append(np.arange(len(rows)))
        left -= len(rows)
    if left:
        keys = np.array([generator.random() for _ in range(len(rows))])
        drawn.append(np.sort(np.argsort(keys, kind="stable")[:left]))
    return select(rows, np.concatenate(drawn))


def few_shot_rows(
    template: PromptTemplate, rows: Sequence[Mapping], per_class: int, seed: int
) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
    """A draw of `per_class` rows of each class to train on, and as many others to choose the best
    pass by (as LM-BFF, Gao et al. 2021, section 3.1). The training rows are in random order, the
    others class by class.

    Raises:
        UserError: a class has too few rows.
    """
    draw = random.Random(seed)
    train, validation = [], []
    labels = row_labels(template, rows)
    for number, label in enumerate(template.verbalizer):
        rows_of_label = np.flatnonzero(labels == number).tolist()
        if len(rows_of_label) < 2 * per_class:
            raise UserError(
                f"--per_class {per_class}: takes {2 * per_class} rows of each class, half of them "
                f"to choose by, and {label!r} has {len(rows_of_label)}; ask for fewer"
            )
        drawn = draw.sample(rows_of_label, 2 * per_class)
        train += drawn[:per_class]
        validation += drawn[per_class:]
    draw.shuffle(train)
    return select(rows, train), select(rows, validation)
