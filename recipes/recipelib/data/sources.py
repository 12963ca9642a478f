"""Reads rows of files, folders and the hub as they come, good or bad.

`places.py` finds them, `text_rows.py` reads the text formats; `rows.py` checks rows against the
template.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.data.places import FORMATS, Files, Hub, load_hub, shown_path, stream_hub
from recipelib.data.text_rows import Reading, Span, hash_file, read_text_rows, scan
from recipelib.prompts import PromptTemplate, RowError
from recipelib.runtime import ArrowFile, UserError, digest, one_line, read_arrow

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from datasets import Dataset, IterableDataset
    from pyarrow import parquet

# A part of a file for one process to read: large enough to be worth one, and the files of a large
# data set not too many.
_LEAST_BYTES, _MOST_BYTES, _MOST_ROWS = 2**18, 2**24, 10_000

_NO_PARQUET = "{}: no Parquet file ({}); write it again"

# The number of a row's file, its line or number there, and the row or what is wrong with it.
Entry = tuple[int, int, dict[str, Any] | RowError]


@dataclass(frozen=True)
class Source:
    """The rows of one split, before any check.

    Attributes:
        name: the file as the user gave it, or the hub's id, revision and split.
        identity: a key for the rows.
        where: of each file, where a row stands in it: "rows.csv:{}".
        columns: of a hub's data set; else [], for they are found while the rows are read.
        classes: the names of the label's classes, where the data says them.
        count: rows; of a text file its lines.
        pieces: parts that can be read by themselves; of a hub's data set [], for any places can.
        entries: the rows of such a part (of a hub's data set, at these places), which it also
            writes into an Arrow file.
        table: those Arrow files, or the hub's data set: one row for each entry.
        read: from a part of that table, as pyarrow's, to its rows.
    """

    name: str
    identity: str
    where: list[str]
    columns: list[str]
    count: int
    pieces: list
    entries: Callable[[Any, Path], Iterator[Entry]]
    table: Callable[[list[Path]], Dataset]
    read: Callable[[pyarrow.Table], list[dict[str, Any]]]
    classes: list[str] | None = None


def open_source(place: Files | Hub, split: str, template: PromptTemplate, answers: bool) -> Source:
    """The rows of a split; a file is one split, whatever its name.

    Args:
        template: decides which ClassLabel integers become names (`_class_reader`).
        answers: whether a row has to bring its answers.
    Raises:
        UserError: there is no such split, it has no rows, or it cannot be read or fetched.
    """
    if isinstance(place, Hub):
        return _open_hub(place, split, template, answers)
    files, reading = place.of_split(split)
    name = shown_path(files[0])
    if len(files) > 1:
        name = f"{shown_path(place.path)}, split {split} ({len(files)} files)"
    elif place.lists:
        name = f"{name}, split {split}"
    for file in files:
        _refuse_unknown(file, reading)
    if files[0].suffix.lower() == ".parquet":
        return _open_parquet(files, name, template, answers)
    found = None if reading.field else place.object
    if found and found.lists and template.missing_columns(found.keys, answers=answers):
        raise UserError(f"{name}: is one object, not rows; {found}")
    return _open_text(files[0], name, reading)


def _refuse_unknown(file: Path, reading: Reading) -> str:
    """Refuse a file of an unknown format, or one that is not read in this way; returns what
    messages call the file.
    """
    suffix, shown = file.suffix.lower(), shown_path(file)
    if suffix not in FORMATS:
        raise UserError(f"{shown}: not one of {', '.join(FORMATS)}; convert the file")
    if reading.encoding and suffix == ".parquet":
        raise UserError(
            f"{shown}: Parquet says itself how its text is encoded; leave out --encoding"
        )
    if reading.field and suffix not in (".json", ".jsonl"):
        raise UserError(f"{shown}: --field is for JSON files; leave it out")
    return shown


def _open_text(file: Path, name: str, reading: Reading) -> Source:
    """The rows lie in the Arrow file as JSON, which brings back any row exactly; Arrow's own types
    would ask all rows to have the same.
    """
    import xxhash
    from datasets import Features, Value

    features, hashed = Features(row=Value("string")), xxhash.xxh3_128()
    size = file.stat().st_size
    most = max(_LEAST_BYTES, min(_MOST_BYTES, size // 32))
    shown = shown_path(file)
    lines, spans = scan(file, shown, most, hashed, reading)

    def entries(span: Span, path: Path) -> Iterator[Entry]:
        with ArrowFile(path, features) as stored:
            for line, row in read_text_rows(file, shown, span, reading):
                text = None if isinstance(row, RowError) else json.dumps(row, ensure_ascii=False)
                stored.add(text)
                yield 0, line, row

    return Source(
        name,
        digest(hashed.hexdigest(), file.suffix.lower(), *reading.field),
        [_braced(f"{shown}:") + "{}"],
        [],
        lines,
        spans,
        entries,
        read_arrow,
        lambda table: [json.loads(text) for text in table.column(0).to_pylist()],
    )


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _open_parquet(files: list[Path], name: str, template: PromptTemplate, answers: bool) -> Source:
    """The rows lie in the Arrow files with their own types."""
    import pyarrow
    import xxhash
    from datasets import Features

    hashed = xxhash.xxh3_128()
    schemas, pieces, total = [], [], 0
    for number, file in enumerate(files):
        with _read_parquet(file) as (shown, opened):
            schemas.append(opened.schema_arrow)
            hash_file(file, hashed)
            groups, rows, first = [], 0, 0
            for group in range(opened.num_row_groups):
                groups.append(group)
                rows += opened.metadata.row_group(group).num_rows
                if rows >= _MOST_ROWS or group == opened.num_row_groups - 1:
                    pieces.append((number, groups, first))
                    groups, rows, first = [], 0, first + rows
            total += opened.metadata.num_rows
            names = schemas[-1].names
            if twice := [column for column in names if names.count(column) > 1]:
                raise UserError(
                    f"{shown}: the column {twice[0]!r} stands twice; give each its own name"
                )
            # What `datasets` writes into the schema says which integers are classes.
            typed = b"huggingface" in (schemas[0].metadata or {})
            features = Features.from_arrow_schema(schemas[0]) if typed else {}
            named = _class_reader(features, template, answers)
            plain = pyarrow.schema([_plain(column) for column in schemas[0]])
            Features.from_arrow_schema(plain)  # raises for what a table in memory cannot have
            if not schemas[-1].equals(schemas[0]):
                raise UserError(
                    f"{shown}: its columns or their types differ from those of "
                    f"{shown_path(files[0])}; write all files of a split alike"
                )

    def entries(piece: tuple[int, list[int], int], path: Path) -> Iterator[Entry]:
        number, groups, place = piece
        with (
            _read_parquet(files[number]) as (_, opened),
            pyarrow.OSFile(str(path), "wb") as file,
            pyarrow.ipc.new_stream(file, plain) as stored,
        ):
            for batch in opened.iter_batches(batch_size=500, row_groups=groups):
                table = pyarrow.Table.from_batches([batch]).replace_schema_metadata().cast(plain)
                stored.write_table(table)
                for row in table.to_pylist():
                    place += 1
                    yield number, place, named(row)

    def read(table: pyarrow.Table) -> list[dict[str, Any]]:
        return [named(row) for row in table.to_pylist()]

    where = [_braced(f"{shown_path(file)}: row ") + "{}" for file in files]
    return Source(
        name,
        digest(hashed.hexdigest(), ".parquet"),
        where,
        schemas[0].names,
        total,
        pieces,
        entries,
        read_arrow,
        read,
        class_names(features, template),
    )


def _plain(column: pyarrow.Field) -> pyarrow.Field:
    """A column without its metadata, and with the values of a dictionary in place."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    return pyarrow.field(column.name, kind)


@contextmanager
def _read_parquet(file: Path) -> Iterator[tuple[str, parquet.ParquetFile]]:
    """What messages call a Parquet file, and the file, opened; what goes wrong is one line."""
    import pyarrow
    from pyarrow import parquet

    shown = shown_path(file)
    try:
        with parquet.ParquetFile(file) as opened:
            yield shown, opened
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # of what is written meanwhile
        raise UserError(_NO_PARQUET.format(shown, one_line(error))) from None


def first_rows(
    place: Files | Hub, split: str, count: int, streaming: bool = False
) -> list[dict[str, Any]]:
    """The first rows of a split that can be read, without a template: at least one, at most so
    many.

    Args:
        streaming: fetch no more of a hub's data set than that.
    Raises:
        UserError: as `open_source`, or no row can be read.
    """
    if isinstance(place, Hub):
        if streaming:
            return stream_hub(place, split, count)[1]
        # As Arrow's values: images are not decoded.
        return load_hub(place, split).with_format("arrow")[:count].to_pylist()
    (file, *_), reading = place.of_split(split)
    shown = _refuse_unknown(file, reading)
    problem = f"{shown}: holds no rows; pass a file with at least one"
    if file.suffix.lower() == ".parquet":
        with _read_parquet(file) as (_, opened):
            for batch in opened.iter_batches(batch_size=count):
                return batch.to_pylist()
        raise UserError(problem)
    rows: list[dict[str, Any]] = []
    for line, row in read_text_rows(file, shown, reading=reading):
        if isinstance(row, dict):
            rows.append(row)
        else:
            problem = f"{shown}:{line}: {one_line(row)}"
        if len(rows) == count:
            break
    if not rows:
        raise UserError(problem)
    return rows


def open_stream(
    place: Files | Hub, split: str, template: PromptTemplate, count: int
) -> tuple[str, IterableDataset, list, Callable[[dict[str, Any]], dict[str, Any] | RowError]]:
    """What messages call a split of the hub or of Parquet files, its rows as they come, the first
    `count` of them, and a function that turns a row's classes into their names.

    Raises:
        UserError: as `open_source`, or files of another format.
    """
    if isinstance(place, Hub):
        name, (data, first) = f"{place}, split {split}", stream_hub(place, split, count)
    else:
        import datasets

        files, reading = place.of_split(split)
        name = f"{shown_path(place.path)}, split {split}"
        if any(file.suffix.lower() != ".parquet" for file in files):
            raise UserError(
                f"{shown_path(files[0])}: --streaming true reads the hub and Parquet files; leave "
                "it out: rows of other files are prepared once, and mapped into memory from then on"
            )
        for file in files:
            _refuse_unknown(file, reading)
            with _read_parquet(file):
                pass  # raises for what is no Parquet file
        data = datasets.load_dataset(
            "parquet", data_files=list(map(str, files)), split="train", streaming=True
        ).decode(False)
        first = list(islice(data, count))
        if not first:
            raise UserError(f"{name}: holds no rows; pass files with at least one")
    return name, data, first, _class_reader(data.features or {}, template, answers=True)


def _open_hub(hub: Hub, split: str, template: PromptTemplate, answers: bool) -> Source:
    return open_table(load_hub(hub, split), f"{hub}, split {split}", template, answers)


def open_table(data: Dataset, name: str, template: PromptTemplate, answers: bool) -> Source:
    """The rows of a `datasets.Dataset`; `name` is what messages call it."""
    named = _class_reader(data.features, template, answers)
    raw = data.with_format("arrow")

    def read(table: pyarrow.Table) -> list[dict[str, Any]]:
        return [named(row) for row in table.to_pylist()]

    def entries(places: np.ndarray, path: Path) -> Iterator[Entry]:
        for start in range(0, len(places), 500):
            chosen = places[start : start + 500].tolist()
            for place, row in zip(chosen, read(raw[chosen]), strict=True):
                yield 0, place + 1, row

    return Source(
        name,
        digest(name, data._fingerprint),
        [_braced(f"{name}, row ") + "{}"],
        data.column_names,
        len(data),
        [],
        entries,
        lambda paths: data,
        read,
        class_names(data.features, template),
    )


def class_names(features: Mapping[str, Any], template: PromptTemplate) -> list[str] | None:
    """The names of the label's classes, where the data says them."""
    from datasets import ClassLabel

    feature = features.get(template.column(template.label)) if template.label else None
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _class_reader(
    features: Mapping[str, Any], template: PromptTemplate, answers: bool
) -> Callable[[dict[str, Any]], dict[str, Any] | RowError]:
    """A function that turns the integers of ClassLabel features in a row into their classes' names.

    The label's column keeps its integers if the verbalizer has keys that are such integers and none
    that is a class's name. That is decided for the whole column: where classes are named "1" to
    "5", the key "1" is a name.
    """
    from datasets import ClassLabel, LargeList, List

    def has_classes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return any(map(has_classes, feature.values()))
        return isinstance(feature, ClassLabel) or (
            isinstance(feature, List | LargeList) and has_classes(feature.feature)
        )

    def to_names(value: Any, feature: Any) -> Any:
        if value is None:
            return None
        if isinstance(feature, ClassLabel):
            if value == -1:
                raise RowError("-1 marks a row without a label; take a split that has labels")
            if not 0 <= value < len(feature.names):
                raise RowError(f"{value} is not one of its {len(feature.names)} classes; mend it")
            return feature.names[value]
        if isinstance(feature, dict):
            return {key: to_names(inner, feature[key]) for key, inner in value.items()}
        if isinstance(feature, List | LargeList):
            return [to_names(inner, feature.feature) for inner in value]
        return value

    label = template.column(template.label) if template.label else None
    label_feature = features.get(label)
    keeps_integers = False
    if isinstance(label_feature, ClassLabel):
        keys = set(template.verbalizer)
        integers = set(map(str, range(len(label_feature.names))))
        keeps_integers = bool(keys & integers) and not keys & set(label_feature.names)
    classes = {column: feature for column, feature in features.items() if has_classes(feature)}
    needed = template.prompt_variables | (template.answer_variables if answers else set())
    needed = {template.column(variable) for variable in needed}

    def read(row: dict[str, Any]) -> dict[str, Any] | RowError:
        for column, feature in classes.items():
            try:
                named = to_names(row[column], feature)
            except RowError as error:
                if column in needed:
                    return RowError(f"{column}: {error}")
                named = None
            if named is None or column != label or not keeps_integers:
                row[column] = named
        return row

    return read
