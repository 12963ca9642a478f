"""Loads the rows of a task from the hub, a folder or a file, checked before any model is loaded."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipelib.data.checking import (
    Checked,
    StoredRows,
    check_rows,
    list_bad,
    refuse_missing_columns,
    row_keys,
    row_labels,
)
from recipelib.data.drawing import order_by_shares, order_to_hold_out
from recipelib.data.places import EVALUATION_SPLITS, Files, Hub, find, split_names
from recipelib.data.sources import Source, open_source
from recipelib.prompts import PromptTemplate
from recipelib.runtime import Store, UserError, say

_MOST_HELD_OUT = 1000
_SCORED = (*EVALUATION_SPLITS, "test")  # names of splits that are not trained on
# One seed for all runs: they are scored on the same rows, whatever their own seed.
_EVALUATION_SEED = 0


@dataclass(frozen=True)
class Rows:
    """Checked rows and where they come from.

    Attributes:
        rows: column -> value, as plain Python values.
        source: for reports: "stanfordnlp/sst2@main, split train", or the file as the user gave it.
        skipped: how many bad rows were left out.
        available: how many rows these were drawn from.
    """

    rows: Sequence[dict[str, Any]]
    source: str
    skipped: int = 0
    available: int = 0


@dataclass(frozen=True)
class _Table:
    """A split with `count` rows. `read(places, limit)` returns the rows at these places, in this
    order and at most `limit`, and how many bad rows were left out. `classes` are [count] numbers,
    all the same where rows have no classes.
    """

    source: str
    count: int
    classes: np.ndarray
    read: Callable[[Sequence[int], int | None], tuple[StoredRows, int]]


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
    store: Store | None = None,
    option: str = "--dataset",
    encoding: str | None = None,
    field: str | None = None,
) -> Rows:
    """The rows of a split, each checked against the template.

    Args:
        dataset: a file, a folder with files named after their splits, or a hub id (`owner/name`,
            `owner/name:config`); None for the template's own. A file or folder that exists goes
            before a hub id.
        split: the split of a folder or a hub data set; a file is read whole.
        max_samples: draw this many rows at random, with the classes' shares; with the same seed,
            a smaller draw is the beginning of a larger one.
        skip_bad_rows: leave bad rows out and count them, instead of raising.
        answers: whether rows have to bring their answers; False for rows to predict.
        revision: of a hub data set.
        store: where they are kept, and by how many processes they are checked.
        option: the command-line option that gave `dataset`, for errors.
        encoding, field: how files are read, see `places.Files`.
    Raises:
        UserError: no such data, a column that no row has, or bad rows: the first twenty, a line
            each.
    """
    place = find(template, dataset, revision, option, encoding=encoding, field=field)
    table = _open(template, place, split, skip_bad_rows, answers, store)
    return _take(table, np.arange(table.count), max_samples, seed)


def load_questions(template: PromptTemplate, args: Any, store: Store | None = None) -> Rows:
    """The rows of the file `args.predict`, which need no answers; raises as `load_rows`."""
    return load_rows(
        template,
        args.predict,
        "train",
        skip_bad_rows=args.skip_bad_rows,
        answers=False,
        store=store,
        option="--predict",
        **_how(args),
    )


def load_splits(
    template: PromptTemplate, args: Any, seed: int, *, store: Store | None = None
) -> tuple[Rows, Rows]:
    """Training rows and evaluation rows, which have no row in common.

    Where both would come from the same rows (a single file, the same split for both, or no
    evaluation split that is named or exists), a tenth of these, at least one and at most 1,000, is
    drawn for evaluation and kept out of training. `eval_split` "all" of a file are all its rows.

    Args:
        args: a recipe's `dataset`, `train_split`, `eval_split`, `max_train_samples`,
            `max_eval_samples`, `skip_bad_rows`, `encoding` and `field`.
        seed: draws the training rows; evaluation rows are the same for every seed.
    Raises:
        UserError: as `load_rows`, there is a single row for both, or all rows of a file that is
            trained on are to be scored.
    """
    place, *splits = splits_of(template, args)
    limits = (args.max_train_samples, args.max_eval_samples)
    draws = (seed, _EVALUATION_SEED)
    one_file = isinstance(place, Files) and place.one_split
    if not one_file and splits[0] != splits[1]:
        tables = [
            _open(template, place, split, args.skip_bad_rows, True, store) for split in splits
        ]
        train, evaluation = (
            _take(table, np.arange(table.count), limit, draw)
            for table, limit, draw in zip(tables, limits, draws, strict=True)
        )
        return train, evaluation

    whole = one_file and splits[1] == "all"
    if whole and getattr(args, "trains", True):
        raise UserError(
            f"--eval_split all: {place.path} would be trained on and scored whole; leave it out to "
            "hold out a tenth, or pass a folder with a file for each split"
        )
    table = _open(template, place, splits[0], args.skip_bad_rows, True, store)
    everywhere = np.arange(table.count)
    if whole:
        say(f"{table.source}: all {table.count:,} rows are scored; none is held out")
        train, evaluation = (
            _take(table, everywhere, limit, draw) for limit, draw in zip(limits, draws, strict=True)
        )
        return train, evaluation
    if table.count < 2:
        raise UserError(
            f"{table.source}: one row cannot be both trained on and held out; add rows, or pass a "
            "folder with a file for each split"
        )
    held_out = max(1, min(_MOST_HELD_OUT, table.count // 10))
    order = order_to_hold_out(table.classes, _EVALUATION_SEED, held_out)
    say(
        f"{table.source}: {held_out:,} of {table.count:,} rows are held out of training for "
        f"evaluation, the same ones for every seed{_left_alone(place, args)}"
    )
    return (
        _take(table, np.sort(order[held_out:]), limits[0], seed, ", without the held-out rows"),
        _take(table, np.sort(order[:held_out]), limits[1], _EVALUATION_SEED, ", held-out rows"),
    )


def _left_alone(place: Files | Hub, args: Any) -> str:
    """What of the rows that are there is neither trained on nor scored, and how to change that."""
    if isinstance(place, Files) and place.one_split:
        if args.eval_split:
            return f"; a file has no split {args.eval_split!r}"
        beside = [name for name in split_names(Files(place.path.parent)) if name in _SCORED]
        if place.path.stem == "train" and beside:
            return (
                f"; {', '.join(beside)} beside it is not read: pass the folder, {place.path.parent}"
            )
        return ""
    if args.eval_split or "test" not in split_names(place, getattr(args, "streaming", False)):
        return ""
    return "; the split 'test' is not read: --eval_split test scores it instead"


def splits_of(template: PromptTemplate, args: Any) -> tuple[Files | Hub, str, str]:
    """The data that a recipe's arguments name, and its splits to train and to evaluate on. Where no
    evaluation split is named, it is the first of `EVALUATION_SPLITS` that is there; else both are
    the same. What a template names counts for its own data, and for other files that have it.
    """
    predicts = bool(getattr(args, "predict", None))
    place = find(template, args.dataset, predicts=predicts, **_how(args))
    train_split = args.train_split or template.dataset.get("train") or "train"
    eval_split = args.eval_split or template.dataset.get("eval")
    others = args.dataset and isinstance(place, Files) and not args.eval_split
    if eval_split is None or (others and eval_split not in ("all", *split_names(place))):
        names = split_names(place, getattr(args, "streaming", False))
        usual = (name for name in EVALUATION_SPLITS if name in names and name != train_split)
        eval_split = next(usual, train_split)
    return place, train_split, eval_split


def _how(args: Any) -> dict[str, str | None]:
    """How a recipe's arguments have files read."""
    return {name: getattr(args, name, None) for name in ("encoding", "field")}


