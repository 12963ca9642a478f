"""Reads the rows of JSON lines, JSON, CSV and TSV files so that one bad line hides no other.

Only a line feed ends a line: U+2028, U+0085 and the like are text. A byte order mark is skipped.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from recipelib.prompts import RowError
from recipelib.runtime import UserError

# The line that a row starts on, and the row or what is wrong with it.
Entry = tuple[int, dict[str, Any] | RowError]

# The default limit of 131,072 characters is shorter than a long document.
csv.field_size_limit(2**31 - 1)

_CHUNK = 2**22  # bytes that are read at once
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_CURE = "put the field into quotes, and write a quote inside it twice"
_CSV_PROBLEMS = {
    "unexpected end of data": "a quote is opened and never closed",
    "expected after": "text follows a closing quote",
    "new-line character": "a carriage return stands outside quotes",
}


class Span(NamedTuple):
    """Lines of a file that can be read without the others: bytes [start, end), and the number of
    the first line, from 1.
    """

    start: int
    end: int
    line: int


def scan(path: Path, shown: str, size: int, hashed) -> tuple[int, list[Span]]:
    """How many lines a text file has, and its spans of about `size` bytes: a single one where rows
    may run over several lines.

    Args:
        shown: how errors name the file.
        hashed: is updated with the file's bytes.
    Raises:
        UserError: the file cannot be read.
    """
    with _opened(path, shown) as file:
        whole = path.suffix.lower() in (".csv", ".tsv") or _is_array(path, file)
        lines, at, spans, start, first, last = 0, 0, [], 0, 1, b"\n"
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)
            done = 0
            while not whole and (end := chunk.find(b"\n", max(done, start + size - at))) >= 0:
                lines += chunk.count(b"\n", done, end + 1)
                done = end + 1
                spans.append(Span(start, at + done, first))
                start, first = at + done, lines + 1
            lines += chunk.count(b"\n", done)
            at, last = at + len(chunk), chunk[-1:]
        if at > start:
            spans.append(Span(start, at, first))
    return lines + (last != b"\n"), spans


def hash_file(path: Path, hashed) -> None:
    """Update a hash with the bytes of a file."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)


def read_text_rows(path: Path, shown: str, span: Span | None = None) -> Iterator[Entry]:
    """The rows of a .jsonl, .json, .csv or .tsv file, each with the line that it starts on.

    CSV and TSV fields stay text: nothing guesses that 007 is a number. Quotes mean the same in
    both.

    Args:
        path: the file; its suffix says the format.
        shown: how errors name it.
        span: read these lines only.
    Yields:
        The line number, from 1, and the row as column -> value or what is wrong with it.
    Raises:
        UserError: the file cannot be read, is UTF-16, has no usable header, or is an array of which
            the rest cannot be read.
    """
    undecodable: dict[int, str] = {}
    suffix = path.suffix.lower()
    with _opened(path, shown) as file:
        array = suffix == ".json" and _is_array(path, file)
        span = span or Span(0, path.stat().st_size, 1)
        lines = _lines(file, shown, span, undecodable, _CHUNK if array else -1)
        if suffix in (".csv", ".tsv"):
            rows = _table_rows(lines, "\t" if suffix == ".tsv" else ",", undecodable, shown)
        elif array:
            rows = _array_rows(lines, shown)
        else:
            rows = _line_rows(lines, span.line)
        for first, last, row in rows:
            broken = undecodable and next(filter(undecodable.get, range(first, last + 1)), None)
            yield first, RowError(undecodable[broken]) if broken else row


@contextmanager
def _opened(path: Path, shown: str) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}; pass a file to read") from None


def _is_array(path: Path, file: BinaryIO) -> bool:
    """Whether a .json file's first character is a bracket; the file is at its beginning then."""
    text = b""
    while path.suffix.lower() == ".json" and not text and (chunk := file.read(2**16)):
        text = chunk.removeprefix(codecs.BOM_UTF8).strip()
    file.seek(0)
    return text.startswith(b"[")


