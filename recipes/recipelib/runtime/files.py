"""Files that are written whole or not at all, and YAML that is read strictly."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from recipelib.runtime.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses what it would change in silence: duplicate keys, and
    keys that are not read as text, such as 0 or no. It refuses aliases too, with which a few lines
    can stand for gigabytes.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            where = f"line {event.start_mark.line + 1}"
            raise UserError(f"{where}: *{event.anchor} is an alias; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            where = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                text = key_node.value
                raise UserError(
                    f'{where}: the key {text} is read as {key!r}, not as text; write "{text}"'
                )
            if key in seen:
                raise UserError(f"{where}: the key {key!r} stands twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not UTF-8, not a mapping, duplicate or non-string keys, aliases, or
            text that is not YAML.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; pass a file that can be read"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(
            f"{path}: {where}{problem}; put text with a colon, braces or quotes into quotes"
        ) from None
    except ValueError as error:  # an impossible date, such as 2020-99-99
        raise UserError(f"{path}: {error}; put it into quotes") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a template; flatten it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no keys; a template starts with 'name:' and 'form:'")
    return data


def write_json(path: str | os.PathLike, data: object) -> None:
    """Write a file whole or not at all; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_jsonable(data), ensure_ascii=False, allow_nan=False, indent=2)
    with replacing(path) as temporary:
        temporary.write_bytes(_utf8(text))


def read_metrics(folder: Path | str) -> dict:
    """What a run's metrics.json holds; empty if there is no such file.

    Raises:
        UserError: the file is not JSON.
    """
    path = Path(folder) / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path}: is not what a run writes; name another --output_dir") from None


def kept_templates(folder: Path | str) -> dict[str, Path]:
    """The templates that a run has kept, by their names; none in a folder that is no run's."""
    several = {path.stem: path for path in sorted(Path(folder, "templates").glob("*.yaml"))}
    one = Path(folder, "template.yaml")
    return {one.stem: one} if one.exists() else several


def write_jsonl(path: str | os.PathLike, records: Iterable[object]) -> None:
    """Write one JSON value per line, as `write_json` does."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for record in records:
            file.write(_utf8(json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False)))


class Spool:
    """Values in a temporary file, which take no memory until they are written elsewhere."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  as long as its values are wanted

    def keep(self, value: object) -> Spooled:
        """Put a value that JSON can write into the file."""
        line = _utf8(json.dumps(value))
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        return Spooled(self, start, len(line))

    def read(self, start: int, size: int) -> Any:
        """The value in these bytes of the file."""
        self._file.seek(start)
        return json.loads(self._file.read(size))


class Spooled(NamedTuple):
    """A value in a `Spool`; what writes JSON writes the value."""

    spool: Spool
    start: int
    size: int

    @property
    def value(self) -> Any:
        """The value, read from the file."""
        return self.spool.read(self.start, self.size)

    def __str__(self) -> str:
        return str(self.value)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path`, to be written in the block. When the block ends, it replaces
    `path` in one step; after an error `path` stays as it was and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, Spooled):
        return value.value
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _utf8(line: str) -> bytes:
    # UTF-8 cannot hold a lone surrogate; Python's backslash escape of it is also JSON's.
    return (line + "\n").encode("utf-8", "backslashreplace")
