"""How many rows each task of a mixture gives."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import load, numbered, write

from recipelib.data.drawing import (
    draw_rows,
    mixture_counts,
    order_by_shares,
    order_to_hold_out,
    random_order,
)
from recipelib.runtime.errors import UserError

sizes = st.lists(st.integers(1, 10**6), min_size=1, max_size=8)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 9))
def test_every_beginning_of_an_order_has_each_classes_share_rounded_up_or_down(some, seed):
    classes = np.repeat(np.arange(len(some)), some)
    order = order_by_shares(classes, seed, 20)
    assert sorted(order) == [*range(len(classes))]
    taken = np.cumsum(classes[order][:, None] == np.arange(len(some)), axis=0)
    due = np.arange(1, len(classes) + 1)[:, None] * np.array(some) / len(classes)
    assert (abs(taken - due) < 1).all()
    of_one = random_order(len(classes), seed)
    assert (order_by_shares(classes * 0, seed, 20) == of_one).all()
    for number in range(len(some)):  # in a class the order is random as it is without classes
        assert (order[classes[order] == number] == of_one[classes[of_one] == number]).all()


def test_a_task_in_a_mixture_is_drawn_with_its_classes_shares(tmp_path):
    rows = load(write(tmp_path / "rows.jsonl", numbered(40))).rows
    drawn = [row["label"] for row in draw_rows(rows, 50, 0)]
    assert (drawn.count("0"), drawn.count("1")) == (25, 25)


def test_the_only_row_of_a_class_is_held_out_last():
    classes = np.array([0, 0, 0, 0, 1, 2, 3])
    assert sorted(classes[order_to_hold_out(classes, 0, 4)[:4]]) == [0] * 4
    assert len(set(order_to_hold_out(np.arange(5), 0, 2))) == 5  # where all are alone, any


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [("size", [900, 90, 10]), ("equal", [334, 333, 333]), ("2", [703, 223, 74])],
)
def test_shares_are_by_size_equal_or_by_temperature(mixing, expected):
    assert mixture_counts([9000, 900, 100], mixing, 1000) == expected


@given(sizes, st.sampled_from(["size", "equal", "1", "1.5", "3", "1e9"]), st.integers(0, 5000))
def test_counts_add_up_and_no_task_goes_without(some, mixing, more):
    counts = mixture_counts(some, mixing, len(some) + more)
    total = min(len(some) + more, sum(some))  # a pass has no more rows than there are
    assert sum(counts) == total
    assert min(counts) >= 1
    weights = [{"size": size, "equal": 1}.get(mixing) for size in some]
    if None in weights:
        weights = [size ** (1 / float(mixing)) for size in some]
    shares = [total * weight / sum(weights) for weight in weights]
    if min(shares) >= 1:
        assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))


@given(sizes)
def test_by_size_a_pass_takes_every_row_once(some):
    assert mixture_counts(some, "size") == some


@pytest.mark.parametrize("mixing", ["sizes", "0", "0.5", "-1", "nan", ""])
def test_what_is_no_mixing_is_refused(mixing):
    with pytest.raises(UserError, match=r"--mixing .*must be size, equal, or a temperature"):
        mixture_counts([3, 4], mixing)


def test_fewer_rows_than_tasks_are_refused():
    with pytest.raises(UserError, match="--max_train_samples 1: fewer than the 2 tasks"):
        mixture_counts([3, 4], "equal", 1)


@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 5))
def test_rows_are_drawn_as_evenly_as_can_be(size, count, seed):
    rows = [{"number": number} for number in range(size)]
    drawn = draw_rows(rows, count, seed)
    assert len(drawn) == count
    assert drawn == draw_rows(rows, count, seed)
    times = Counter(one["number"] for one in drawn)
    assert {times[one] for one in range(size)} <= {count // size, math.ceil(count / size)}


def test_another_seed_draws_other_rows():
    rows = [{"number": number} for number in range(50)]
    draws = {tuple(one["number"] for one in draw_rows(rows, 10, seed)) for seed in range(5)}
    assert len(draws) == 5
