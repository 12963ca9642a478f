"""Where rows are: finds the file, the folder or the data set of the hub that a recipe's arguments
or a template name, and its splits.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.data.json_rows import Inside
from recipelib.data.text_rows import Reading, inside
from recipelib.prompts import TEMPLATE_FOLDER, PromptTemplate
from recipelib.runtime import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_HUB_ID = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:/\\<>|?*]+))?", re.ASCII)
_FILE = re.compile(r"(?P<split>.+)\.(jsonl|json|csv|tsv|parquet)", re.IGNORECASE)
# Shards on the hub are train-00000-of-00002.parquet; older ones have a hash at the end.
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?(-[0-9a-f]+)?\.parquet")

# What evaluation rows are called, where nobody names them: the first of these that is there.
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "eval")
_SCORED = (*EVALUATION_SPLITS, "test")
_SEE_ITS_PAGE = "see its page on the hub"


class NoSplit(UserError):
    """There is no such split.

    Attributes:
        splits: those that there are.
    """

    def __init__(self, message: str, splits: list[str]):
        super().__init__(message)
        self.splits = splits


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
class Files:
    """A file, or a folder with a file for each split.

    Attributes:
        path: its.
        encoding: of text files, as Python calls it; None for UTF-8.
        field: dotted keys that lead to the rows in a JSON object; None where a file is its rows.
    """

    path: Path
    encoding: str | None = None
    field: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys in `field`."""
        return tuple(self.field.split(".")) if self.field else ()

    @cached_property
    def object(self) -> Inside | None:
        """What the JSON object holds that the file is, or that stands at `field`; None for rows."""
        if self.path.suffix.lower() not in (".json", ".jsonl") or not self.path.is_file():
            return None
        return inside(self.path, shown_path(self.path), Reading(self.encoding, self.keys))

    @cached_property
    def lists(self) -> list[str]:
        """The lists in that object, which are its splits. An object on a single line may be a row
        that has lists: then one of them is called as splits are.
        """
        found = self.object
        names = [key for key in found.keys if key in found.lists] if found else []
        clear = self.field or (found and found.lines > 1) or {"train", *_SCORED} & {*names}
        return names if clear else []

    @property
    def one_split(self) -> bool:
        """Whether all its rows are one split."""
        return self.path.is_file() and not self.lists

    def of_split(self, split: str) -> tuple[list[Path], Reading]:
        """The files of a split, and how they are read.

        Raises:
            UserError: there is no such split, or the rows stand inside an object.
        """
        if not self.path.is_file():
            return files_of_split(self.path, split), Reading(self.encoding, self.keys)
        shown, found = shown_path(self.path), self.object
        if found and not found.whole:
            raise UserError(
                f"{shown}: has objects over several lines; write one a line, or commas between "
                "them and brackets around them all"
            )
        if found and split not in self.lists and (self.field or self.lists or found.lines > 1):
            what = f"the object at {self.field}" if self.field else "one object"
            raise NoSplit(
                f"{shown}: is {what}, not rows, and has no split {split!r}; {found}", self.lists
            )
        keys = (*self.keys, split) if found and split in self.lists else self.keys
        return [self.path], Reading(self.encoding, keys)


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
        where = "" if dataset else "--dataset "
        raise UserError(
            f"{shown}: no such file or folder; pass {where}one that exists, or a hub id such as "
            "owner/name"
        )
    return Hub(match["path"], match["config"] or config, revision)


def find(
    template: PromptTemplate | None,
    dataset: str | None,
    revision: str | None = None,
    option: str = "--dataset",
    *,
    encoding: str | None = None,
    field: str | None = None,
    predicts: bool = False,
) -> Files | Hub:
    """As `locate`, with how files are read: as the command line says, or for the template's own
    data, or a template that names none, as that does.

    Args:
        encoding, field: see `Files`.
        predicts: whether they may be meant for other rows, which are to be answered.
    Raises:
        UserError: as `locate`; an unknown encoding; a data set of the hub has neither.
    """
    place = locate(template, dataset, revision, option)
    given = {"encoding": encoding, "field": field}
    shown = {key: f"--{key} {value}" for key, value in given.items()}
    if template and (dataset is None or "path" not in template.dataset):
        for key in [key for key in given if given[key] is None]:
            given[key] = template.dataset.get(key)
            shown[key] = f"{template.path}: dataset.{key}: {given[key]}"
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(place, Hub):
        for key in () if predicts else given:
            raise UserError(f"{shown[key]}: says how files are read, not the hub; leave it out")
        return place
    if "encoding" in given:
        try:
            "a".encode(given["encoding"])
            name = codecs.lookup(given["encoding"]).name
        except (LookupError, ValueError):
            name = "no text"
        if name == "no text":
            raise UserError(
                f"{shown['encoding']}: no encoding that Python knows; write latin-1, cp1252, "
                "utf-16, gb18030, shift_jis or another one's name"
            )
        given["encoding"] = None if name in ("utf-8", "utf-8-sig") else given["encoding"]
    return Files(place, **given)


