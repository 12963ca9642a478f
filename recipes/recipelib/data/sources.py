"""Finds rows (in a file, a folder or on the hub) and reads them as they come, good or bad.

`text_rows.py` reads the text formats; `rows.py` checks rows against the template.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipelib.data.text_rows import read_text_rows
from recipelib.prompts import TEMPLATE_FOLDER, PromptTemplate, RowError
from recipelib.runtime import UserError, one_line

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_HUB_ID = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:/\\<>|?*]+))?", re.ASCII)
_FILE = re.compile(r"(?P<split>.+)\.(jsonl|json|csv|tsv|parquet)", re.IGNORECASE)
# Shards on the hub are train-00000-of-00002.parquet; older ones have a hash at the end.
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?(-[0-9a-f]+)?\.parquet")

_NO_PARQUET = "{}: no Parquet file ({}); write it again"

# Where a row stands, and the row itself or what is wrong with it.
Entry = tuple[str, dict[str, Any] | RowError]


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
        sha256: of the file, or of the shards one after the other; None for the hub.
        columns: every column that any row has.
        count: how many rows, bad ones included.
        read: returns the rows at the given places (from 0), in the order given.
    """

    name: str
    sha256: str | None
    columns: list[str]
    count: int
    read: Callable[[Sequence[int]], Iterable[Entry]]


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


def has_split(place: Path | Hub, split: str) -> bool:
    """Whether a local folder has a file for a split; False for a file and for the hub."""
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
    digest = hashlib.sha256()
    entries: list[Entry] = []
    for file in files:
        _refuse_unknown(file)
        entries += _read_file(file, template, answers)
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    if not entries:
        raise UserError(f"{name}: holds no rows; pass a file with at least one")
    columns = dict.fromkeys(column for _, row in entries if isinstance(row, dict) for column in row)
    return Source(
        name,
        digest.hexdigest(),
        list(columns),
        len(entries),
        lambda places: [entries[at] for at in places],
    )


def _refuse_unknown(file: Path) -> str:
    """Refuse a file of an unknown format; returns what messages call the file."""
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"{_shown(file)}: not one of {', '.join(FORMATS)}; convert the file")
    return _shown(file)


def _read_file(file: Path, template: PromptTemplate, answers: bool) -> Iterator[Entry]:
    shown = _shown(file)
    if file.suffix.lower() != ".parquet":
        for line, row in read_text_rows(file, shown):
            yield f"{shown}:{line}", row
        return
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    try:
        table = parquet.read_table(file, partitioning=None)
        # `datasets` writes the columns' types into the schema; they say which integers are classes.
        typed = b"huggingface" in (table.schema.metadata or {})
        features = Features.from_arrow_schema(table.schema) if typed else {}
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(_NO_PARQUET.format(shown, one_line(error))) from None
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise UserError(f"{shown}: the column {twice[0]!r} stands twice; give each its own name")
    named = _class_reader(features, template, answers)
    number = 0
    for batch in table.to_batches(max_chunksize=1000):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:  # a date in year 10000
            raise UserError(_NO_PARQUET.format(shown, one_line(error))) from None
        for row in rows:
            number += 1
            yield f"{shown}: row {number}", named(row)


def first_row(place: Path | Hub, split: str) -> dict[str, Any]:
    """The first row of a split that can be read, without a template.

    Raises:
        UserError: as `open_source`, or no row can be read.
    """
    if isinstance(place, Hub):
        return _load_hub(place, split)[0]
    file = place if place.is_file() else _files_of_split(place, split)[0]
    shown = _refuse_unknown(file)
    problem = f"{shown}: holds no rows; pass a file with at least one"
    if file.suffix.lower() == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1):
                return batch.to_pylist()[0]
        except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise UserError(_NO_PARQUET.format(shown, one_line(error))) from None
        raise UserError(problem)
    for line, row in read_text_rows(file, shown):
        if isinstance(row, dict):
            return row
        problem = f"{shown}:{line}: {one_line(row)}"
    raise UserError(problem)


def _load_hub(hub: Hub, split: str):
    import datasets

    name = f"{hub}, split {split}"
    try:
        data = datasets.load_dataset(hub.path, hub.config, split=split, revision=hub.revision)
    except Exception as error:  # a dozen types from five libraries; all mean that it cannot load
        raise UserError(f"{name}: {_hub_problem(error, hub)}") from error
    if not len(data):
        raise UserError(f"{name}: holds no rows; choose another split")
    return data


def _open_hub(hub: Hub, split: str, template: PromptTemplate, answers: bool) -> Source:
    name, data = f"{hub}, split {split}", _load_hub(hub, split)
    named = _class_reader(data.features, template, answers)

    def read(places: Sequence[int]) -> Iterator[Entry]:
        for at, row in zip(places, data.select(places), strict=True):
            yield f"{name}, row {at + 1}", named(row)

    return Source(name, None, data.column_names, len(data), read)


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
        return f"no such split; its splits: {names}; choose with --train_split and --eval_split"
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
