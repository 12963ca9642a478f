"""The query is never among its demonstrations, every sampler does what it says, and the rows are
gone through once.
"""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_cases import CASES, tagged
from template_fields import ASK, NAMES, SORT, make, one_line

from recipelib.data.checking import row_key
from recipelib.data.demonstrations import Demonstrations, bm25, rank, row_text
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

SAMPLERS = ["first", "random", "balanced", "nearest"]
LABELS = {"bad": ["bad"], "good": ["good"], "odd": ["odd", "strange"]}


def template(**more):
    return make(SORT, verbalizer=LABELS, **more)


def film(number, label=None):
    """Its class follows from the number, so that duplicates agree."""
    return {"text": f"film {number}", "label": label or list(LABELS)[number % 3]}


def films(count):
    return [film(number) for number in range(count)]


def numbers(shown):
    """Which films stand in demonstrations."""
    return [int(prompt.rpartition(" ")[2]) for prompt, _ in shown]


def nearest_of(rows, queries, shots):
    """By the distance of the films' numbers: a similarity that can be seen at a glance."""
    stored = np.array([int(row["text"].split()[1]) for row in rows])

    def similarity(texts):
        asked = np.array([int(text.split()[1]) for text in texts])
        return -np.abs(asked[:, None] - stored[None])

    keys = [row_key(template(), row) for row in rows]
    return rank(similarity, [row["text"] for row in queries], keys, shots + 1)


def demonstrations(rows, shots, sampler, queries=(), **options):
    nearest = nearest_of(rows, queries, shots) if sampler == "nearest" else None
    return Demonstrations(template(), rows, shots, sampler, nearest=nearest, **options)


def line(action):
    with pytest.raises(UserError) as error:
        action()
    return one_line(error)


# What must never stand there


@st.composite
def drawn_pools(draw):
    """Films of which many are the same, and queries of which many are among them."""
    some = st.integers(0, 7)
    pool = draw(st.lists(some, min_size=1, max_size=20))
    return list(map(film, pool)), list(map(film, draw(st.lists(some, min_size=1, max_size=6))))


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(drawn=drawn_pools(), shots=st.integers(0, 6), draw=st.integers(0, 2))
def test_exactly_so_many_different_rows_and_never_what_is_asked(sampler, drawn, shots, draw):
    rows, queries = drawn
    different = {row["text"] for row in rows}
    if len(different) < shots:
        line(lambda: demonstrations(rows, shots, sampler, queries, draw=draw))
        return
    demonstrate = demonstrations(rows, shots, sampler, queries, draw=draw)

    for number, query in enumerate(queries):
        if len(different - {query["text"]}) < shots:
            line(lambda number=number, query=query: demonstrate(number, query))
            continue
        shown = demonstrate(number, query)

        assert len(shown) == len(set(shown)) == shots
        assert f"Q: {query['text']}" not in [prompt for prompt, _ in shown]
        assert set(shown) <= {(f"Q: {row['text']}", f" {row['label']}") for row in rows}


@given(drawn=drawn_pools(), shots=st.integers(1, 6), draw=st.integers(0, 2))
def test_balanced_is_as_even_as_the_classes_allow(drawn, shots, draw):
    rows, queries = drawn
    for number, query in enumerate(queries):
        left = {row["text"]: row["label"] for row in rows if row["text"] != query["text"]}
        if len(left) < shots:
            continue
        demonstrate = demonstrations(rows, shots, "balanced", draw=draw)
        counts = Counter(answer.strip() for _, answer in demonstrate(number, query))
        there = Counter(left.values())
        for label in there:
            assert counts[label] == there[label] or counts[label] >= max(counts.values()) - 1


def test_balanced_stays_balanced_for_a_query_that_is_one_of_the_demonstrations():
    rows, replaced = films(60), 0
    for shots in (2, 3, 4, 6, 7):
        demonstrate = demonstrations(rows, shots, "balanced")
        usual = demonstrate(0, {"text": "none of them"})
        for number, row in enumerate(rows):
            shown = demonstrate(number, row)
            counts = Counter({label: 0 for label in LABELS})
            counts.update(answer.strip() for _, answer in shown)
            assert max(counts.values()) - min(counts.values()) <= 1
            assert len(set(usual) - set(shown)) == (number in numbers(usual))
            replaced += number in numbers(usual)
    assert replaced == 2 + 3 + 4 + 6 + 7


def test_a_duplicate_differs_in_nothing_that_is_asked():
    rows = [{"text": "a", "label": "good", "id": 1}, {"text": "a", "label": "bad", "id": 2}]
    rows += [{"text": "A", "label": "bad"}, {"text": "b", "label": "bad"}]

    shown = Demonstrations(template(), rows, 2, "first")(0, {"text": "a", "id": 3})

    assert shown == [("Q: A", " bad"), ("Q: b", " bad")]


