"""Draws rows: at random with the classes' shares; how many of each task in a mixture, and which;
few-shot rows of each class.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from recipelib.data.checking import StoredRows, row_labels, select
from recipelib.prompts import PromptTemplate
from recipelib.runtime import UserError


def random_order(count: int, seed: int) -> np.ndarray:
    """0 to count - 1 in random order. It uses `random.Random.random` only, the one method whose
    numbers are the same in every version of Python.
    """
    generator = random.Random(seed)
    keys = np.fromiter((generator.random() for _ in range(count)), np.float64, count)
    return np.argsort(keys, kind="stable")


def order_by_shares(classes: np.ndarray, seed: int, count: int) -> np.ndarray:
    """0 to n - 1 in random order, of which every beginning has the classes' shares: of each class
    as many rows as are due to it, rounded up or down. So a draw is stratified, as scikit-learn's
    `train_test_split(stratify=...)` is, and a smaller draw is the beginning of a larger one.

    Rounding the shares of each draw by itself cannot do both (the Alabama paradox); the quota
    method (Balinski and Young 1975) can: the k-th row is of a class that has fewer rows than are
    due to it by then, and of these of the one that must have its next row first.

    Args:
        classes: [n] numbers.
        count: how many rows will be drawn; behind several times as many the order is random.
    """
    rows, order = len(classes), random_order(len(classes), seed)
    _, numbers, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return order
    place = np.argsort(order)  # of each row in the random order
    grouped = order[np.argsort(numbers[order], kind="stable")]  # class by class
    starts, sizes = np.cumsum(sizes) - sizes, sizes.tolist()
    waiting = [(1, number) for number in range(len(sizes))]  # from which step on, which class
    ready: list[tuple[int, int, int]] = []  # until which step; the row's place; its class
    given, drawn = [0] * len(sizes), []
    for step in range(1, min(rows, 4 * count + 1000) + 1):
        while waiting and waiting[0][0] <= step:
            _, number = heappop(waiting)
            until = -(-(given[number] + 1) * rows // sizes[number])
            row = grouped[starts[number] + given[number]]
            heappush(ready, (until, int(place[row]), number))
        _, at, number = heappop(ready)
        drawn.append(order[at])
        given[number] += 1
        if given[number] < sizes[number]:
            heappush(waiting, (given[number] * rows // sizes[number] + 1, number))
    return np.concatenate([drawn, order[~np.isin(order, drawn)]])


def order_to_hold_out(classes: np.ndarray, seed: int, count: int) -> np.ndarray:
    """As `order_by_shares`, for `count` rows that are to be kept out of training: a class's only
    row comes last, if that leaves enough.
    """
    _, numbers, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    alone = sizes[numbers] == 1
    others = np.flatnonzero(~alone)
    if len(others) < count:
        return order_by_shares(classes, seed, count)
    order = others[order_by_shares(classes[others], seed, count)]
    return np.concatenate([order, np.flatnonzero(alone)])


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
    """`count` rows of a task: each as often as every other, or once more; the latter with the
    classes' shares.
    """
    drawn: list[np.ndarray] = []
    left = count
    while left >= len(rows):
        drawn.append(np.arange(len(rows)))
        left -= len(rows)
    if left:
        known = isinstance(rows, StoredRows)
        classes = rows.labels if known else np.zeros(len(rows), dtype=np.int64)
        drawn.append(np.sort(order_by_shares(classes, seed, left)[:left]))
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
    if template.options:
        raise UserError(
            f"--per_class {per_class}: {template.path.name} has options, which are no classes; "
            "pass --max_train_samples"
        )
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
