"""Many prompts as one tree of tokens: shared beginnings are computed once, and the rest is packed
into few forward passes without padding.

Whole prompts are compared token by token, since a text that is cut into a shared part and the rest
may be encoded differently from the whole. Sorting brings rows whose prompts begin alike side by
side. A beginning that many forward passes need is kept as keys and values (see `shared_cache.py`);
a short one is cheaper to compute again in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

# Every forward pass has a fixed cost: a beginning gets a pass of its own where that saves at least
# this many tokens.
WORTH_KEEPING = 64


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        members: the numbers of its prompts, in the order of their tokens.
        kept: how many first tokens, the same in all of them, are computed before and kept.
        tokens: how many tokens it computes.
    """

    members: tuple[int, ...]
    kept: int
    tokens: int


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many first tokens two sequences (lists both, or tuples) have in common."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def plan_passes(prompts: Sequence[Sequence[int]], extra: Sequence[int], budget: int) -> list[Pass]:
    """Forward passes of at most `budget` tokens. A longer prompt gets one of its own, with all but
    its last token kept: what is kept can be computed in parts.

    Args:
        prompts: ids of each prompt, at least one.
        extra: how many tokens are computed after each prompt.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda number: (prompts[number], number))
    rows = [prompts[number] for number in order]
    shared = [0, *map(common_length, rows, rows[1:])]  # with the row before
    own = [
        len(row) - old + extra[number] for row, old, number in zip(rows, shared, order, strict=True)
    ]
    sums = [0, *accumulate(own)]

    def tokens(start: int, end: int, kept: int) -> int:
        """What the rows from `start` to before `end` cost, if the first `kept` tokens, which they
        share, are there.
        """
        return sums[end] - sums[start] + shared[start] - kept

    kept = [0] * len(rows)
    branches = [(0, len(rows), 0)]
    while branches:  # of the tree: rows from start to before end, of which `there` tokens are kept
        start, end, there = branches.pop()
        cost = tokens(start, end, there)
        if cost <= budget or end - start == 1:
            continue
        fork = min(shared[start + 1 : end])
        # At least the last token of each row is computed in a pass: the answer is read from it.
        common = min(fork, min(len(row) for row in rows[start:end]) - 1)
        if (common - there) * (-(-cost // budget) - 1) >= WORTH_KEEPING:
            there = common
            kept[start:end] = [there] * (end - start)
        cuts = [place for place in range(start + 1, end) if shared[place] == fork]
        branches += [
            (first, last, there) for first, last in zip([start, *cuts], [*cuts, end], strict=True)
        ]

    passes: list[Pass] = []
    first = 0
    for place in range(1, len(rows) + 1):
        if (
            place < len(rows)
            and kept[place] == kept[first]
            and shared[place] >= kept[first]
            and tokens(first, place + 1, kept[first]) <= budget
        ):
            continue
        members, there = tuple(order[first:place]), kept[first]
        if len(members) == 1 and tokens(first, place, there) > budget:
            there = len(rows[first]) - 1  # what is kept is computed in parts
        passes.append(Pass(members, there, tokens(first, place, there)))
        first = place
    return passes


@dataclass
class Tree:
    """Tokens, each of which follows its parent; a parent stands before its children.

    Attributes:
        ids: [n] tokens.
        parents: [n] the place of the token before each; -1 for what follows the kept beginning.
        depths: [n] how many tokens of the tree precede each on its path.
    """

    ids: list[int]
    parents: list[int]
    depths: list[int]

    def __init__(self):
        self.ids, self.parents, self.depths = [], [], []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, ids: Sequence[int], parent: int = -1) -> list[int]:
        """Add tokens that follow `parent` one after the other, unless they are there already.

        Returns:
            Their places.
        """
        places = []
        for token in ids:
            place = self._children.get((parent, token))
            if place is None:
                place = self._children[parent, token] = len(self.ids)
                self.ids.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            places.append(place)
            parent = place
        return places

    def visible(self, kept: int) -> torch.Tensor:
        """[n, kept + n] booleans: each token sees the kept ones, those on its path and itself."""
        size = len(self.ids)
        sees = torch.zeros(size, kept + size, dtype=torch.bool)
        sees[:, :kept] = True
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                sees[place] = sees[parent]
            sees[place, kept + place] = True
        return sees
