"""Loads the rows of a task from the hub, a folder or a file, and checks them against its template
before any model is loaded.
"""

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipelib.data.sources import Entry, Hub, Source, has_split, locate, open_source
from recipelib.prompts import PromptTemplate, RowError
from recipelib.runtime import UserError, one_line, say

_SHOWN_BAD_ROWS = 20
_MOST_HELD_OUT = 1000
# One seed for all runs: they are scored on the same rows, whatever their own seed.
_EVALUATION_SEED = 0

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class Rows:
    """Checked rows and where they come from.

    Attributes:
        rows: column -> value, as plain Python values.
        source: for reports: "stanfordnlp/sst2@main, split train", or the file as the user gave it.
        sha256: of the file, or of the shards one after the other; None for the hub.
        skipped: how many bad rows were left out.
        available: how many rows these were drawn from.
    """

    rows: list[dict[str, Any]]
    source: str
    sha256: str | None
    skipped: int = 0
    available: int = 0


@dataclass(frozen=True)
class _Table:
    """A split with `count` rows. `read(places, limit)` returns the rows at these places, in this
    order and at most `limit`, and how many bad rows were left out.
    """

    source: str
    sha256: str | None
    count: int
    read: Callable[[Sequence[int], int | None], tuple[list[dict[str, Any]], int]]


def load_rows(
    template: PromptTemplate,
    dataset: str | None,
    split: str,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
    answers: bool = True,
    revision: str | None = None,
    progress: Progress = iter,
    option: str = "--dataset",
) -> Rows:
    """The rows of a split, each checked against the template.

    Args:
        dataset: a file, a folder with files named after their splits, or a hub id (`owner/name`,
            `owner/name:config`); None for the template's own. A file or folder that exists goes
            before a hub id.
        split: the split of a folder or a hub data set; a file is read whole.
        max_samples: draw this many rows at random; with the same seed, a smaller draw is the
            beginning of a larger one.
        skip_bad_rows: leave bad rows out and count them, instead of raising.
        answers: whether rows have to bring their answers; False for rows to predict.
        revision: of a hub data set.
        progress: wraps the rows while they are checked, for a progress bar.
        option: the command-line option that gave `dataset`, for errors.
    Raises:
        UserError: no such data, a column that no row has, or bad rows: the first twenty, a line
            each.
    """
    place = locate(template, dataset, revision, option)
    table = _open(template, place, split, skip_bad_rows, answers, progress)
    return _take(table, range(table.count), max_samples, seed)


def load_questions(template: PromptTemplate, args: Any) -> Rows:
    """The rows of the file `args.predict`, which need no answers; raises as `load_rows`."""
    return load_rows(
        template,
        args.predict,
        "train",
        skip_bad_rows=args.skip_bad_rows,
        answers=False,
        option="--predict",
    )


