"""Chooses the solved examples that stand before a question."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from recipelib.data.checking import row_key, row_keys, row_labels
from recipelib.prompts import Demonstration, PromptTemplate, Question, as_list
from recipelib.runtime import UserError

# From [queries] texts to [queries, pool] similarities.
Similarity = Callable[[Sequence[str]], np.ndarray]


class Demonstrations:
    """Draws demonstrations from training rows; call it with the row that is asked about.

    A row that asks the same as that row is never among its demonstrations, and no two
    demonstrations ask the same: the next row in the order takes the place.

    Args:
        rows: the pool, from which demonstrations are drawn.
        shots: how many demonstrations stand before a question.
        sampler: which rows of the pool: the `first`; `random` ones; `balanced`: equally many of
            each class, in random order, or all rows of a class that has fewer; or `nearest`: those
            most similar to the row that is asked about, the nearest last.
        draw: the number of the draw. For `first` and `nearest` every draw has the same
            demonstrations, and draws after 0 shuffle their order.
        seed: the seed that all draws share.
        nearest: for the sampler `nearest` only: for each row that will be asked about, in order,
            the places of pool rows, the nearest first, one more than the shots (see `rank`).
        solve: how a question is shown with its answer; by default its prompt, and its answer with
            the rationale.
    Raises:
        UserError: more shots than different rows, `balanced` without classes, or a template of
            conversations.
    """

    def __init__(
        self,
        template: PromptTemplate,
        rows: Sequence[Mapping[str, Any]],
        shots: int,
        sampler: str,
        *,
        draw: int = 0,
        seed: int = 0,
        nearest: Sequence[Sequence[int]] | None = None,
        solve: Callable[[Question], Demonstration] | None = None,
    ):
        if shots and template.conversation:
            raise UserError(
                f"{template.path}: {template.conversation}: before a conversation there is no "
                "place for demonstrations; pass --shots 0"
            )
        if sampler == "balanced" and not template.verbalizer:
            raise UserError(
                "--sampler balanced: the template has no classes; choose first, random or nearest"
            )
        self.template, self.rows, self.shots = template, rows, shots
        self._seed = f"{seed}-{draw}"
        self._nearest = nearest
        self._reorders = sampler == "balanced" or (draw > 0 and sampler != "random")
        self._solve = solve or (lambda question: (template.prompt(question), question.target))
        self._keys = row_keys(template, rows).tolist()
        generator = random.Random(self._seed)
        order = list(range(len(rows)))
        if sampler in ("random", "balanced"):
            generator.shuffle(order)
        order = _distinct(order, self._keys)
        self._queues = [order]
        if sampler == "balanced":
            labels = row_labels(template, rows).tolist()
            self._queues = [[] for _ in template.verbalizer]
            for place in order:
                self._queues[labels[place]].append(place)
            # If the shots do not divide evenly, the draw decides which classes get one more.
            generator.shuffle(self._queues)
        self._choose(self._queues, None)  # refuses a pool with too few rows
        self._solved: dict[tuple[int, int], Demonstration] = {}

    def __call__(self, number: int, row: Mapping[str, Any]) -> list[Demonstration]:
        """The demonstrations for the row with this number among those asked about, from 0.

        Raises:
            UserError: too few different rows are left without this one.
        """
        queues = self._queues if self._nearest is None else [self._nearest[number]]
        chosen = self._arrange(self._choose(queues, row_key(self.template, row)))
        return [self._show(place, position % 2) for position, place in enumerate(chosen)]

    def _show(self, place: int, parity: int) -> Demonstration:
        """A row at an even or an odd position, solved; all rows that are shown it share it."""
        if (place, parity) not in self._solved:
            self._solved[place, parity] = self._solve(self._question(place, parity))
        return self._solved[place, parity]

    def _choose(self, queues: Sequence[Sequence[int]], asked: int | None) -> list[int]:
        """As many places as shots, none of whose rows asks `asked`: the first of each queue, then
        the second of each, and so on.
        """
        others = [(place for place in queue if self._keys[place] != asked) for queue in queues]
        by_turns = (place for turn in zip_longest(*others) for place in turn if place is not None)
        chosen = list(islice(by_turns, self.shots))
        if len(chosen) < self.shots:
            raise UserError(
                f"--shots {self.shots}: needs {self.shots} different training rows besides what is "
                f"asked, there are {len(chosen)}; lower it or raise --max_train_samples"
            )
        return chosen

    def _arrange(self, chosen: Sequence[int]) -> list[int]:
        places = list(chosen)
        if self._nearest is not None:
            places.reverse()
        if self._reorders:
            random.Random(f"{self._seed}-order").shuffle(places)
        return places

    def _question(self, place: int, position: int) -> Question:
        """One question of a row that may ask several. At even positions its answer says yes (pairs)
        or names something (entities), at odd positions it does not, as far as the row has both.
        """
        by_answer: dict[bool, list[Question]] = {True: [], False: []}
        for question in self.template.questions(self.rows[place]):
            if self.template.asks_each_word:
                yes = question.asked == question.label
            else:
                yes = bool(question.references)
            by_answer[yes].append(question)
        wanted = position % 2 == 0
        questions = by_answer[wanted] or by_answer[not wanted]
        return random.Random(f"{self._seed}-{place}").choice(questions)


def row_text(template: PromptTemplate, row: Mapping[str, Any]) -> str:
    """What a row says, without the template's own words."""
    values = template.variables(row)
    lists = (as_list(values.get(name, "")) for name in sorted(template.prompt_variables))
    return "\n".join(" ".join(map(str, elements)) for elements in lists)


