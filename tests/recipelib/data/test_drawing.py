"""How many rows each task of a mixture gives."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipelib.data.drawing import draw_rows, mixture_counts
from recipelib.runtime.errors import UserError

sizes = st.lists(st.integers(1, 10**6), min_size=1, max_size=8)


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
