"""The classes of a template that leaves its verbalizer out: the values of the label's column, each
of which is its own word.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.data.checking import refuse_missing_columns
from recipelib.data.places import Files, Hub, NoSplit, split_names
from recipelib.data.rows import splits_of
from recipelib.data.sources import Source, class_names, open_source, open_stream
from recipelib.prompts import PromptTemplate, RowError, class_name, is_empty, same_word
from recipelib.runtime import Store, UserError, code_digest, digest, say, write_json

if TYPE_CHECKING:
    from datasets import Dataset

_MOST = 1000
_SHOWN = 8


def with_classes(template: PromptTemplate, args: Any, store: Store | None = None) -> PromptTemplate:
    """The template with a verbalizer. If it has a label and none, each class is its own word: the
    names of the label's classes in a data set of the hub or a Parquet file; or the values that its
    column has in training and evaluation rows, sorted as text.

    Args:
        args: as in `load_splits`.
        store: where what was found is kept.
    Raises:
        UserError: rows that cannot be read; values that are no classes, or two that make the same
            word.
    """
    if not template.lacks_words:
        return template
    place, *splits = splits_of(template, args)
    column, store = template.column(template.label), store or Store()
    if getattr(args, "streaming", False):
        name, data, *_ = open_stream(place, splits[0], template, 1)
        names = class_names(data.features or {}, template)
        if names is None:
            raise UserError(
                f"{template.path}: verbalizer: is missing, and {name} does not name its classes, "
                "which a stream is not read for beforehand; write it"
            )
        return _named(template, names, column, name)
    found: Counter[str] = Counter()
    if isinstance(place, Files) and place.one_split:
        splits = splits[:1]
    elif isinstance(place, Files):  # to be asked only, rows need no training rows beside them
        splits = [split for split in dict.fromkeys(splits) if split in split_names(place)] or splits
    for split in dict.fromkeys(splits):
        try:
            source = open_source(place, split, template, answers=True)
        except NoSplit:
            if split == splits[-1] or not isinstance(place, Hub):
                raise
            continue
        if source.classes is not None:
            return _named(template, source.classes, column, source.name)
        found.update(_values(template, source, column, store))
    return _named(template, _checked(template, found, column, source.name), column, source.name)


def with_classes_of(template: PromptTemplate, data: Dataset, name: str) -> PromptTemplate:
    """As `with_classes`, from the rows of one data set."""
    if not template.lacks_words:
        return template
    column = template.column(template.label)
    refuse_missing_columns(template, name, data.column_names, answers=True)
    names = class_names(data.features, template)
    if names is None:
        found = _counted(template, data.with_format("arrow")[:].column(column).to_pylist(), name)
        names = _checked(template, found, column, name)
    return _named(template, names, column, name)


def _values(
    template: PromptTemplate, source: Source, column: str, store: Store
) -> Mapping[str, int]:
    """The values in a column of a source, as a verbalizer writes them, and how many rows have each;
    they are kept.
    """
    if source.columns:
        refuse_missing_columns(template, source.name, source.columns, answers=True)

    def make(folder: Path) -> None:
        met: dict[str, None] = {}

        def values() -> Iterator[Any]:
            if not source.pieces:  # the hub's
                data = source.table([]).select_columns([column]).with_format("arrow")
                yield from data[:].column(0).to_pylist()
            for number, piece in enumerate(source.pieces):
                for _, _, row in source.entries(piece, folder / f"rows-{number}.arrow"):
                    if not isinstance(row, RowError):
                        met.update(dict.fromkeys(row))
                        yield row.get(column)
                (folder / f"rows-{number}.arrow").unlink()

        found = _counted(template, values(), source.name)
        if met and column not in met:
            refuse_missing_columns(template, source.name, [*met], answers=True)
        write_json(folder / "classes.json", found)

    key = digest(source.identity, column, code_digest("prompts", "data"))
    folder = store.get("classes", key, make)
    return json.loads((folder / "classes.json").read_text("utf-8"))


def _counted(template: PromptTemplate, values: Iterable[Any], name: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for value in values:
        if isinstance(value, list | dict):
            raise UserError(
                f"{name}: {template.column(template.label)}: holds {type(value).__name__}s, which "
                f"are no classes; name another column as the label of {template.path.name}"
            )
        if isinstance(value, float) and not value.is_integer():
            raise UserError(
                f"{name}: {template.column(template.label)}: holds numbers such as {value}, which "
                f"are no classes; name another column, or write the verbalizer into "
                f"{template.path.name}"
            )
        if not is_empty(value):
            found[class_name(value)] += 1
    return found


def _checked(
    template: PromptTemplate, found: Mapping[str, int], column: str, name: str
) -> list[str]:
    """The values, sorted.

    Raises:
        UserError: they are no classes.
    """
    rows, cure = sum(found.values()), "name a column of classes, or write the verbalizer"
    if len(found) > _MOST or 2 < rows == len(found):
        raise UserError(
            f"{template.path}: label: {column} has {len(found):,} values in {rows:,} rows of "
            f"{name}; {cure}"
        )
    if len(found) < 2:
        value = f"the same value, {next(iter(found))!r}," if found else "no value"
        problem = f"{column} has {value} in all rows of {name}"
        raise UserError(f"{template.path}: label: {problem}; {cure}")
    return sorted(found)


def _named(
    template: PromptTemplate, names: Iterable[str], column: str, name: str
) -> PromptTemplate:
    names = list(map(class_name, names))
    if pair := same_word(names):
        raise UserError(
            f"{template.path}: label: the values {pair[0]!r} and {pair[1]!r} of {column} in {name} "
            "make the same word; mend the rows, or write the verbalizer"
        )
    shown = ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    say(
        f"{template.path}: has no verbalizer, so the {len(names):,} values of {column!r} are their "
        f"own words: {shown}"
    )
    return template.with_words({name: [name] for name in names})
