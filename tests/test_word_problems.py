"""The bundled word problems: their solutions are right, no two are the same, and the files are what
the script makes of the situations.
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from recipelib.data.rows import load_rows
from recipelib.prompts.schema import TEMPLATE_FOLDER
from recipelib.prompts.template import PromptTemplate

EXAMPLES = TEMPLATE_FOLDER / "examples"
FOLDER = EXAMPLES / "word_problems"
SPLITS = {
    split: [
        json.loads(line)
        for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for split in ("train", "validation")
}
ROWS = SPLITS["train"] + SPLITS["validation"]
EQUATION = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+)")
# The numbers that stand in a question as words.
WORDS = {
    **{"twice": 2, "three times": 3, "half": 2, "a third": 3, "a quarter": 4, "a fifth": 5},
    **{"50 percent": 2, "25 percent": 4, "20 percent": 5, "10 percent": 10},
    **{" hours": 60, "rectangular": 2},  # minutes; of each side two
}


def steps_of(row: dict) -> list[tuple[int, str, int, int]]:
    return [
        (int(left), sign, int(right), int(result))
        for left, sign, right, result in EQUATION.findall(row["rationale"])
    ]


def digits(text: str) -> list[int]:
    return [int(one) for one in re.findall(r"\d+(?! percent|\d)", text)]


def is_true(left: int, sign: str, right: int, result: int) -> bool:
    return {
        "+": left + right == result,
        "-": left - right == result,
        "x": left * right == result,
        "/": left == right * result,
    }[sign]


def carries(left: int, sign: str, right: int, result: int) -> bool:
    if sign in "x/":
        factors = sorted((left, right) if sign == "x" else (right, result))
        return factors[1] > 9 and any(int(one) * factors[0] > 9 for one in str(factors[1]))
    parts, total = ((left, right), result) if sign == "+" else ((right, result), left)
    # Each carry takes ten from one digit and gives one to the next.
    return sum(map(int, "".join(map(str, parts)))) != sum(map(int, str(total)))


def wrong(row: dict, why: object = "") -> str:
    return f"{why} {row['question']} {row['rationale']} {row['answer']}"


def test_the_files_are_what_the_script_makes(tmp_path):
    (tmp_path / "word_problems").mkdir()
    script = shutil.copy(EXAMPLES / "make_word_problems.py", tmp_path)
    shutil.copy(FOLDER / "situations.yaml", tmp_path / "word_problems")
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    for split in SPLITS:
        made = (tmp_path / "word_problems" / f"{split}.jsonl").read_bytes()
        assert made == (FOLDER / f"{split}.jsonl").read_bytes()


def test_there_are_600_and_150_rows_of_four_texts_each():
    assert {split: len(rows) for split, rows in SPLITS.items()} == {"train": 600, "validation": 150}
    for row in ROWS:
        assert list(row) == ["question", "rationale", "answer", "kind"]
        assert all(isinstance(text, str) and text for text in row.values())


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_has_an_equal_share(split):
    counts = Counter(row["kind"] for row in SPLITS[split])
    assert len(counts) >= 12
    assert counts.keys() == {row["kind"] for row in ROWS}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_problem_comes_twice_not_even_under_another_name():
    assert len({row["question"] for row in ROWS}) == len(ROWS)
    assert len({(row["kind"], *steps_of(row)) for row in ROWS}) == len(ROWS)


def test_every_equation_is_true_and_the_last_one_gives_the_answer():
    for row in ROWS:
        steps = steps_of(row)
        assert all(is_true(*step) for step in steps), wrong(row)
        assert str(steps[-1][-1]) == row["answer"], wrong(row)
        assert row["rationale"].count("=") == len(steps), wrong(row, "an equation in other signs")


def test_a_problem_takes_two_to_four_steps_and_the_kinds_differ_in_them():
    signs = {row["kind"]: "".join(sign for _, sign, _, _ in steps_of(row)) for row in ROWS}
    for row in ROWS:
        assert 2 <= len(steps_of(row)) <= 4, wrong(row)
        assert "".join(sign for _, sign, _, _ in steps_of(row)) == signs[row["kind"]], wrong(row)
    assert len(set(signs.values())) >= 12
    assert set("".join(signs.values())) == set("+-x/")


def test_every_number_comes_from_the_question_or_an_earlier_step():
    for row in ROWS:
        known = set(digits(row["question"]))
        known |= {number for words, number in WORDS.items() if words in row["question"]}
        for left, _, right, result in steps_of(row):
            assert {left, right} <= known, wrong(row, {left, right} - known)
            known.add(result)
        assert set(digits(row["rationale"])) <= known, wrong(row)


def test_nothing_in_a_problem_is_superfluous():
    for row in ROWS:
        steps = steps_of(row)
        used = {number for left, _, right, _ in steps for number in (left, right)}
        needed = {*digits(row["question"]), *(result for *_, result in steps[:-1])}
        assert needed <= used, wrong(row, needed - used)


def test_the_answer_does_not_stand_in_the_question():
    for row in ROWS:
        assert int(row["answer"]) not in digits(row["question"]), wrong(row)


def test_a_problem_needs_a_carry_but_no_step_is_too_big_to_write_down_at_once():
    for row in ROWS:
        assert any(carries(*step) for step in steps_of(row)), wrong(row)
        for left, sign, right, result in steps_of(row):
            assert 2 <= result <= 130, wrong(row)
            if sign == "x":
                assert min(left, right) <= 9, wrong(row)
                assert max(left, right) <= 60, wrong(row)
            elif sign == "/":
                assert right <= 10, wrong(row)
                assert result <= 24, wrong(row)
    steps = [step for row in ROWS for step in steps_of(row)]
    assert sum(carries(*step) for step in steps) > len(steps) / 3


def test_the_texts_are_whole_sentences():
    for row in ROWS:
        assert re.fullmatch(r"[A-Z][^{}]*[^ ]\?", row["question"]), wrong(row)
        assert re.fullmatch(r"[A-Z][^{}]*[^ ]\.", row["rationale"]), wrong(row)
        for text in (row["question"], row["rationale"]):
            assert "  " not in text, wrong(row)
            assert re.search(r"[.?!] [a-z]|\n", text) is None, wrong(row)
            assert 1 not in digits(text), wrong(row, "1 of what stands in the plural:")


def test_each_kind_is_told_in_several_ways():
    def told(row: dict) -> str:
        return re.sub(r"\W+", " ", re.sub(r"\d+ \S \d+ = \d+", "", row["rationale"]))

    for kind in {row["kind"] for row in ROWS}:
        assert len({told(row) for row in ROWS if row["kind"] == kind}) >= 4


@pytest.mark.parametrize("split", SPLITS)
def test_the_template_asks_for_the_reasoning_and_reads_the_answer_back(split):
    template = PromptTemplate.load("word_problems")
    rows = load_rows(template, None, split).rows
    assert [row["question"] for row in rows] == [row["question"] for row in SPLITS[split]]
    for row in rows:
        (question,) = template.questions(row)
        assert template.prompt(question) == f"Question: {row['question']}\nAnswer:"
        assert question.rationale == f" {row['rationale']}\nThe answer is"
        assert template.read_answer(question.target) == row["answer"]
        # Without the words that lead to it, the last number of the reasoning is the answer too.
        assert template.read_answer(f" {row['rationale']}") == row["answer"]