def _lines(
    file: BinaryIO, shown: str, span: Span, undecodable: dict[int, str], longest: int
) -> Iterator[str]:
    """The lines of a span, their ends included. Those that are not UTF-8 are entered into
    `undecodable`: line number -> problem.

    Args:
        longest: a line of more bytes comes in parts; -1 for no limit.
    """
    file.seek(span.start)
    at, number = span.start, span.line
    while at < span.end:
        raw = file.readline(longest)
        while len(raw) >= longest > 0 and (byte := file.peek(1)[:1]) and byte[0] & 0xC0 == 0x80:
            raw += file.read(1)  # the rest of a character
        if not at:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{shown}: the file is UTF-16; save it as UTF-8")
            raw, at = raw.removeprefix(codecs.BOM_UTF8), len(raw)
        else:
            at += len(raw)
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode()[-20:]
            byte = f"0x{raw[error.start]:02x}"
            undecodable[number] = f"not UTF-8 (byte {byte} after {before!r}); save it as UTF-8"
            line = raw.decode(errors="replace")
        yield line
        number += line.endswith("\n")


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


def _line_rows(lines: Iterable[str], first: int) -> Iterator[tuple[int, int, dict | RowError]]:
    reader = _JsonReader()
    for number, line in enumerate(lines, start=first):
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


class _Window:
    """The part of a text that is looked at: more is added as it is needed, and what is done with
    goes.
    """

    def __init__(self, lines: Iterator[str]):
        self._lines, self.text, self.at = lines, "", 0
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
            if size >= max(_CHUNK, len(self.text) - self.at):
                break
        if not added:
            return False
        start = self.text.rfind("\n", 0, self.at) + 1
        if self.at - start > _CHUNK:  # a line that holds many rows
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
            self.at = _JSON_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.extend():
                return self.text[self.at : self.at + 1]


def _array_rows(lines: Iterator[str], shown: str) -> Iterator[tuple[int, int, dict | RowError]]:
    """The elements of an array, each with its first and last line. After a broken element, reading
    goes on at the next line that begins with the same indent and a brace.
    """
    reader, window = _JsonReader(), _Window(lines)

    def broken(problem: str, place: int) -> UserError:
        return UserError(
            f"{shown}:{window.line_of(place)}: {problem}; mend the array, or write one object a "
            "line"
        )

    window.skip_space()
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
            if indent is None or window.text[at] != "{":
                raise broken(f"no JSON at column {column}: {error.msg}", error.pos) from None
            number = window.line_of(at)
            following = re.compile(rf"^{indent}{{", re.MULTILINE).search(window.text, at + 1)
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
    if window.skip_space():
        raise broken("more text after the array", window.at)


def _records(
    lines: Iterator[str], delimiter: str
) -> Iterator[tuple[int, int, list[str] | RowError]]:
    """The records, each with its first and last line. After a broken record, reading goes on at the
    second line of that record: a quote left open must not swallow the rows that follow.
    """
    first = 0  # lines before the record
    while True:
        seen: list[str] = []  # the lines of the record, and those that were read in vain

        def keep(lines: Iterator[str] = lines, seen: list[str] = seen) -> Iterator[str]:
            for line in lines:
                seen.append(line)
                yield line

        reader = csv.reader(keep(), delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                if fields:
                    yield first + 1, first + len(seen), fields
                first += len(seen)
                seen.clear()
            return
        except csv.Error as error:
            problem = next((ours for key, ours in _CSV_PROBLEMS.items() if key in str(error)), None)
            last = first + len(seen)
            where = f" on line {last}" if last > first + 1 and "end of" not in str(error) else ""
            yield first + 1, first + 1, RowError(f"{problem or error}{where}; {_CURE}")
            lines = chain(seen[1:], lines)
            first += 1


def _table_rows(
    lines: Iterator[str], delimiter: str, undecodable: dict[int, str], shown: str
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