def load_asked(
    template: PromptTemplate, args: Any, seed: int, *, shots: int, store: Store | None = None
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
        pool = load_splits(template, args, seed, store=store)[0] if shots else None
        return pool, load_questions(template, args, store)
    place, train_split, eval_split = splits_of(template, args)
    alone = eval_split != train_split
    if isinstance(place, Files):  # of the hub nothing is fetched to see whether there is more
        alone = alone and not place.one_split and train_split not in split_names(place)
    if shots or not alone:
        return load_splits(template, args, seed, store=store)
    return None, load_rows(
        template,
        args.dataset,
        eval_split,
        max_samples=args.max_eval_samples,
        seed=_EVALUATION_SEED,
        skip_bad_rows=args.skip_bad_rows,
        store=store,
        **_how(args),
    )


def overlap(train: Rows, evaluation: Rows, template: PromptTemplate) -> int:
    """How many evaluation rows ask exactly what a training row asks."""
    keys = (row_keys(template, rows.rows) for rows in (evaluation, train))
    return int(np.isin(*keys).sum())


def untrained_classes(train: Rows, template: PromptTemplate) -> list[str]:
    """The classes that no training row has."""
    there = set(row_labels(template, train.rows).tolist())
    return [name for number, name in enumerate(template.verbalizer) if number not in there]


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


def _open(
    template: PromptTemplate,
    place: Files | Hub,
    split: str,
    skip_bad_rows: bool,
    answers: bool,
    store: Store | None,
) -> _Table:
    source, store = open_source(place, split, template, answers), store or Store()

    def check(places: np.ndarray | None = None) -> Checked:
        checked = check_rows(template, source, answers, store, places)
        if checked.problems and not skip_bad_rows:
            raise UserError(list_bad(checked.problems))
        return checked

    def refuse_none(rows: Sequence, problems: Sequence[str]) -> None:
        if problems and not len(rows):
            raise UserError(
                f"{source.name}: no good row among {len(problems):,}; the first: {problems[0]}"
            )

    def check_drawn(places: Sequence[int], limit: int | None) -> tuple[StoredRows, int]:
        places, problems, parts = np.asarray(places), [], []
        while len(places) and (limit is None or limit > sum(map(len, parts))):
            wanted = len(places) if limit is None else limit - sum(map(len, parts))
            checked = check(places[:wanted])
            parts.append(checked.rows)
            problems += checked.problems
            places = places[wanted:]
        rows = sum(parts[1:], parts[0])
        refuse_none(rows, problems)
        return rows, len(problems)

    # Of a hub data set, which may have millions of rows, only those that are drawn are checked.
    if isinstance(place, Hub):
        refuse_missing_columns(template, source.name, source.columns, answers)
        return _Table(source.name, source.count, _hub_classes(source, template), check_drawn)
    checked = check()
    refuse_none(checked.rows, checked.problems)
    return _Table(
        source.name,
        len(checked.rows),
        checked.rows.labels,
        lambda places, limit: (checked.rows.select(places[:limit]), len(checked.problems)),
    )


def _hub_classes(source: Source, template: PromptTemplate) -> np.ndarray:
    """[rows] a number for each value in the label's column of a hub's data set."""
    import pyarrow

    none = np.zeros(source.count, dtype=np.int64)
    column = template.column(template.label) if template.verbalizer else None
    if column not in source.columns:
        return none
    table = source.table([]).select_columns([column]).with_format("arrow")[:]
    try:
        coded = table.column(0).combine_chunks().dictionary_encode()
    except pyarrow.ArrowNotImplementedError:  # lists: the check of the rows says so
        return none
    return coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)


def _take(table: _Table, places: np.ndarray, limit: int | None, seed: int, note: str = "") -> Rows:
    available = len(places)
    if limit is not None:
        if limit < 1:
            raise UserError(f"{table.source}: {limit} rows asked for; ask for 1 or more")
        places = places[order_by_shares(table.classes[places], seed, limit)]
    rows, skipped = table.read(places, limit)
    if limit is None or len(rows) < limit:  # all were read, the bad ones too
        available = len(rows)
    return Rows(rows, table.source + note, skipped, available)
