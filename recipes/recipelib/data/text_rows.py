"""Reads the rows of JSON lines, JSON, CSV and TSV files so that one bad line hides no other.

Only a line feed ends a line: U+2028, U+0085 and the like are text. A byte order mark is skipped.
"""

import bisect
import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipelib.prompts import RowError
from recipelib.runtime import UserError

# The line that a row starts on, and the row or what is wrong with it.
Entry = tuple[int, dict[str, Any] | RowError]

# The default limit of 131,072 characters is shorter than a long document.
csv.field_size_limit(2**31 - 1)

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_CURE = "put the field into quotes, and write a quote inside it twice"
_CSV_PROBLEMS = {
    "unexpected end of data": "a quote is opened and never closed",
    "expected after": "text follows a closing quote",
    "new-line character": "a carriage return stands outside quotes",
}


def read_text_rows(path: Path, shown: str) -> Iterator[Entry]:
    """The rows of a .jsonl, .json, .csv or .tsv file, each with the line that it starts on.

    CSV and TSV fields stay text: nothing guesses that 007 is a number. Quotes mean the same in
    both.

    Args:
        path: the file; its suffix says the format.
        shown: how errors name it.
    Yields:
        The line number, from 1, and the row as column -> value or what is wrong with it.
    Raises:
        UserError: the file cannot be read, is UTF-16, has no usable header, or is an array of which
            the rest cannot be read.
    """
    try:
        lines, undecodable = _decode(path.read_bytes(), shown)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}; pass a file to read") from None
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        spans = _table_rows(lines, "\t" if suffix == ".tsv" else ",", undecodable, shown)
    elif suffix == ".json" and _first_text(lines).startswith("["):
        spans = _array_rows("".join(lines), shown)
    else:
        spans = _line_rows(lines)
    for first, last, row in spans:
        broken = next((n for n in range(first, last + 1) if n in undecodable), None)
        yield first, row if broken is None else RowError(undecodable[broken])


def _decode(data: bytes, shown: str) -> tuple[list[str], dict[int, str]]:
    """The lines, their ends included, and line number -> problem for those that are not UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{shown}: the file is UTF-16; save it as UTF-8")
    lines, undecodable = [], {}
    raws = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, raw in enumerate(raws, start=1):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode()[-20:]
            byte = f"0x{raw[error.start]:02x}"
            undecodable[number] = f"not UTF-8 (byte {byte} after {before!r}); save it as UTF-8"
            line = raw.decode(errors="replace")
        lines.append(line + "\n" if number < len(raws) else line)
    if not raws[-1]:
        lines.pop()
    return lines, undecodable


def _first_text(lines: list[str]) -> str:
    return next((line.strip() for line in lines if line.strip()), "")


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


def _line_rows(lines: list[str]) -> Iterator[tuple[int, int, dict | RowError]]:
    reader = _JsonReader()
    for number, line in enumerate(lines, start=1):
        start = _JSON_SPACE.match(line).end()
        if start == len(line):
            continue
        try:
            row, end = reader.read(line, start)
            end = _JSON_SPACE.match(line, end).end()
            if end < len(line):
                raise json.JSONDecodeError("more text after the object", line, end)
        except json.JSONDecodeError as error:
            row = RowError(f"no JSON at column {error.colno}: {error.msg}; write one object a line")
        yield number, number, row


def _array_rows(text: str, shown: str) -> Iterator[tuple[int, int, dict | RowError]]:
    """The elements of an array, each with its first and last line. After a broken element, reading
    goes on at the next line that begins with the same indent and a brace.
    """
    reader = _JsonReader()
    line_ends = [match.start() for match in re.finditer("\n", text)]

    def line_of(place: int) -> int:
        return bisect.bisect_left(line_ends, place) + 1

    def skip_space(place: int) -> int:
        return _JSON_SPACE.match(text, place).end()

    def broken(problem: str, place: int) -> UserError:
        return UserError(
            f"{shown}:{line_of(place)}: {problem}; mend the array, or write one object a line"
        )

    at = skip_space(skip_space(0) + 1)
    while text[at : at + 1] != "]":
        try:
            row, end = reader.read(text, at)
        except json.JSONDecodeError as error:
            indent = text[text.rfind("\n", 0, at) + 1 : at]
            if indent.strip(" \t") or text[at : at + 1] != "{":
                raise broken(f"no JSON at column {error.colno}: {error.msg}", error.pos) from None
            place = f"line {error.lineno}, column {error.colno}"
            yield line_of(at), line_of(at), RowError(f"no JSON at {place}: {error.msg}; mend it")
            following = re.compile(rf"^{indent}{{", re.MULTILINE).search(text, at + 1)
            if following is None:
                return
            at = following.end() - 1
            continue
        yield line_of(at), line_of(end), row
        at = skip_space(end)
        if text[at : at + 1] == ",":
            at = skip_space(at + 1)
            if text[at : at + 1] == "]":
                raise broken("a comma after the last row", at)
        elif text[at : at + 1] != "]":
            raise broken("no comma between two rows, or no ] after the last", at)
    if skip_space(at + 1) < len(text):
        raise broken("more text after the array", skip_space(at + 1))


def _records(lines: list[str], delimiter: str) -> Iterator[tuple[int, int, list[str] | RowError]]:
    """The records, each with its first and last line. After a broken record, reading goes on at the
    second line of that record: a quote left open must not swallow the rows that follow.
    """
    start = 0
    while start < len(lines):
        rest = (lines[place] for place in range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        first = start
        try:
            for fields in reader:
                if fields:
                    yield first + 1, start + reader.line_num, fields
                first = start + reader.line_num
            return
        except csv.Error as error:
            problem = next((ours for key, ours in _CSV_PROBLEMS.items() if key in str(error)), None)
            last = start + reader.line_num
            where = f" on line {last}" if last > first + 1 and "end of" not in str(error) else ""
            yield first + 1, first + 1, RowError(f"{problem or error}{where}; {_CURE}")
            start = first + 1


def _table_rows(
    lines: list[str], delimiter: str, undecodable: dict[int, str], shown: str
) -> Iterator[tuple[int, int, dict | RowError]]:
    header = None
    for first, last, fields in _records(lines, delimiter):
        if header is None:
            header = fields
            problem = _header_problem(fields) or undecodable.get(first)
            if problem:
                raise UserError(f"{shown}:{first}: the header: {problem}")
        elif isinstance(fields, RowError):
            yield first, last, fields
        elif len(fields) != len(header):
            span = f" (the row runs to line {last})" if last > first else ""
            yield (
                first,
                last,
                RowError(f"{len(fields)} fields, the header has {len(header)}{span}; {_CURE}"),
            )
        else:
            yield first, last, dict(zip(header, fields, strict=True))


def _header_problem(names: list[str] | RowError) -> str | None:
    if isinstance(names, RowError):
        return str(names)
    if not any(name.strip() for name in names):
        return "is empty; name the columns in the first line"
    twice = next((name for name in names if names.count(name) > 1), None)
    return None if twice is None else f"the column {twice!r} stands twice; give each its own name"