def test_duplicates_are_found_by_the_columns_that_the_template_maps():
    sst2 = PromptTemplate.load("sst2")
    rows = [{"sentence": text, "label": 1} for text in ("one", "one", "two")]

    shown = Demonstrations(sst2, rows, 1, "first")(0, {"sentence": "one"})

    assert shown == [("The movie review is: two\nThe sentiment of the review is", " positive")]
    assert row_key(sst2, rows[0]) == row_key(sst2, {**rows[1], "label": 0, "idx": 7})
    assert row_key(sst2, rows[0]) != row_key(sst2, rows[2])
    alpaca, rows = PromptTemplate.load("alpaca"), CASES["alpaca"].rows
    assert row_key(alpaca, rows[1]) == row_key(alpaca, rows[2])  # which lacks an optional column


# Samplers and draws


def test_first_keeps_its_rows_and_further_draws_change_their_order():
    drawn = [demonstrations(films(30), 6, "first", draw=draw) for draw in range(5)]

    orders = [numbers(one(0, film(100))) for one in drawn]

    assert orders[0] == [0, 1, 2, 3, 4, 5]
    assert all(sorted(order) == orders[0] for order in orders)
    assert len(set(map(tuple, orders))) == 5
    assert numbers(drawn[0](0, film(2))) == [0, 1, 3, 4, 5, 6]


def test_nearest_stand_before_each_row_the_nearest_last_and_further_draws_change_their_order():
    queries = [film(10), film(21), film(50)]
    drawn = [demonstrations(films(30), 5, "nearest", queries, draw=draw) for draw in range(4)]

    orders = [[numbers(one(at, query)) for at, query in enumerate(queries)] for one in drawn]

    # Of equally near ones the first in the pool is the nearer.
    assert orders[0] == [[7, 12, 8, 11, 9], [18, 23, 19, 22, 20], [25, 26, 27, 28, 29]]
    for order in orders[1:]:
        assert [sorted(one) for one in order] == [sorted(one) for one in orders[0]]
        assert order != orders[0]
    assert len({str(order) for order in orders}) == 4


def test_a_query_that_stands_in_the_pool_a_hundred_times_still_finds_its_neighbors():
    rows = [film(3)] * 100 + films(8)

    shown = demonstrations(rows, 4, "nearest", [film(3)])(0, film(3))

    assert numbers(shown) == [5, 1, 4, 2]


@pytest.mark.parametrize("sampler", ["random", "balanced"])
def test_draws_show_different_rows(sampler):
    drawn = [demonstrations(films(90), 6, sampler, draw=draw) for draw in range(5)]
    seeded = demonstrations(films(90), 6, sampler, seed=1)

    found = {frozenset(numbers(one(0, film(100)))) for one in [*drawn, seeded]}

    assert len(found) == 6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_is_the_same_whenever_and_in_whatever_order_it_is_asked(sampler):
    rows, queries = films(30), films(12)
    for draw in range(3):
        one, other = (
            demonstrations(rows, 5, sampler, queries, draw=draw, seed=7) for _ in range(2)
        )
        there = [one(number, query) for number, query in enumerate(queries)]
        back = [other(number, query) for number, query in reversed(list(enumerate(queries)))]
        assert there == back[::-1]
        assert there == [one(number, query) for number, query in enumerate(queries)]


def test_balanced_is_in_random_order():
    orders = set()
    for seed in range(8):
        shown = demonstrations(films(60), 6, "balanced", seed=seed)(0, film(100))
        orders.add(tuple(answer for _, answer in shown))
        assert Counter(answer for _, answer in shown) == {" bad": 2, " good": 2, " odd": 2}

    # Neither in blocks nor in one round after the other.
    assert any(order[:3] != order[3:] for order in orders)
    assert len(orders) > 3


def test_which_class_gets_one_more_is_drawn():
    more = set()
    for draw in range(12):
        shown = demonstrations(films(60), 4, "balanced", draw=draw)(0, film(100))
        more |= {label for label, count in Counter(a for _, a in shown).items() if count == 2}

    assert more == {" bad", " good", " odd"}


def test_balanced_shows_all_of_a_class_that_runs_out():
    rows = [film(number, "bad") for number in range(20)] + [film(20, "good")]

    shown = demonstrations(rows, 5, "balanced")(0, film(100))
    without = demonstrations(rows, 5, "balanced")(0, film(20))

    assert Counter(answer for _, answer in shown) == {" bad": 4, " good": 1}
    assert Counter(answer for _, answer in without) == {" bad": 5}


def test_no_shots_are_no_demonstrations():
    for sampler in ("first", "random", "balanced"):
        assert demonstrations([], 0, sampler)(0, film(1)) == []


def test_all_rows_of_a_pool_may_be_shown():
    assert numbers(demonstrations(films(4), 4, "first")(0, film(9))) == [0, 1, 2, 3]


# Mistakes


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_too_few_different_rows_are_one_line_with_the_cure(sampler):
    rows = films(3) * 4
    message = line(lambda: demonstrations(rows, 4, sampler, films(1)))

    assert message == (
        "--shots 4: needs 4 different training rows besides what is asked, there are 3; lower it "
        "or raise --max_train_samples"
    )
    demonstrate = demonstrations(rows, 3, sampler, films(1))
    assert "there are 2" in line(lambda: demonstrate(0, film(0)))


