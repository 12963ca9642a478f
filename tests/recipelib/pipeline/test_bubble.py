"""How long the processes of a pipeline wait, and how many micro-batches they hold."""

import pytest
from fake_stages import evenly, fake_stages
from hypothesis import given
from hypothesis import strategies as st

from recipelib.pipeline.plan import bubble, in_flight


@pytest.mark.parametrize(
    ("processes", "stages", "micro_batches", "expected"),
    [
        (1, 1, 8, 0),
        (2, 2, 1, 1 / 2),
        (2, 2, 4, 1 / 5),
        (4, 4, 1, 3 / 4),
        (4, 4, 12, 3 / 15),
        # Two stages in each process: half the bubble, measured by the work.
        (2, 4, 4, 1 / 9),
        (4, 8, 4, 3 / 11),
    ],
)
def test_the_bubble_by_hand(processes, stages, micro_batches, expected):
    found = bubble(fake_stages(evenly(8, stages), processes), micro_batches)
    assert found == pytest.approx(expected)


@given(processes=st.integers(1, 6), micro_batches=st.integers(1, 12))
def test_the_bubble_is_what_a_run_of_equal_stages_would_show(processes, micro_batches):
    # A micro-batch goes into a stage once it left the one before, and the one ahead left this.
    ends: dict[tuple[int, int], int] = {}
    for part in range(micro_batches):
        for stage in range(processes):
            ready = ends.get((stage - 1, part), 0), ends.get((stage, part - 1), 0)
            ends[stage, part] = max(ready) + 1
    waited = 1 - micro_batches / max(ends.values())
    stages = fake_stages(evenly(processes, processes), processes)
    assert bubble(stages, micro_batches) == pytest.approx(waited)


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "kept"),
    [
        ("gpipe", 8, [8, 8, 8, 8]),
        ("gpipe", 2, [2, 2, 2, 2]),
        # One back for each forward as soon as the first has come back: from the last stage at once.
        ("1f1b", 8, [4, 3, 2, 1]),
        ("1f1b", 4, [4, 3, 2, 1]),
    ],
)
def test_the_micro_batches_that_are_under_way(schedule, micro_batches, kept):
    found = [
        in_flight(fake_stages(evenly(4, 4), 4, place), schedule, micro_batches)
        for place in range(4)
    ]
    assert found == kept


def test_a_single_process_holds_one_micro_batch():
    assert in_flight(fake_stages(evenly(4, 1), 1), "gpipe", 8) == 1
