"""Checks rows against a template, in several processes, and keeps them as Arrow files from which
they are read when they are asked for: no process holds all of them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipelib.data.sources import Source
from recipelib.prompts import PromptTemplate, RowError
from recipelib.runtime import (
    ArrowFile,
    Store,
    UserError,
    code_digest,
    cut,
    digest,
    one_line,
    read_arrow,
    say,
    write_json,
)

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN_BAD_ROWS = 20
_SHOWN_UNREAD = 8
_READ_AT_ONCE = 500


class StoredRows(Sequence):
    """Rows in Arrow files, each column -> value as plain Python values.

    Args:
        table: of a source.
        read: the source's.
        places: [n] of the rows in the table.
        keys: [n] numbers; rows that ask the same have the same (`row_key`).
        labels: [n] the number of each row's class in the verbalizer, -1 for none.
        files, lines: [n] the number of each row's file, and where it stands there, from 1.
        names: of the files.
        identity: a key for the source and the template that checked it.
    """

    def __init__(
        self,
        table: Dataset,
        read: Callable[[Any], list[dict[str, Any]]],
        places: np.ndarray,
        keys: np.ndarray,
        labels: np.ndarray,
        files: np.ndarray,
        lines: np.ndarray,
        names: list[str],
        identity: str,
    ):
        self._table, self._read, self._identity = table.with_format("arrow"), read, identity
        self.places, self.keys, self.labels = places, keys, labels
        self.files, self.lines, self._names = files, lines, names

    @property
    def identity(self) -> str:
        """A key for these rows in this order."""
        return digest(self._identity, self.places.tobytes())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return self.select(np.arange(len(self))[at])
        return self._rows(self.places[[at]])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _READ_AT_ONCE):
            yield from self._rows(self.places[start : start + _READ_AT_ONCE])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and [*self] == [*other]

    __hash__ = None

    def _rows(self, places: np.ndarray) -> list[dict[str, Any]]:
        first, last = int(places[0]), int(places[-1])
        if last - first == len(places) - 1 and (np.diff(places) == 1).all():
            return self._read(self._table[first : last + 1])
        return self._read(self._table[places.tolist()])

    def select(self, order: Sequence[int] | np.ndarray) -> StoredRows:
        """The rows at these places, in this order; a place may stand there twice."""
        at = np.asarray(order, dtype=np.int64)
        return self._with(self._table, *(array[at] for array in self._arrays))

    def __add__(self, other: StoredRows) -> StoredRows:
        """These rows and others of the same table."""
        both = zip(self._arrays, other._arrays, strict=True)
        return self._with(self._table, *map(np.concatenate, both))

    def mapped_anew(self) -> StoredRows:
        """The same rows behind a mapping of its own: what was read of it is freed with it."""
        files = [file["filename"] for file in self._table.cache_files]
        table = read_arrow(files) if files else self._table
        if len(table) != len(self._table) or table.column_names != self._table.column_names:
            table = self._table  # a part of its files, or their columns under other names
        return self._with(table, *self._arrays)

    def locations(self) -> list[dict[str, Any]]:
        """Where each row stands: its `line`, as errors count, and of several files its `file`."""
        found = [{"line": line} for line in self.lines.tolist()]
        if len(self._names) > 1:
            for row, file in zip(found, self.files.tolist(), strict=True):
                row["file"] = self._names[file]
        return found

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.places, self.keys, self.labels, self.files, self.lines

    def _with(self, table: Dataset, *arrays: np.ndarray) -> StoredRows:
        return StoredRows(table, self._read, *arrays, self._names, self._identity)


def select(rows: Sequence, order: Sequence[int]) -> Sequence:
    """The rows at these places, in this order."""
    return rows.select(order) if isinstance(rows, StoredRows) else [rows[at] for at in order]


def row_key(template: PromptTemplate, row: Mapping[str, Any]) -> int:
    """A number of 64 bits for what a row asks: rows that ask the same have the same."""
    values = template.variables(row)
    asked = [values.get(name) for name in sorted(template.prompt_variables)]
    text = json.dumps(asked, sort_keys=True, default=str)
    hashed = hashlib.blake2b(text.encode(), digest_size=8)
    return int.from_bytes(hashed.digest(), "big", signed=True)


def row_keys(template: PromptTemplate, rows: Sequence[Mapping]) -> np.ndarray:
    """[rows] the `row_key` of each; rows that this template has checked bring theirs."""
    if isinstance(rows, StoredRows):
        return rows.keys
    return np.array([row_key(template, row) for row in rows], dtype=np.int64)


def row_labels(template: PromptTemplate, rows: Sequence[Mapping]) -> np.ndarray:
    """[rows] the number of each row's class in the verbalizer, -1 for none; rows that this template
    has checked bring theirs.
    """
    if isinstance(rows, StoredRows):
        return rows.labels
    numbers = {label: number for number, label in enumerate(template.verbalizer)}
    labels = (template.read_class(row[template.column(template.label)]) for row in rows)
    return np.array([numbers.get(label, -1) for label in labels], dtype=np.int64)


@dataclass(frozen=True)
class Checked:
    """The good rows of a source, in order, and what is wrong with each other row."""

    rows: StoredRows
    problems: Sequence[str]


def check_rows(
    template: PromptTemplate,
    source: Source,
    answers: bool,
    store: Store,
    places: Sequence[int] | None = None,
) -> Checked:
    """Check the rows of a source, unless that was done before.

    Args:
        answers: whether a row has to bring its answers.
        places: check only these rows of a source that is a table already, in this order.
    Raises:
        UserError: a column that no row has, or what cannot be read at all.
    """
    from datasets import Features, Value

    order = None if places is None else np.asarray(places, dtype=np.int64)
    chosen = b"" if order is None else order.tobytes()
    identity = digest(source.identity, code_digest("prompts", "data"), template.fields, answers)
    features = Features(
        file=Value("int32"),
        line=Value("int64"),
        problem=Value("string"),
        key=Value("int64"),
        label=Value("int32"),
    )
    numbers = {label: number for number, label in enumerate(template.verbalizer)}

    def make(folder: Path) -> None:
        columns: dict[str, None] = {}
        unread: Counter[str] = Counter()

        def work(number: int, piece: Any, tick: Callable[[], None]) -> tuple[list[str], Counter]:
            met: dict[str, None] = {}
            passed_over: Counter[str] = Counter()
            if order is not None:
                piece = order[piece.start : piece.stop]
            entries = source.entries(piece, folder / f"rows-{number:05}.arrow")
            with ArrowFile(folder / f"checks-{number:05}.arrow", features) as checks:
                for file, line, row in entries:
                    problem, key, label = None, 0, -1
                    try:
                        if isinstance(row, RowError):
                            raise row
                        met.update(dict.fromkeys(row))
                        question, *_ = template.questions(row, answers=answers)
                        key = row_key(template, row)
                        label = numbers.get(question.label, -1)
                        passed_over.update(question.unread)
                    except RowError as error:
                        problem = one_line(error)
                    checks.add(file, line, problem, key, label)
                    tick()
            return list(met), passed_over

        pieces, total = source.pieces, source.count
        if order is not None:
            pieces, total = cut(len(order), store.processes), len(order)
        done = store.fill(folder, work, pieces, total=total, description="checking")
        for met, passed_over in done:
            columns.update(dict.fromkeys(met))
            unread.update(passed_over)
        write_json(folder / "columns.json", {"columns": list(columns), "unread": unread})

    folder = store.get("rows", digest(identity, chosen), make)
    files = sorted(folder.glob("checks-*.arrow"))
    checks = read_arrow(files).with_format("arrow")[:] if files else []
    if not len(checks):
        raise UserError(f"{source.name}: holds no rows; pass a file with at least one")
    met = json.loads((folder / "columns.json").read_text("utf-8"))
    if order is None:
        columns = source.columns or met["columns"]
        refuse_missing_columns(template, source.name, columns, answers)
    if note := describe_unread(met["unread"]):
        say(f"warning: {source.name}: {note}")
    problems = checks["problem"]
    good = np.flatnonzero(problems.is_null().to_numpy())
    rows = StoredRows(
        source.table(sorted(folder.glob("rows-*.arrow"))),
        source.read,
        good if order is None else order[good],
        *(checks[name].to_numpy()[good] for name in ("key", "label", "file", "line")),
        [where.format("").removesuffix(": row ") for where in source.where],
        identity,
    )
    if len(good) == len(checks):
        return Checked(rows, [])
    bad = checks.filter(problems.is_valid())
    places = zip(*(bad[name].to_pylist() for name in ("file", "line", "problem")), strict=True)
    return Checked(
        rows, [f"{source.where[file].format(line)}: {problem}" for file, line, problem in places]
    )


def describe_unread(counts: Mapping[str, int]) -> str:
    """What rows say and nothing reads, with how many say so; empty if nothing is."""
    if not counts:
        return ""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in most]
    more = f" and {len(shown) - _SHOWN_UNREAD} more" if len(shown) > _SHOWN_UNREAD else ""
    return (
        f"nothing reads {', '.join(shown[:_SHOWN_UNREAD])}{more}; if that should change what is "
        "learned, put it into the text, or name the column in a --template"
    )


def refuse_missing_columns(
    template: PromptTemplate, name: str, columns: Sequence[str], answers: bool
) -> None:
    """
    Raises:
        UserError: the template needs a column that is not among these.
    """
    missing = template.missing_columns(columns, answers=answers)
    if not missing or not columns:
        return
    lowered = {column.casefold(): column for column in columns}
    cures = []
    for variable in sorted(template.prompt_variables | template.answer_variables):
        if template.column(variable) in missing:
            close = [
                match
                for wanted in (template.column(variable), variable)
                for match in difflib.get_close_matches(wanted.casefold(), lowered, 1)
            ]
            cures.append(f"{variable}={lowered[close[0]] if close else 'COLUMN'}")
    shown = ", ".join(map(repr, islice(columns, 20))) + (", ..." if len(columns) > 20 else "")
    raise UserError(
        f"{name}: no column {', '.join(map(repr, missing))}; the columns are {shown}; "
        f"pass --columns {' '.join(cures)}"
    )


def list_bad(bad: Sequence[str]) -> str:
    """The bad rows, a line each, and how to go on."""
    if len(bad) == 1:
        return f"{bad[0]} (or pass --skip_bad_rows to leave it out)"
    more = len(bad) - _SHOWN_BAD_ROWS
    count = f"{len(bad)} bad rows" if more <= 0 else f"... and {more:,} more bad rows"
    return "\n".join([*bad[:_SHOWN_BAD_ROWS], f"{count} (pass --skip_bad_rows to leave them out)"])