def split_names(place: Files | Hub, streaming: bool = False) -> list[str]:
    """The splits of a folder, or of a JSON file that is an object of lists; [] for another file. Of
    the hub "validation" alone if there is one.

    Args:
        streaming: fetch no more of a hub's data set than that takes.
    Raises:
        UserError: what else keeps a hub's data set from being read.
    """
    if isinstance(place, Hub):
        try:
            with hub_problems(place, "validation") as load:
                load(**({"streaming": True} if streaming else {}))
        except NoSplit as error:
            return error.splits
        return ["validation"]
    if place.path.is_file():
        return place.lists
    return sorted(
        {
            split
            for folder in (place.path, place.path / "data")
            for split in _splits_in(folder).values()
        }
    )


def _splits_in(folder: Path) -> dict[Path, str]:
    """The files of rows in a folder, and the splits that they belong to."""
    matches = {
        file: _SHARD.fullmatch(file.name) or _FILE.fullmatch(file.name)
        for file in sorted(folder.glob("*"))
    }
    return {file: match["split"] for file, match in matches.items() if match}


def files_of_split(folder: Path, split: str) -> list[Path]:
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
        message = f"{shown_path(folder)}: no file for the split {split!r}; {hint}"
        raise NoSplit(message, sorted(known))
    if len(exact) > 1 or (exact and shards):
        names = [file.name for file in exact] + [file.name for _, file in shards]
        raise UserError(
            f"{shown_path(place)}: {names[0]} and {names[1]} both are the split {split!r}; keep one"
        )
    counts = {int(match["count"]) for match, _ in shards if match["count"]}
    if counts and counts != {len(shards)}:
        raise UserError(
            f"{shown_path(place)}: {len(shards)} of {max(counts)} {split} files are there; "
            "copy all files of one version"
        )
    in_order = sorted(shards, key=lambda shard: int(shard[0]["number"]))
    return exact or [file for _, file in in_order]


def shown_path(path: Path) -> str:
    """A path as the user gave it; bundled data relative to the repository."""
    bundled = path.is_relative_to(TEMPLATE_FOLDER)
    return str(path.relative_to(TEMPLATE_FOLDER.parent) if bundled else path)


def load_hub(hub: Hub, split: str) -> Dataset:
    """All rows of a split of a data set of the hub.

    Raises:
        UserError: it cannot be loaded, or holds no rows.
    """
    with hub_problems(hub, split) as load:
        data = load()
        return _unless_empty(data, len(data), hub, split)


def stream_hub(hub: Hub, split: str, count: int) -> tuple[IterableDataset, list]:
    """The rows of a split as they come, images and the like as their bytes, and the first few."""
    with hub_problems(hub, split) as load:
        data = load(streaming=True)
        data = data.decode(False) if data.features else data
        first = list(islice(data, count))
        return data, _unless_empty(first, len(first), hub, split)


def _unless_empty(rows: Any, count: int, hub: Hub, split: str) -> Any:
    if not count:
        raise UserError(f"{hub}, split {split}: holds no rows; choose another split")
    return rows


@contextmanager
def hub_problems(hub: Hub, split: str) -> Iterator[Callable]:
    """`load_dataset` for this split; what it or reading the rows raises becomes one line."""
    import datasets

    try:
        yield partial(
            datasets.load_dataset, hub.path, hub.config, split=split, revision=hub.revision
        )
    except UserError:
        raise
    except Exception as error:  # a dozen types from five libraries; all mean that it cannot load
        text = str(error)
        listed = re.search(r"\[.*?\]", text)
        names = listed.group().strip("[]").replace("'", "") if listed else ""
        problem = f"{hub}, split {split}: {_hub_problem(error, hub, names or _SEE_ITS_PAGE)}"
        if "Unknown split" in text or "Bad split" in text:
            raise NoSplit(problem, names.split(", ")) from error
        raise UserError(problem) from error


def _hub_problem(error: Exception, hub: Hub, names: str) -> str:
    text = str(error)
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
