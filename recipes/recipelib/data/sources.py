"""Finds rows (in a file, a folder or on the hub) and reads them as they come, good or bad.

`text_rows.py` reads the text formats; `rows.py` checks rows against the template.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.data.text_rows import Span, hash_file, read_text_rows, scan
from recipelib.prompts import TEMPLATE_FOLDER, PromptTemplate, RowError
from recipelib.runtime import ArrowFile, UserError, digest, one_line, read_arrow

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from datasets import Dataset, IterableDataset
    from pyarrow import parquet

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_HUB_ID = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:/\\<>|?*]+))?", re.ASCII)
_FILE = re.compile(r"(?P<split>.+)\.(jsonl|json|csv|tsv|parquet)", re.IGNORECASE)
# Shards on the hub are train-00000-of-00002.parquet; older ones have a hash at the end.
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?(-[0-9a-f]+)?\.parquet")

# A part of a file for one process to read: large enough to be worth one, and the files of a large
# data set not too many.
_LEAST_BYTES, _MOST_BYTES, _MOST_ROWS = 2**18, 2**24, 10_000

_NO_SPLIT = "no such split"
_NO_PARQUET = "{}: no Parquet file ({}); write it again"

# The number of a row's file, its line or number there, and the row or what is wrong with it.
Entry = tuple[int, int, dict[str, Any] | RowError]


@dataclass(frozen=True)
class Hub:
    """A data set on the hub."""

    path: str
    config: str | None
    revision: str | None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.path}{config}@{self.revision or 'main'}"


@dataclass(frozen=True)
class Source:
    """The rows of one split, before any check.

    Attributes:
        name: the file as the user gave it, or the hub's id, revision and split.
        identity: a key for the rows.
        where: of each file, where a row stands in it: "rows.csv:{}".
        columns: of a hub's data set; else [], for they are found while the rows are read.
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


