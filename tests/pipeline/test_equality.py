"""What stages learn is what the model learns in one piece, to within rounding."""

import pytest
from in_stages import CASES

pytestmark = pytest.mark.slow

EXACT = [
    (processes, name)
    for processes, cases in CASES.items()
    for name, case in cases.items()
    if not case.without
]
INEXACT = [name for name, case in CASES[2].items() if case.without]


@pytest.mark.parametrize(("processes", "name"), EXACT)
def test_ten_steps_in_stages_are_those_in_one_piece(processes, name, apart):
    found = apart(processes)[name]
    assert found["loss"] <= 1e-4
    assert found["update"] <= 1e-4
    assert found["moved"] >= 1e-3  # each weight has learned something to compare


@pytest.mark.parametrize("name", INEXACT)
def test_a_part_of_a_step_that_is_left_out_would_be_seen(name, apart):
    assert apart(2)[name]["update"] >= 1e-2