def test_balanced_needs_classes():
    rows = [{"text": str(number), "gold": "x"} for number in range(9)]

    message = line(lambda: Demonstrations(make(ASK), rows, 2, "balanced"))

    assert message.startswith("--sampler balanced: the template has no classes; choose first")


def test_conversations_take_no_demonstrations():
    conversations = PromptTemplate.load("conversations")
    rows = CASES["conversations"].rows

    assert "--shots 0" in line(lambda: Demonstrations(conversations, rows, 1, "first"))
    assert Demonstrations(conversations, rows, 0, "first")(0, rows[0]) == []


# What is shown of a row


def gold(template, row):
    return {(template.prompt(one), one.target) for one in template.questions(row)}


@pytest.mark.parametrize("sampler", ["first", "random", "balanced"])
def test_of_a_pair_per_word_yes_and_no_are_shown_by_turns(sampler):
    pairs = PromptTemplate.load("next_sentence")
    labels = list(pairs.verbalizer)
    rows = [{"text": f"News {n}.", "label": labels[n % 4]} for n in range(40)]

    shown = Demonstrations(pairs, rows, 20, sampler)(0, {"text": "Other news."})

    assert [answer for _, answer in shown] == [" yes", " no"] * 10
    every = set().union(*(gold(pairs, row) for row in rows))
    assert set(shown) <= every
    denied = {
        prompt.split("about ")[1].split(".")[0] for prompt, answer in shown if answer == " no"
    }
    assert len(denied) > 2


def test_of_entity_types_one_with_names_and_one_without_are_shown_by_turns():
    wnut = PromptTemplate.load("wnut17")
    rows = [tagged(f"Town{n}/B-location", "is/O", f"Nice{n}/B-person") for n in range(12)]

    shown = Demonstrations(wnut, rows, 12, "first")(0, tagged("here/O"))

    assert all(one in gold(wnut, row) for one, row in zip(shown, rows, strict=True))
    names = [answer != " none" for _, answer in shown]
    assert names == [True, False] * 6
    assert len({prompt.split("Which ")[1].split(" does")[0] for prompt, _ in shown}) > 3


def test_a_row_without_names_shows_none_in_its_turn_and_one_full_of_names_a_name():
    types = make(NAMES)
    none = {"tokens": ["x"], "tags": ["O"]}
    full = {"tokens": ["Ada", "Rome"], "tags": ["B-PER", "B-LOC"]}

    shown = Demonstrations(types, [none, full], 2, "first")(0, {"tokens": ["y"], "tags": ["O"]})

    assert shown[0][1] == " none"
    assert shown[1] in {("Ada Rome person?", " Ada"), ("Ada Rome place?", " Rome")}


@pytest.mark.parametrize("name", ["gsm8k", "esnli", "sst2", "squad", "rte", "banking77"])
def test_a_demonstration_is_what_training_shows_its_rationale_included(name):
    case, asks = CASES[name], PromptTemplate.load(name)

    shown = Demonstrations(asks, case.rows, 2, "first")(0, case.rows[2])

    assert shown[0] == (case.prompt, case.target)
    assert shown[1] == next(iter(gold(asks, case.rows[1])))


def test_how_a_question_is_solved_can_be_given():
    def solve(question):
        return question.variables["text"], question.label

    shown = demonstrations(films(9), 2, "first", solve=solve)(0, film(50))

    assert shown == [("film 0", "bad"), ("film 1", "good")]


def test_the_text_of_a_row_is_what_its_columns_say():
    assert (
        row_text(PromptTemplate.load("wnut17"), tagged("Ed/B-person", "Lee/I-person")) == "Ed Lee"
    )
    assert row_text(PromptTemplate.load("sst2"), {"sentence": "Fine."}) == "Fine."
    rte = {"premise": "It rains.", "hypothesis": None, "label": "entailment"}
    assert row_text(PromptTemplate.load("rte"), rte) == "\nIt rains."


# Speed


class Counted(list):
    """Rows that count how often one of them is read."""

    reads = 0

    def __getitem__(self, place):
        self.reads += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("sampler", ["random", "balanced"])
def test_queries_do_not_go_through_the_rows_again(sampler, monkeypatch):
    rows, asks, keys = Counted(films(20_000)), template(), []
    demonstrate = Demonstrations(asks, rows, 4, sampler)
    usual = demonstrate(0, film(30_000))
    rows.reads = 0
    monkeypatch.setattr(
        "recipelib.data.demonstrations.row_key", lambda *a: keys.append(a) or row_key(*a)
    )
    queries = [film(number) for number in (*numbers(usual), *range(30_000, 30_296))]

    found = [demonstrate(number, query) for number, query in enumerate(queries)]

    assert len(keys) == 300
    assert rows.reads == 4  # those that take the place of one that asks the same
    assert all(one == usual for one in found[4:])


# The nearest rows

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