def locate(
    template: PromptTemplate | None,
    dataset: str | None,
    revision: str | None,
    option: str = "--dataset",
) -> Path | Hub:
    """The file, folder or hub data set that `dataset` names, or the template if that is None.

    A file or folder that exists goes before a hub id. A template's path starts at the template's
    folder or at `data_templates/`.

    Args:
        template: may be None if `dataset` is given.
        option: the command-line option that gave `dataset`, for errors.
    Raises:
        UserError: neither names any data, or what is named is neither there nor a hub id.
    """
    config = None
    if dataset is None:
        name = template.dataset.get("path")
        shown = f"{template.path}: dataset.path: {name}"
        if not name:
            raise UserError(
                f"{template.path}: dataset.path: is missing; pass --dataset a hub id or a file"
            )
        existing = [
            folder / name
            for folder in (template.path.parent, TEMPLATE_FOLDER)
            if (folder / name).exists()
        ]
        config = template.dataset.get("name")
        revision = revision or template.dataset.get("revision")
    else:
        name, shown = dataset, f"{option} {dataset}"
        existing = [Path(name)] if name and Path(name).exists() else []
    if existing:
        return existing[0]
    match = _HUB_ID.fullmatch(name)
    if match is None or Path(name).suffix.lower() in FORMATS:
        raise UserError(
            f"{shown}: no such file or folder; pass one that exists, or a hub id such as owner/name"
        )
    return Hub(match["path"], match["config"] or config, revision)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The file of a split in a folder, or its shards in order; if the folder has none, those in its
    `data` folder, where copies of the hub's data sets have them.
    """
    known: set[str] = set()
    for place in (folder, folder / "data"):
        files = sorted(file for file in place.glob("*") if _FILE.fullmatch(file.name))
        exact = [file for file in files if _FILE.fullmatch(file.name)["split"] == split]
        all_shards = [(match, file) for file in files if (match := _SHARD.fullmatch(file.name))]
        shards = [(match, file) for match, file in all_shards if match["split"] == split]
        if exact or shards:
            break
        sharded = {file: match["split"] for match, file in all_shards}
        known |= {sharded.get(file) or _FILE.fullmatch(file.name)["split"] for file in files}
    else:
        hint = (
            f"its splits: {', '.join(sorted(known))}; choose with --train_split and --eval_split"
            if known
            else f"name the files after their splits: {split}.jsonl (or {', '.join(FORMATS[1:])})"
        )
        raise UserError(f"{_shown(folder)}: no file for the split {split!r}; {hint}")
    if len(exact) > 1 or (exact and shards):
        names = [file.name for file in exact] + [file.name for _, file in shards]
        raise UserError(
            f"{_shown(place)}: {names[0]} and {names[1]} both are the split {split!r}; keep one"
        )
    counts = {int(match["count"]) for match, _ in shards if match["count"]}
    if counts and counts != {len(shards)}:
        raise UserError(
            f"{_shown(place)}: {len(shards)} of {max(counts)} {split} files are there; "
            "copy all files of one version"
        )
    in_order = sorted(shards, key=lambda shard: int(shard[0]["number"]))
    return exact or [file for _, file in in_order]


def has_split(place: Path | Hub, split: str, streaming: bool = False) -> bool:
    """Whether a folder has a file for a split, or a hub data set the split; False for a file.

    Args:
        streaming: fetch no more of a hub's data set than that takes.
    Raises:
        UserError: what else keeps a hub's data set from being read.
    """
    if isinstance(place, Hub):
        try:
            with _hub_problems(place, split) as load:
                load(**({"streaming": True} if streaming else {}))
        except UserError as error:
            if _NO_SPLIT in str(error):
                return False
            raise
        return True
    if not isinstance(place, Path) or not place.is_dir():
        return False
    files = [file.name for folder in (place, place / "data") for file in folder.glob(f"{split}*")]
    matches = [_SHARD.fullmatch(name) or _FILE.fullmatch(name) for name in files]
    return any(match and match["split"] == split for match in matches)


def _shown(path: Path) -> str:
    """A path as the user gave it; bundled data relative to the repository."""
    bundled = path.is_relative_to(TEMPLATE_FOLDER)
    return str(path.relative_to(TEMPLATE_FOLDER.parent) if bundled else path)


def open_source(place: Path | Hub, split: str, template: PromptTemplate, answers: bool) -> Source:
    """The rows of a split; a file is one split, whatever its name.

    Args:
        template: decides which ClassLabel integers become names (`_class_reader`).
        answers: whether a row has to bring its answers.
    Raises:
        UserError: there is no such split, it has no rows, or it cannot be read or fetched.
    """
    if isinstance(place, Hub):
        return _open_hub(place, split, template, answers)
    files = [place] if place.is_file() else _files_of_split(place, split)
    name = _shown(files[0])
    if len(files) > 1:
        name = f"{_shown(place)}, split {split} ({len(files)} files)"
    for file in files:
        _refuse_unknown(file)
    if files[0].suffix.lower() == ".parquet":
        return _open_parquet(files, name, template, answers)
    return _open_text(files[0], name)


def _refuse_unknown(file: Path) -> str:
    """Refuse a file of an unknown format; returns what messages call the file."""
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"{_shown(file)}: not one of {', '.join(FORMATS)}; convert the file")
    return _shown(file)


def _open_text(file: Path, name: str) -> Source:
    """The rows lie in the Arrow file as JSON, which brings back any row exactly; Arrow's own types
    would ask all rows to have the same.
    """
    import xxhash
    from datasets import Features, Value

    features, hashed = Features(row=Value("string")), xxhash.xxh3_128()
    size = file.stat().st_size
    most = max(_LEAST_BYTES, min(_MOST_BYTES, size // 32))
    lines, spans = scan(file, name, most, hashed)

    def entries(span: Span, path: Path) -> Iterator[Entry]:
        with ArrowFile(path, features) as stored:
            for line, row in read_text_rows(file, name, span):
                text = None if isinstance(row, RowError) else json.dumps(row, ensure_ascii=False)
                stored.add(text)
                yield 0, line, row

    return Source(
        name,
        digest(hashed.hexdigest(), file.suffix.lower()),
        [_braced(f"{name}:") + "{}"],
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
            named = _class_reader(
                Features.from_arrow_schema(schemas[0]) if typed else {}, template, answers
            )
            plain = pyarrow.schema([_plain(column) for column in schemas[0]])
            Features.from_arrow_schema(plain)  # raises for what a table in memory cannot have
            if not schemas[-1].equals(schemas[0]):
                raise UserError(
                    f"{shown}: its columns or their types differ from those of "
                    f"{_shown(files[0])}; write all files of a split alike"
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

    where = [_braced(f"{_shown(file)}: row ") + "{}" for file in files]
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

    shown = _refuse_unknown(file)
    try:
        with parquet.ParquetFile(file) as opened:
            yield shown, opened
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # of what is written meanwhile
        raise UserError(_NO_PARQUET.format(shown, one_line(error))) from None


def first_rows(
    place: Path | Hub, split: str, count: int, streaming: bool = False
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
            return _stream_hub(place, split, count)[1]
        # As Arrow's values: images are not decoded.
        return _load_hub(place, split).with_format("arrow")[:count].to_pylist()
    file = place if place.is_file() else _files_of_split(place, split)[0]
    shown = _refuse_unknown(file)
    problem = f"{shown}: holds no rows; pass a file with at least one"
    if file.suffix.lower() == ".parquet":
        with _read_parquet(file) as (_, opened):
            for batch in opened.iter_batches(batch_size=count):
                return batch.to_pylist()
        raise UserError(problem)
    rows: list[dict[str, Any]] = []
    for line, row in read_text_rows(file, shown):
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
    place: Path | Hub, split: str, template: PromptTemplate, count: int
) -> tuple[str, IterableDataset, list, Callable[[dict[str, Any]], dict[str, Any] | RowError]]:
    """What messages call a split of the hub or of Parquet files, its rows as they come, the first
    `count` of them, and a function that turns a row's classes into their names.

    Raises:
        UserError: as `open_source`, or files of another format.
    """
    if isinstance(place, Hub):
        name, (data, first) = f"{place}, split {split}", _stream_hub(place, split, count)
    else:
        import datasets

        files = [place] if place.is_file() else _files_of_split(place, split)
        name = f"{_shown(place)}, split {split}"
        if any(file.suffix.lower() != ".parquet" for file in files):
            raise UserError(
                f"{_shown(files[0])}: --streaming true reads the hub and Parquet files; leave it "
                "out: rows of other files are prepared once, and mapped into memory from then on"
            )
        for file in files:
            with _read_parquet(file):
                pass  # raises for what is no Parquet file
        data = datasets.load_dataset(
            "parquet", data_files=list(map(str, files)), split="train", streaming=True
        ).decode(False)
        first = list(islice(data, count))
        if not first:
            raise UserError(f"{name}: holds no rows; pass files with at least one")
    return name, data, first, _class_reader(data.features or {}, template, answers=True)


def _load_hub(hub: Hub, split: str) -> Dataset:
    with _hub_problems(hub, split) as load:
        data = load()
        return _unless_empty(data, len(data), hub, split)


def _stream_hub(hub: Hub, split: str, count: int) -> tuple[IterableDataset, list]:
    """The rows of a split as they come, images and the like as their bytes, and the first few."""
    with _hub_problems(hub, split) as load:
        data = load(streaming=True)
        data = data.decode(False) if data.features else data
        first = list(islice(data, count))
        return data, _unless_empty(first, len(first), hub, split)


def _unless_empty(rows: Any, count: int, hub: Hub, split: str) -> Any:
    if not count:
        raise UserError(f"{hub}, split {split}: holds no rows; choose another split")
    return rows


@contextmanager
def _hub_problems(hub: Hub, split: str) -> Iterator[Callable]:
    """`load_dataset` for this split; what it or reading the rows raises becomes one line."""
    import datasets

    try:
        yield partial(
            datasets.load_dataset, hub.path, hub.config, split=split, revision=hub.revision
        )
    except UserError:
        raise
    except Exception as error:  # a dozen types from five libraries; all mean that it cannot load
        raise UserError(f"{hub}, split {split}: {_hub_problem(error, hub)}") from error


def _open_hub(hub: Hub, split: str, template: PromptTemplate, answers: bool) -> Source:
    name, data = f"{hub}, split {split}", _load_hub(hub, split)
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
    )


def _hub_problem(error: Exception, hub: Hub) -> str:
    text = str(error)
    listed = re.search(r"\[.*?\]", text)
    names = listed.group().strip("[]").replace("'", "") if listed else "see its page on the hub"
    if isinstance(error, ConnectionError) or "Couldn't reach" in text:
        return "the hub cannot be reached; pass --dataset a folder or a file"
    if "gated" in text:
        return f"is gated: accept its terms at hf.co/datasets/{hub.path} and run 'hf auth login'"
    if "Revision" in text and "doesn't exist" in text:
        return "no such revision; mend dataset.revision"
    if "doesn't exist on the Hub" in text:
        return "not on the hub (or private), and no file or folder of this name; mend the name"
    if "scripts are no longer supported" in text:
        return (
            "a loading script, which is not run; try dataset.revision: refs/convert/parquet in the "
            "template, or pass --dataset a folder or a file"
        )
    if "Unknown split" in text or "Bad split" in text:
        return f"{_NO_SPLIT}; its splits: {names}; choose with --train_split and --eval_split"
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"name one of its configs, as {hub.path}:CONFIG; its configs: {names}"
    text = f"{text} {error.__cause__ or ''}"
    return f"{type(error).__name__}: {one_line(text)}; pass --dataset a folder or a file"


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
