"""Generated word problems, on which benchmarks measure."""

import hashlib
import json
import re

import pytest
from word_problems import generate_problems, read_gsm8k

from recipelib.runtime.errors import UserError


def test_the_rows_are_those_that_were_measured():
    rows = generate_problems(400)
    assert rows[:100] == generate_problems(100)
    assert len({row["prompt"] for row in rows}) == 400
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12] == "b35792ef57c0"


def test_the_worked_steps_are_right_and_lead_to_the_answer():
    for row in generate_problems(300, seed=3):
        assert re.fullmatch(r"Question: .+\?\nAnswer:", row["prompt"])
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["completion"])
        assert len(steps) >= 2
        for a, sign, b, result in steps:
            a, b = int(a), int(b)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        assert row["completion"].endswith(f"\nThe answer is {steps[-1][-1]}")


GOOD = json.dumps({"question": "1 + 1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"})


def test_gsm8ks_rows_lose_the_calculators_marks(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n" * 3)
    row = {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " It is 1+1=2.\nThe answer is 2"}
    assert read_gsm8k(tmp_path / "rows.jsonl", 2) == [row] * 2


@pytest.mark.parametrize(
    ("line", "said"),
    [("[1]", "rows.jsonl:2: no row of GSM8K"), ("", "rows.jsonl: holds 1 rows; 2 are needed")],
)
def test_a_file_that_is_not_gsm8k_is_refused(line, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{line}")
    with pytest.raises(UserError, match=said):
        read_gsm8k(tmp_path / "rows.jsonl", 2)
