"""Rows in JSON: one object a line, the elements of an array, or of an array inside an object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from recipelib.prompts import RowError
from recipelib.runtime import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_SHOWN = 12  # keys
# What a row is read from, with its first and last line.
Read = tuple[int, int, dict[str, Any] | RowError]


class _JsonReader:
    """Reads JSON objects out of a text and reports what `json` accepts in silence: duplicate keys,
    NaN and infinities, halves of surrogate pairs.
    """

    def __init__(self):
        self._problems: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, value in pairs:
            if key in members:
                self._problems.append(f"the key {key!r} stands twice; keep one of them")
            members[key] = value
        return members

    def _constant(self, name: str) -> None:
        self._problems.append(f"{name} is no JSON; write null or a number")

    def read(self, text: str, start: int) -> tuple[dict[str, Any] | RowError, int]:
        """The row that begins at `start`, and where it ends.

        Raises:
            json.JSONDecodeError: the text there is not JSON.
        """
        self._problems.clear()
        try:
            row, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except (RecursionError, ValueError) as error:  # nested too deeply, or over 4,300 digits
            raise json.JSONDecodeError(str(error), text, start) from None
        # A row without names for its columns; a list of objects is several rows.
        if isinstance(row, list) and not all(isinstance(value, dict) for value in row):
            row = {str(place): value for place, value in enumerate(row)}
        if not isinstance(row, dict):
            self._problems.append(
                f"{type(row).__name__} instead of an object; write {{column: value, ...}}"
            )
        elif "\\u" in text[start:end]:
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                self._problems.append(f"{half} is half a character; write both halves, or none")
        return (RowError(self._problems[0]) if self._problems else row), end


def line_rows(lines: Iterable[str], first: int) -> Iterator[tuple[int, int, dict | RowError]]:
    """The row of each line, or what is wrong with it, behind its first and its last line's number.

    Args:
        first: the number of the first line.
    """
    reader = _JsonReader()
    for number, line in enumerate(lines, start=first):
        start = _SPACE.match(line).end()
        if start == len(line):
            continue
        try:
            row, end = reader.read(line, start)
            end = _SPACE.match(line, end).end()
            if end < len(line):
                raise json.JSONDecodeError("more text after the object", line, end)
        except json.JSONDecodeError as error:
            row = RowError(f"no JSON at column {error.colno}: {error.msg}; write one object a line")
        yield number, number, row


class Window:
    """The part of a text that is looked at: more is added as it is needed, and what is done with
    goes.
    """

    def __init__(self, lines: Iterator[str], chunk: int):
        self._lines, self._chunk, self.text, self.at = lines, chunk, "", 0
        self._place, self._line = 0, 1  # a place in the text, and its line
        self._cut = 0  # characters of the first line that are gone

    def line_of(self, place: int) -> int:
        """The number of the line that a place is on; places do not go back."""
        self._line += self.text.count("\n", self._place, place)
        self._place = max(self._place, place)
        return self._line

    def column_of(self, place: int) -> int:
        """The column of a place, from 1."""
        before = self.text.rfind("\n", 0, place)
        return place - before + (self._cut if before < 0 else 0)

    def indent(self) -> str | None:
        """The white space in front of `at` on its line; None if there is something else."""
        before = self.text.rfind("\n", 0, self.at)
        text = self.text[before + 1 : self.at]
        return None if text.strip(" \t") or (before < 0 and self._cut) else text

    def extend(self) -> bool:
        """Drop what is before `at` and add as much again as is left, at least a chunk; False at the
        end.
        """
        added, size = [], 0
        for line in self._lines:
            added.append(line)
            size += len(line)
            if size >= max(self._chunk, len(self.text) - self.at):
                break
        if not added:
            return False
        start = self.text.rfind("\n", 0, self.at) + 1
        if self.at - start > self._chunk:  # a line that holds many rows
            self._cut = self.at - start if start else self._cut + self.at
            start = self.at
        elif start:
            self._cut = 0
        self.line_of(self.at)
        self.text = "".join([self.text[start:], *added])
        self.at -= start
        self._place -= start
        return True

    def skip_space(self) -> str:
        """Go to the next character that is no white space, and return it."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.extend():
                return self.text[self.at : self.at + 1]


def array_rows(
    lines: Iterator[str], shown: str, chunk: int, field: Sequence[str] = ()
) -> Iterator[Read]:
    """The elements of an array, each with its first and last line. After a broken element, reading
    goes on at the next line that begins with the same indent and bracket.

    Args:
        shown: how errors name the file.
        chunk: characters that are looked at at once.
        field: the keys that lead to the array, from outside in; the file is one if there are none.
    Raises:
        UserError: there is no such array, or the rest of it cannot be read.
    """
    reader, window = _JsonReader(), Window(lines, chunk)

    def broken(problem: str, place: int) -> UserError:
        return UserError(
            f"{shown}:{window.line_of(place)}: {problem}; mend the array, or write one object a "
            "line"
        )

    _enter(window, field, shown)
    if window.skip_space() != "[":
        known = _known_lists(window, field, shown)
        raise UserError(f"{shown}: --field {'.'.join(field)}: is no list of rows; {known}")
    window.at += 1
    while window.skip_space() != "]":
        try:
            row, end = reader.read(window.text, window.at)
            # A number or a word at the end of what was read may go on behind it.
            if end == len(window.text) and window.extend():
                continue
        except json.JSONDecodeError as error:
            if window.extend():
                continue
            at, column, indent = window.at, window.column_of(error.pos), window.indent()
            bracket = window.text[at : at + 1]
            if indent is None or bracket not in ("{", "["):
                raise broken(f"no JSON at column {column}: {error.msg}", error.pos) from None
            number = window.line_of(at)
            following = re.compile(rf"^{indent}{re.escape(bracket)}", re.MULTILINE).search(
                window.text, at + 1
            )
            window.at = following.end() - 1 if following else len(window.text)
            last = number + window.text.count("\n", at, error.pos)
            problem = f"no JSON at line {last}, column {column}: {error.msg}; mend it"
            yield number, number, RowError(problem)
            if following is None:
                return
            continue
        yield window.line_of(window.at), window.line_of(end), row
        window.at = end
        after = window.skip_space()
        if after == ",":
            window.at += 1
            if window.skip_space() == "]":
                raise broken("a comma after the last row", window.at)
        elif after != "]":
            raise broken("no comma between two rows, or no ] after the last", window.at)
    window.at += 1
    if not field and window.skip_space():
        raise broken("more text after the array", window.at)


