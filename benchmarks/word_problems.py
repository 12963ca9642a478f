"""Rows for benchmarks: word problems with worked answers, generated or from a GSM8K file.

The generated ones are as long as GSM8K's (Cobbe et al. 2021, arXiv:2110.14168) and spread as much,
counted with the bundled model's tokenizer, so that padding costs what it costs there; they are not
as hard. In each story a person's stock of things changes two to eight times.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from recipelib.runtime import UserError


class Event(NamedTuple):
    """A change of the stock from `n` to `total`, with `a` and `b` drawn from their ranges.

    A terse solver writes the first of `lines`, a talkative one the second.
    """

    total: Callable[[int, int, int], float]
    a: tuple[int, int]
    b: tuple[int, int]
    story: str
    lines: tuple[str, str]


PEOPLE = ["Amara", "Bruno", "Chidi", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ilan", "Juno"]
THINGS = ["apples", "badges", "bricks", "buttons", "candles", "cards", "coins", "shells", "stamps"]
OPENINGS = [
    "{who} has {n} {things}.",
    "{who} keeps {n} {things} in a box under the bed.",
    "On Monday morning there are {n} {things} on {who}'s shelf.",
    "For the school fair {who} has put aside {n} {things}, all of them in good condition.",
]
ASIDES = [
    "A cousin who likes to count helps with all of it.",
    "Nobody else in the whole street collects {things}, so there is nobody to ask for advice, and "
    "the nearest shop that knows anything about them is an hour away by train.",
    "{who} writes every change into a small notebook, because last year some of the {things} went "
    "missing and it took days until all of them were found.",
]
EVENTS = [
    Event(
        lambda n, a, b: n + a,
        (3, 60),
        (1, 1),
        "A friend brings {a} more.",
        (
            "{n} + {a} = {total}",
            "With the {a} {things} from the friend, {who} has {n} + {a} = {total} {things}.",
        ),
    ),
    Event(
        lambda n, a, b: n + a * b,
        (2, 9),
        (3, 15),
        "{who} buys {a} packs with {b} {things} in each.",
        (
            "{a} * {b} = {ab}\n{n} + {ab} = {total}",
            "The {a} packs that {who} buys hold {a} * {b} = {ab} {things} altogether.\n"
            "Added to the {n} {things} from before, this makes {n} + {ab} = {total} {things}.",
        ),
    ),
    Event(
        lambda n, a, b: n + a * b,
        (2, 7),
        (2, 9),
        "Then {who} finds {b} a day for {a} days.",
        (
            "{b} * {a} = {ab}\n{n} + {ab} = {total}",
            "In {a} days with {b} {things} a day {who} finds {b} * {a} = {ab} {things}.\n"
            "Together with the {n} that were there, that makes {n} + {ab} = {total} {things}.",
        ),
    ),
    Event(
        lambda n, a, b: n - a,
        (1, 9),
        (1, 1),
        "{a} of them turn out to be broken.",
        (
            "{n} - {a} = {total}",
            "The broken ones do not count, so {n} - {a} = {total} {things} are left for {who}.",
        ),
    ),
    Event(
        lambda n, a, b: n - a * b,
        (2, 6),
        (2, 6),
        "Each of {a} neighbors gets {b}.",
        (
            "{a} * {b} = {ab}\n{n} - {ab} = {total}",
            "The {a} neighbors get {a} * {b} = {ab} {things} in all.\n"
            "After these presents {who} still has {n} - {ab} = {total} {things}.",
        ),
    ),
    Event(
        lambda n, a, b: n * 2,
        (1, 1),
        (1, 1),
        "An aunt doubles what is there.",
        ("{n} * 2 = {total}", "The aunt makes it twice as many: {n} * 2 = {total} {things}."),
    ),
    Event(
        lambda n, a, b: n / 2,
        (1, 1),
        (1, 1),
        "Half of all the {things} go to a museum.",
        (
            "{n} / 2 = {total}",
            "The museum takes one half, and the other half is {n} / 2 = {total} {things}.",
        ),
    ),
]
QUESTIONS = [
    "How many {things} does {who} have now?",
    "How many {things} are there in the end?",
    "After all this, how many {things} can {who} show to a visitor?",
]
# These give GSM8K's lengths: how often a story has two, three, ... eight events, the share of
# stories with each of the asides, and that of talkative solvers.
EVENT_COUNTS = [50, 30, 12, 4, 2, 1, 1]
ASIDE, TALKATIVE = 0.15, 0.8


def generate_problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows with `prompt` and `completion`, the same ones for the same seed."""
    source = random.Random(seed)
    return [_problem(source) for _ in range(count)]


def _problem(source: random.Random) -> dict[str, str]:
    # Of all methods only random() gives the same numbers in every version of Python.
    def draw(low: int, high: int) -> int:
        return low + int(source.random() * (high - low + 1))

    def pick(items: list):
        return items[draw(0, len(items) - 1)]

    names = {"who": pick(PEOPLE), "things": pick(THINGS)}
    n = draw(10, 99)
    story, lines = [pick(OPENINGS).format(n=n, **names)], []
    story += [aside.format(**names) for aside in ASIDES if source.random() < ASIDE]
    talkative = source.random() < TALKATIVE
    count = pick([at for at, times in enumerate(EVENT_COUNTS, 2) for _ in range(times)])
    told: list[Event] = []
    while len(told) < count:
        event = pick(EVENTS)
        a, b = draw(*event.a), draw(*event.b)
        total = event.total(n, a, b)
        # Nothing is broken in two, the box is never nearly empty, and no story repeats itself.
        if event in told[-2:] or total != int(total) or total < 4:
            continue
        values = {"n": n, "a": a, "b": b, "ab": a * b, "total": int(total), **names}
        story.append(event.story.format(**values))
        lines.append(event.lines[talkative].format(**values))
        told.append(event)
        n = int(total)
    story.append(pick(QUESTIONS).format(**names))
    return _row(" ".join(story), "\n".join(lines), str(n))


def read_gsm8k(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a GSM8K file, as `prepare_data.py gsm8k` writes it.

    Raises:
        UserError: the file cannot be read, is too short, or a line is no row of GSM8K.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--dataset {path}: cannot be read ({error}); pass a .jsonl file") from None
    rows = []
    for number, line in enumerate(lines[:count], 1):
        try:
            row = json.loads(line)
            work, answer = row["answer"].split("####")
            work = re.sub("<<[^<>]*>>", "", work)  # the calculator's marks
            rows.append(_row(row["question"].strip(), work.strip(), answer.strip()))
        except (ValueError, KeyError, TypeError, AttributeError):
            if not line and number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: no row of GSM8K (question; answer with ####); make the file "
                "with benchmarks/prepare_data.py gsm8k"
            ) from None
    if len(rows) < count:
        raise UserError(f"--dataset {path}: holds {len(rows)} rows; {count} are needed")
    return rows


def _row(question: str, work: str, answer: str) -> dict[str, str]:
    return {
        "prompt": f"Question: {question}\nAnswer:",
        "completion": f" {work}\nThe answer is {answer}",
    }
