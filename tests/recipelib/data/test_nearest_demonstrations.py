"""Rows are ranked by how alike they are, and BM25 is its formula."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_fields import SORT, make

from recipelib.data.demonstrations import Demonstrations, bm25, rank, row_text
from recipelib.data.rows import row_key

texts = st.lists(
    st.sampled_from(["a", "film", "Film", "of", "great", "gréat", "x1", ".", "--"]), max_size=8
).map(" ".join)


def slow_bm25(query, pool, k1=1.5, b=0.75):
    """The formula, word by word and text by text."""
    words = [re.findall(r"\w+", text.lower()) for text in pool]
    average = sum(map(len, words)) / len(words)
    scores = []
    for text in words:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            holding = sum(word in other for other in words)
            if word not in text:
                continue
            rarity = math.log(1 + (len(pool) - holding + 0.5) / (holding + 0.5))
            often, length = text.count(word), len(text) / average
            score += rarity * often * (k1 + 1) / (often + k1 * (1 - b + b * length))
        scores.append(score)
    return scores


@given(st.lists(texts, min_size=1, max_size=12), st.lists(texts, min_size=1, max_size=4))
def test_bm25_equals_a_loop_over_words_and_texts(pool, queries):
    found = bm25(pool)(queries)

    assert found.shape == (len(queries), len(pool))
    for query, values in zip(queries, found, strict=True):
        assert values == pytest.approx(slow_bm25(query, pool), abs=1e-12)


def test_bm25_prefers_rare_words():
    pool = ["the film was the best", "the acting was wooden", "the film was long", "a wooden ship"]

    values = bm25(pool)(["the wooden ship sank"])[0]

    assert np.argsort(-values).tolist() == [3, 1, 0, 2]


def test_a_pool_without_words_is_equally_far_from_everything():
    assert bm25(["...", ""])(["a film", ""]).tolist() == [[0, 0], [0, 0]]


@given(
    st.lists(st.integers(0, 6), max_size=15),
    st.lists(st.integers(0, 6), max_size=8),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_ranks_are_by_similarity_then_place_without_duplicates(pool, asked, most, chunk):
    def similarity(some):
        return np.array([[-abs(int(one) - other) for other in pool] for one in some])

    found = rank(similarity, list(map(str, asked)), list(map(str, pool)), most, chunk)

    expected = []
    for one in asked:
        first = sorted({number: pool.index(number) for number in pool}.values())
        expected.append(sorted(first, key=lambda at, one=one: abs(one - pool[at]))[:most])
    assert found == expected


def test_nearest_by_words_are_the_texts_that_say_alike():
    rows = [
        {"text": text, "label": "good"} for text in ("a dull plot", "great cast", "great songs")
    ]
    query, asks = {"text": "songs that are great"}, make(SORT)
    keys = [row_key(asks, row) for row in rows]
    nearest = rank(bm25([row_text(asks, row) for row in rows]), [query["text"]], keys, 3)

    shown = Demonstrations(asks, rows, 2, "nearest", nearest=nearest)(0, query)

    assert shown == [("Q: great cast", " great"), ("Q: great songs", " great")]