# An object with rows inside


@dataclass(frozen=True)
class Inside:
    """What an object holds.

    Attributes:
        keys: its own.
        lists: dotted keys that lead to lists in it -> how many elements these have.
        whole: whether the file holds nothing else.
        lines: on how many lines it stands.
    """

    keys: Sequence[str]
    lists: Mapping[str, int]
    whole: bool
    lines: int

    def __str__(self) -> str:
        if not self.lists:
            return (
                f"no list of rows in it; its keys: {_listed(self.keys)}; put brackets around it if "
                "it is a row"
            )
        lists = [f"{name} ({count:,})" for name, count in self.lists.items()]
        most = max(self.lists, key=self.lists.get)
        return f"its lists: {_listed(lists)}; name the one with the rows, as in --field {most}"


def look_inside(
    lines: Callable[[], Iterator[str]], shown: str, chunk: int, field: Sequence[str] = ()
) -> Inside | None:
    """What the object at a field of a file holds; without a field the file itself. None if that is
    a list, or if the file has a value on each line.

    Args:
        lines: of the file, from its beginning.
        shown, chunk, field: as in `array_rows`.
    Raises:
        UserError: there is no such field, or what stands there cannot be read.
    """
    first, second = [*islice(filter(str.strip, lines()), 2), "", ""][:2]
    if not field and (not first.lstrip().startswith("{") or (second and stands_alone(first))):
        return None
    window = Window(lines(), chunk)
    try:
        _enter(window, field, shown)
        if window.skip_space() != "{":
            return None
        start = window.line_of(window.at)
        keys, lists = [], {}
        for key in _members(window, shown):
            keys.append(key)
            lists |= _lists_in(_value(window, shown), key)
        end = window.line_of(window.at)
        return Inside(keys, lists, bool(field) or not window.skip_space(), end - start + 1)
    except UserError:
        if not field and stands_alone(second):
            return None  # the first line of several is broken
        raise


def stands_alone(line: str) -> bool:
    """Whether a line is an object or a list by itself."""
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _lists_in(value: Any, name: str, depth: int = 3) -> dict[str, int]:
    if isinstance(value, list):
        return {name: len(value)}
    if not isinstance(value, dict) or not depth:
        return {}
    inner = (_lists_in(item, f"{name}.{key}", depth - 1) for key, item in value.items())
    return {key: count for lists in inner for key, count in lists.items()}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _known_lists(window: Window, field: Sequence[str], shown: str) -> str:
    """What the value at a field that is no list holds instead."""
    value = _value(window, shown)
    if not isinstance(value, dict):
        return f"it is {value!r:.40}"
    return str(Inside([*value], _lists_in(value, ".".join(field)), True, 1))


def _enter(window: Window, field: Sequence[str], shown: str) -> None:
    """Go to the value that keys lead to."""
    for depth, name in enumerate(field):
        where = ".".join(field[:depth])
        cure = "leave out --field, or dataset.field" if not depth else "mend --field"
        if window.skip_space() != "{":
            what = f"{where} holds" if where else "the file holds"
            raise UserError(f"{shown}: {what} no object with a key {name!r}; {cure}")
        known = []
        for key in _members(window, shown):
            if key == name:
                break
            known.append(key)
            _value(window, shown)
        else:
            inside = f" in {where}" if where else ""
            raise UserError(
                f"{shown}: --field {'.'.join(field)}: no key {name!r}{inside}; its keys: "
                f"{_listed(known)}"
            )


def _members(window: Window, shown: str) -> Iterator[str]:
    """The keys of the object that the window is at; whoever takes one reads its `_value`."""
    window.at += 1
    if window.skip_space() == "}":
        window.at += 1
        return
    while True:
        key = _value(window, shown) if window.skip_space() == '"' else None
        if key is None or window.skip_space() != ":":
            raise _no_json(window, shown, "no key and colon", window.at)
        window.at += 1
        yield key
        after = window.skip_space()
        if after not in (",", "}"):
            raise _no_json(
                window, shown, "no comma between two keys, or no } at the end", window.at
            )
        window.at += 1
        if after == "}":
            return
        window.skip_space()


def _value(window: Window, shown: str) -> Any:
    """The value that the window is at, which then is behind it."""
    window.skip_space()
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            if window.extend():
                continue
            place = getattr(error, "pos", window.at)
            raise _no_json(window, shown, getattr(error, "msg", error), place) from None
        if end == len(window.text) and window.extend():
            continue  # a number may go on behind what was read
        window.at = end
        return value


def _no_json(window: Window, shown: str, problem: object, place: int) -> UserError:
    where, column = window.line_of(place), window.column_of(place)
    return UserError(f"{shown}:{where}: no JSON at column {column}: {problem}; mend the file")