def load_splits(
    template: PromptTemplate, args: Any, seed: int, *, progress: Progress = iter
) -> tuple[Rows, Rows]:
    """Training rows and evaluation rows, which have no row in common.

    Where both would come from the same rows (a single file, the same split for both, or no
    evaluation split that is named or exists), a tenth of these, at least one and at most 1,000, is
    drawn for evaluation and kept out of training.

    Args:
        args: a recipe's `dataset`, `train_split`, `eval_split`, `max_train_samples`,
            `max_eval_samples` and `skip_bad_rows`.
        seed: draws the training rows; evaluation rows are the same for every seed.
    Raises:
        UserError: as `load_rows`, or there is a single row for both.
    """
    place = locate(template, args.dataset, None)
    train_split = args.train_split or template.dataset.get("train") or "train"
    eval_split = args.eval_split or template.dataset.get("eval")
    if eval_split is None:  # none named: take a validation file, else hold out training rows
        eval_split = "validation" if has_split(place, "validation") else train_split
    splits = (train_split, eval_split)
    limits = (args.max_train_samples, args.max_eval_samples)
    one_file = isinstance(place, Path) and place.is_file()
    if not one_file and splits[0] != splits[1]:
        tables = [
            _open(template, place, split, args.skip_bad_rows, True, progress) for split in splits
        ]
        train, evaluation = (
            _take(table, range(table.count), limit, draw)
            for table, limit, draw in zip(tables, limits, (seed, _EVALUATION_SEED), strict=True)
        )
        return train, evaluation

    table = _open(template, place, splits[0], args.skip_bad_rows, True, progress)
    if table.count < 2:
        raise UserError(
            f"{table.source}: one row cannot be both trained on and held out; add rows, or pass a "
            "folder with a file for each split"
        )
    held_out = max(1, min(_MOST_HELD_OUT, table.count // 10))
    order = _draw(table.count, _EVALUATION_SEED)
    say(
        f"{table.source}: {held_out:,} of {table.count:,} rows are held out of training for "
        "evaluation, the same ones for every seed"
    )
    return (
        _take(table, sorted(order[held_out:]), limits[0], seed, ", without the held-out rows"),
        _take(table, sorted(order[:held_out]), limits[1], _EVALUATION_SEED, ", held-out rows"),
    )


def load_asked(
    template: PromptTemplate, args: Any, seed: int, *, shots: int, progress: Progress = iter
) -> tuple[Rows | None, Rows]:
    """The training rows from which demonstrations are drawn, and the rows that are asked about.

    The latter are the rows that a trained method is scored on (`load_splits`), or those of
    `args.predict`, which need no answers.

    Args:
        args: as in `load_splits`, and `predict`.
        shots: how many demonstrations; with 0 the training rows need not exist and may be None.
    Raises:
        UserError: as `load_splits`.
    """
    if args.predict:
        pool = load_splits(template, args, seed, progress=progress)[0] if shots else None
        options = {"skip_bad_rows": args.skip_bad_rows, "answers": False, "progress": progress}
        options["option"] = "--predict"
        return pool, load_rows(template, args.predict, "train", **options)
    place = locate(template, args.dataset, None)
    one_file = isinstance(place, Path) and place.is_file()
    train_split = args.train_split or template.dataset.get("train") or "train"
    eval_split = args.eval_split or template.dataset.get("eval")
    if eval_split is None and has_split(place, "validation"):
        eval_split = "validation"
    if shots or one_file or eval_split is None or has_split(place, train_split):
        return load_splits(template, args, seed, progress=progress)
    return None, load_rows(
        template,
        args.dataset,
        eval_split,
        max_samples=args.max_eval_samples,
        seed=_EVALUATION_SEED,
        skip_bad_rows=args.skip_bad_rows,
        progress=progress,
    )


def row_key(template: PromptTemplate, row: Mapping[str, Any]) -> str:
    """What a row asks, as text: rows that ask the same have the same key."""
    values = template.variables(row)
    names = sorted(template.prompt_variables)
    return json.dumps([values.get(name) for name in names], sort_keys=True, default=str)


def overlap(train: Rows, evaluation: Rows, template: PromptTemplate) -> int:
    """How many evaluation rows ask exactly what a training row asks."""

    def key(row: Mapping[str, Any]) -> bytes:
        return hashlib.blake2b(row_key(template, row).encode(), digest_size=16).digest()

    trained = {key(row) for row in train.rows}
    return sum(key(row) in trained for row in evaluation.rows)


def parse_columns(items: Iterable[str]) -> dict[str, str]:
    """Template variable -> column, from `variable=column` items."""
    columns: dict[str, str] = {}
    for item in items:
        variable, _, column = item.partition("=")
        if not variable.isidentifier() or not column:
            raise UserError(f"--columns {item}: write variable=column, such as text=sentence")
        if variable in columns:
            raise UserError(f"--columns {item}: {variable} stands twice; give it one column")
        columns[variable] = column
    return columns


# Checking


def _open(
    template: PromptTemplate,
    place: Path | Hub,
    split: str,
    skip_bad_rows: bool,
    answers: bool,
    progress: Progress,
) -> _Table:
    source = open_source(place, split, template, answers)
    if source.columns:
        _refuse_missing_columns(template, source, answers)

    def check(places: Sequence[int], limit: int | None = None) -> tuple[list[dict[str, Any]], int]:
        entries = progress(source.read(places))
        return _check(template, entries, source.name, skip_bad_rows, answers, limit)

    # Of a hub data set, which may have millions of rows, only those that are drawn are checked.
    if isinstance(place, Hub):
        return _Table(
            source.name,
            None,
            source.count,
            lambda places, limit: check(places if skip_bad_rows else places[:limit], limit),
        )
    rows, skipped = check(range(source.count))
    return _Table(
        source.name,
        source.sha256,
        len(rows),
        lambda places, limit: ([rows[at] for at in places[:limit]], skipped),
    )


def _refuse_missing_columns(template: PromptTemplate, source: Source, answers: bool) -> None:
    missing = template.missing_columns(source.columns, answers=answers)
    if not missing:
        return
    lowered = {column.casefold(): column for column in source.columns}
    cures = []
    for variable in sorted(template.prompt_variables | template.answer_variables):
        if template.column(variable) in missing:
            close = [
                match
                for wanted in (template.column(variable), variable)
                for match in difflib.get_close_matches(wanted.casefold(), lowered, 1)
            ]
            cures.append(f"{variable}={lowered[close[0]] if close else 'COLUMN'}")
    shown = ", ".join(map(repr, source.columns[:20])) + (
        ", ..." if len(source.columns) > 20 else ""
    )
    raise UserError(
        f"{source.name}: no column {', '.join(map(repr, missing))}; the columns are {shown}; "
        f"pass --columns {' '.join(cures)}"
    )


def _check(
    template: PromptTemplate,
    entries: Iterable[Entry],
    name: str,
    skip_bad_rows: bool,
    answers: bool,
    limit: int | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """The good rows, at most `limit`, and how many bad rows were met on the way."""
    rows, bad = [], []
    for where, row in entries:
        try:
            if isinstance(row, RowError):
                raise row
            template.questions(row, answers=answers)
        except RowError as error:
            bad.append(f"{where}: {one_line(error)}")
        else:
            rows.append(row)
            if len(rows) == limit:
                break
    if bad and not skip_bad_rows:
        raise UserError(_list_bad(bad))
    if bad and not rows:
        raise UserError(f"{name}: no good row among {len(bad):,}; the first: {bad[0]}")
    return rows, len(bad)


def _list_bad(bad: list[str]) -> str:
    if len(bad) == 1:
        return f"{bad[0]} (or pass --skip_bad_rows to leave it out)"
    more = len(bad) - _SHOWN_BAD_ROWS
    count = f"{len(bad)} bad rows" if more <= 0 else f"... and {more:,} more bad rows"
    return "\n".join([*bad[:_SHOWN_BAD_ROWS], f"{count} (pass --skip_bad_rows to leave them out)"])


# Drawing


def _draw(count: int, seed: int) -> list[int]:
    """0 to count - 1 in random order. It uses `random.Random.random` only, the one method whose
    numbers are the same in every version of Python.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def _take(
    table: _Table, places: Sequence[int], limit: int | None, seed: int, note: str = ""
) -> Rows:
    available = len(places)
    if limit is not None:
        if limit < 1:
            raise UserError(f"{table.source}: {limit} rows asked for; ask for 1 or more")
        places = [places[at] for at in _draw(len(places), seed)]
    rows, skipped = table.read(places, limit)
    return Rows(rows, table.source + note, table.sha256, skipped, available)