def bm25(pool: Sequence[str], k1: float = 1.5, b: float = 0.75) -> Similarity:
    """Okapi BM25 (Robertson and Zaragoza 2009) between queries and the texts of a pool; words are
    compared without case. The weight of a word that n of N texts hold is
    log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=r"(?u)\w+")
    try:
        counts = vectorizer.fit_transform(pool).astype(np.float64).tocsr()
    except ValueError:  # no text has a word
        return lambda queries: np.zeros((len(queries), len(pool)))
    lengths = np.asarray(counts.sum(1)).ravel()
    holding = np.bincount(counts.indices, minlength=counts.shape[1])
    rarity = np.log1p((len(pool) - holding + 0.5) / (holding + 0.5))
    places = np.repeat(np.arange(len(pool)), np.diff(counts.indptr))
    counts.data *= (k1 + 1) / (counts.data + k1 * (1 - b + b * lengths[places] / lengths.mean()))
    weights = counts.multiply(rarity).tocsr().T

    def similarity(queries: Sequence[str]) -> np.ndarray:
        return (vectorizer.transform(queries) @ weights).toarray()

    return similarity


def rank(
    similarity: Similarity, queries: Sequence[str], keys: Sequence[int], most: int, chunk: int = 64
) -> list[list[int]]:
    """For each query, the places of the `most` most similar rows of the pool, the nearest first.
    Equally similar rows keep the pool's order; of rows with the same key only the first counts.

    Args:
        keys: what each row of the pool asks (`row_key`).
        chunk: how many queries are compared with the whole pool at once.
    """
    places = np.array(_distinct(range(len(keys)), keys), dtype=int)
    ranked = []
    for start in range(0, len(queries), chunk):
        for values in similarity(queries[start : start + chunk]):
            order = np.argsort(-values[places], kind="stable")
            ranked.append(places[order[:most]].tolist())
    return ranked


def nearest_rows(
    template: PromptTemplate,
    pool: Sequence[Mapping[str, Any]],
    asked: Sequence[Mapping[str, Any]],
    shots: int,
    similarity_of: Callable[[Sequence[str], Sequence[str]], Similarity] | None = None,
) -> list[list[int]]:
    """For each row that is asked about, the places of the pool's most similar rows, the nearest
    first; one more than the shots, because the row may be in the pool itself.

    Args:
        similarity_of: makes a `Similarity` from the texts of the pool and of the rows that are
            asked about; by default it compares their words (`bm25`).
    """
    texts, queries = ([row_text(template, row) for row in rows] for rows in (pool, asked))
    similarity = similarity_of(texts, queries) if similarity_of else bm25(texts)
    keys = row_keys(template, pool).tolist()
    return rank(similarity, queries, keys, most=shots + 1)


def _distinct(order: Iterable[int], keys: Sequence[int]) -> list[int]:
    """The places in order, without those whose key an earlier place has."""
    first: dict[int, int] = {}
    for place in order:
        first.setdefault(keys[place], place)
    return list(first.values())
