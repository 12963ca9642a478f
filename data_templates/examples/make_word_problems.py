"""Writes the bundled word problems, word_problems/train.jsonl and validation.jsonl.

The stories and their solutions stand in word_problems/situations.yaml, written by hand; this script
draws the numbers, names and things, and computes. No numbers come twice in a kind of problem, in
either file. Python promises the sequence of `Random(seed).random()` for every version and draws
with nothing else, so the files are always the same:

    python data_templates/examples/make_word_problems.py
"""

import json
import random
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent / "word_problems"
ROWS = {"train": 600, "validation": 150}
TRIES = 100_000

NAMES = [
    *((name, "he", "his", "him") for name in ("Omar", "Ben", "Mateo", "Kofi", "Lars", "Yusuf")),
    *((name, "he", "his", "him") for name in ("Daniel", "Ravi", "Tom", "Jun", "Felix", "Noah")),
    *((name, "she", "her", "her") for name in ("Maya", "Ines", "Ruth", "Aiko", "Leila", "Clara")),
    *((name, "she", "her", "her") for name in ("Zoe", "Nadia", "Emma", "Priya", "Sofia", "Grace")),
]


class Number(int):
    """A number that a story can also say in words: {d:part} is a third for 3."""

    WORDS = {  # noqa: RUF012 - a table, never changed
        "times": {2: "twice", 3: "three times"},
        "part": {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"},
        "percent": {2: "50 percent", 4: "25 percent", 5: "20 percent", 10: "10 percent"},
        "fraction": {2: "one half", 4: "one quarter", 5: "one fifth", 10: "one tenth"},
    }

    def __format__(self, form: str) -> str:
        return self.WORDS[form][self] if form else str(self)


class Draw:
    """Choices that are the same in every version of Python."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def one(self, options):
        """One of some options, all equally likely."""
        return options[int(self._random() * len(options))]

    def shuffled(self, items: list) -> list:
        """The items in a random order."""
        keys = [self._random() for _ in items]
        return [items[place] for place in sorted(range(len(items)), key=keys.__getitem__)]


def read_range(given: str | list[int]) -> list[int] | range:
    """The numbers that `3-8` or a list stands for."""
    if isinstance(given, list):
        return given
    low, high = map(int, given.split("-"))
    return range(low, high + 1)


def compute(left: int, sign: str, right: int) -> int | None:
    """The result of a step, None where a small model could not learn from a few hundred problems to
    write it down at once, and where it is broken or too small.
    """
    small, large = min(left, right), max(left, right)
    if sign == "x":
        fits, result = (small <= 9 and large <= 60), left * right
    elif sign == "/":
        fits, result = (left % right == 0 and right <= 10 and left // right <= 24), left // right
    elif sign == "+":
        fits, result = True, left + right
    else:  # a borrow is the hardest to learn
        fits, result = (right <= 9 or left <= 20 or left % 10 >= right % 10), left - right
    return result if fits and 2 <= result <= 130 else None


def carries(left: int, sign: str, right: int, result: int) -> bool:
    """Whether a step needs a carry, or a division or subtraction the reverse of one."""
    if sign == "+":
        return left % 10 + right % 10 > 9
    if sign == "-":
        return left % 10 < right % 10
    one, other = (left, right) if sign == "x" else (result, right)
    return max(one, other) > 9 and (one % 10) * (other % 10) > 9


def solve(kind: dict, numbers: dict[str, int]) -> list[tuple] | None:
    """The steps (left, sign, right, result) for some numbers, None where these do not suit."""
    known, steps = dict(numbers), []
    limits = kind.get("limits", {})
    for place, step in enumerate(kind["steps"], 1):
        left, sign, right = step.split()
        left, right = (known[one] if one in known else int(one) for one in (left, right))
        result = compute(left, sign, right)
        name = f"s{place}"
        if result is None or (name in limits and result not in read_range(limits[name])):
            return None
        known[name] = result
        steps.append((left, sign, right, result))
    # Where a number comes twice, steps may undo each other, or the question gives the answer away.
    distinct = len(set(known.values())) == len(known)
    return steps if distinct and any(carries(*one) for one in steps) else None


def draw_numbers(kind: dict, draw: Draw, taken: set[tuple]) -> tuple[dict[str, int], list[tuple]]:
    """Numbers that suit a kind of problem and that no other problem of it has, and their steps."""
    for _ in range(TRIES):
        numbers = {name: draw.one(read_range(given)) for name, given in kind["numbers"].items()}
        steps = solve(kind, numbers)
        if steps and tuple(numbers.values()) not in taken:
            taken.add(tuple(numbers.values()))
            return numbers, steps
    raise ValueError(f"{kind['kind']}: no more numbers suit; widen its ranges in situations.yaml")


def tell(telling: dict, numbers: dict[str, int], steps: list[tuple], draw: Draw) -> dict[str, str]:
    """A problem in words: question, rationale and answer."""
    (who, he, his, him), friend, third = draw.shuffled(NAMES)[:3]
    scope = {
        **{"who": who, "he": he, "his": his, "him": him, "He": he.title(), "His": his.title()},
        **{"friend": friend[0], "third": third[0]},
        **{name: draw.one(options) for name, options in telling.get("words", {}).items()},
        **{name: Number(value) for name, value in numbers.items()},
        **{f"s{place}": "{} {} {} = {}".format(*step) for place, step in enumerate(steps, 1)},
    }
    texts = {name: telling[name].format_map(scope) for name in ("question", "rationale")}
    return {**texts, "answer": str(steps[-1][-1])}


def make_rows(kinds: list[dict]) -> dict[str, list[dict[str, str]]]:
    """The rows of each split; every kind has an equal share, its tellings take turns."""
    rows = {split: [] for split in ROWS}
    for place, kind in enumerate(kinds):
        draw = Draw(place)  # its own: a change to one kind leaves the others as they are
        taken: set[tuple] = set()
        for split, count in ROWS.items():
            share = count * (place + 1) // len(kinds) - count * place // len(kinds)
            for number in range(share):
                telling = kind["tellings"][number % len(kind["tellings"])]
                row = tell(telling, *draw_numbers(kind, draw, taken), draw)
                rows[split].append({**row, "kind": kind["kind"]})
    order = Draw(len(kinds))
    return {split: order.shuffled(found) for split, found in rows.items()}


def main() -> None:
    """Write both files."""
    kinds = yaml.safe_load((FOLDER / "situations.yaml").read_text(encoding="utf-8"))
    for split, rows in make_rows(kinds).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (FOLDER / f"{split}.jsonl").write_bytes("".join(lines).encode("utf-8"))
        print(f"{split}: {len(rows)} problems of {len(kinds)} kinds")


if __name__ == "__main__":
    main()
