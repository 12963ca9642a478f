"""Which solved examples stand before a question."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from recipelib.data.rows import row_key
from recipelib.prompts import Demonstration, PromptTemplate, Question, as_list
from recipelib.runtime import UserError

# [queries] texts -> [queries, pool] similarities.
Similarity = Callable[[Sequence[str]], np.ndarray]


class Demonstrations:
    """Draws demonstrations from training rows; call it with a row that is asked.

    What is asked itself, or a duplicate of it, never stands among its demonstrations, and no two of
    them are duplicates: the next row in the order takes the place.

    Args:
        rows: the pool.
        shots: how many.
        sampler: `first` rows, `random` ones, `balanced` (equally many of each class, in random
            order; of a class that runs out all), or `nearest`: the most similar ones of each row,
            the nearest last.
        draw: the number of the draw. `first` and `nearest` keep their rows and, but for draw 0,
            change their order.
        seed: of all draws.
        nearest: for each row that will be asked, by its number, the places of the pool's rows, the
            nearest first, one more than the shots (see `rank`); for that sampler only.
        solve: how a question is shown with its answer; by default the prompt and the answer, its
            rationale included.
    Raises:
        UserError: more shots than different rows, `balanced` without classes, or conversations.
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
        if shots and template.messages:
            raise UserError(
                f"{template.path}: messages: before a conversation there is no place for "
                "demonstrations; pass --shots 0"
            )
        if sampler == "balanced" and not template.label:
            raise UserError(
                "--sampler balanced: the template has no classes; choose first, random or nearest"
            )
        self.template, self.rows, self.shots = template, rows, shots
        self._seed = f"{seed}-{draw}"
        self._nearest = nearest
        self._reorders = sampler == "balanced" or (draw > 0 and sampler != "random")
        self._solve = solve or (lambda one: (template.prompt(one), one.target))
        self._keys = [row_key(template, row) for row in rows]
        generator = random.Random(self._seed)
        order = list(range(len(rows)))
        if sampler in ("random", "balanced"):
            generator.shuffle(order)
        order = _distinct(order, self._keys)
        self._queues = [order]
        if sampler == "balanced":
            classes: dict[str, list[int]] = {label: [] for label in template.verbalizer}
            for place in order:
                label = template.read_class(rows[place][template.column(template.label)])
                classes[label].append(place)
            # Where the shots do not divide evenly, the draw decides which classes get one more.
            self._queues = list(classes.values())
            generator.shuffle(self._queues)
        self._choose(self._queues, None)  # fails where the rows are too few
        self._solved: dict[tuple[int, ...], list[Demonstration]] = {}

    def __call__(self, number: int, row: Mapping[str, Any]) -> list[Demonstration]:
        """The demonstrations of a row, which is the `number`-th that is asked.

        Raises:
            UserError: without this row too few different ones are left.
        """
        queues = self._queues if self._nearest is None else [self._nearest[number]]
        chosen = tuple(self._choose(queues, row_key(self.template, row)))
        if chosen not in self._solved:
            self._solved[chosen] = [
                self._solve(self._question(place, at))
                for at, place in enumerate(self._arrange(chosen))
            ]
        return self._solved[chosen]

    def _choose(self, queues: Sequence[Sequence[int]], asked: str | None) -> list[int]:
        """Places that do not ask `asked`, the first of each queue, then the second, and so on."""
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

    def _question(self, place: int, at: int) -> Question:
        """Of a row that asks several questions one: by turns one whose answer says yes, or names
        something, and one of the others.
        """
        says: dict[bool, list[Question]] = {True: [], False: []}
        for one in self.template.questions(self.rows[place]):
            yes = one.asked == one.label if self.template.asks_each_word else bool(one.references)
            says[yes].append(one)
        wanted = at % 2 == 0
        some = says[wanted] or says[not wanted]
        return random.Random(f"{self._seed}-{place}").choice(some)


def row_text(template: PromptTemplate, row: Mapping[str, Any]) -> str:
    """What a row says, without the template's own words."""
    values = template.variables(row)
    parts = (as_list(values.get(name, "")) for name in sorted(template.prompt_variables))
    return "\n".join(" ".join(map(str, part)) for part in parts)


def bm25(pool: Sequence[str], k1: float = 1.5, b: float = 0.75) -> Similarity:
    """Okapi BM25 (Robertson and Zaragoza 2009) of queries and the texts of a pool, whose words are
    compared without case. The rarity of a word is log(1 + (N - n + 0.5) / (n + 0.5)) for n of N
    texts that hold it, so that none counts against a text.
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
    similarity: Similarity, queries: Sequence[str], keys: Sequence[str], most: int, chunk: int = 64
) -> list[list[int]]:
    """For each query the places of the pool's `most` most similar rows, the nearest first; of
    equals the first, of duplicates one.

    Args:
        keys: of each row of the pool what it asks (`row_key`).
        chunk: queries that are compared with the whole pool at once.
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
    """For each row that is asked the places of the pool's rows that are most like it, the nearest
    first, one more than the shots: a row may be in the pool itself.

    Args:
        similarity_of: from the texts of the pool and of the rows how similar they are; by default
            by their words (`bm25`).
    """
    texts, queries = ([row_text(template, row) for row in rows] for rows in (pool, asked))
    similarity = similarity_of(texts, queries) if similarity_of else bm25(texts)
    keys = [row_key(template, row) for row in pool]
    return rank(similarity, queries, keys, most=shots + 1)


def _distinct(order: Iterable[int], keys: Sequence[str]) -> list[int]:
    """The places in the order without those whose key stood before."""
    first: dict[str, int] = {}
    for place in order:
        first.setdefault(keys[place], place)
    return list(first.values())
