"""Reads the rows of JSON lines, JSON, CSV and TSV files so that one bad line hides no other.

Only a line feed ends a line: U+2028, U+0085 and the like are text. A byte order mark is skipped.
"""

import codecs
import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from recipelib.data.json_rows import Inside, array_rows, line_rows, look_inside, stands_alone
from recipelib.prompts import RowError
from recipelib.runtime import UserError

# The line that a row starts on, and the row or what is wrong with it.
Entry = tuple[int, dict[str, Any] | RowError]

# The default limit of 131,072 characters is shorter than a long document.
csv.field_size_limit(2**31 - 1)

_CHUNK = 2**22  # bytes that are read at once
_CURE = "put the field into quotes, and write a quote inside it twice"
_CSV_PROBLEMS = {
    "unexpected end of data": "a quote is opened and never closed",
    "expected after": "text follows a closing quote",
    "new-line character": "a carriage return stands outside quotes",
}
_TSV_CURE = "in TSV a tab always ends a field, and a line end the row; save it as CSV"


class Reading(NamedTuple):
    """How a text file is read.

    Attributes:
        encoding: as Python calls it; None for UTF-8.
        field: the keys that lead to the rows of a JSON file, from outside in.
    """

    encoding: str | None = None
    field: tuple[str, ...] = ()


_PLAIN = Reading()


class Span(NamedTuple):
    """Lines of a file that can be read without the others: bytes [start, end), and the number of
    the first line, from 1.
    """

    start: int
    end: int
    line: int


def scan(
    path: Path, shown: str, size: int, hashed, reading: Reading = _PLAIN
) -> tuple[int, list[Span]]:
    """How many lines a text file has, and its spans of about `size` bytes: a single one where rows
    may run over several lines, or the file is not UTF-8.

    Args:
        shown: how errors name the file.
        hashed: is updated with the file's bytes.
    Raises:
        UserError: the file cannot be read.
    """
    with _opened(path, shown, reading) as file:
        whole = path.suffix.lower() in (".csv", ".tsv") or _is_array(path, file)
        whole = whole or reading != _PLAIN
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


def read_text_rows(
    path: Path, shown: str, span: Span | None = None, reading: Reading = _PLAIN
) -> Iterator[Entry]:
    """The rows of a .jsonl, .json, .csv or .tsv file, each with the line that it starts on.

    CSV and TSV fields stay text: nothing guesses that 007 is a number. In TSV quotes are text, too,
    as pandas' QUOTE_NONE has it.

    Args:
        path: the file; its suffix says the format.
        shown: how errors name it.
        span: read these lines only.
    Yields:
        The line number, from 1, and the row as column -> value or what is wrong with it.
    Raises:
        UserError: the file cannot be read, has another encoding, no usable header, no such field,
            or is an array of which the rest cannot be read.
    """
    undecodable: dict[int, str] = {}
    suffix = path.suffix.lower()
    with _opened(path, shown, reading) as file:
        array = bool(reading.field) or _is_array(path, file)
        span = span or Span(0, _size(file), 1)
        lines = _lines(file, shown, span, undecodable, _CHUNK if array else -1)
        if suffix == ".csv":
            rows = _table_rows(_records(lines), undecodable, shown, _CURE)
        elif suffix == ".tsv":
            rows = _table_rows(_unquoted(lines), undecodable, shown, _TSV_CURE)
        elif array:
            rows = array_rows(lines, shown, _CHUNK, reading.field)
        else:
            rows = line_rows(lines, span.line)
        for first, last, row in rows:
            broken = undecodable and next(filter(undecodable.get, range(first, last + 1)), None)
            yield first, RowError(undecodable[broken]) if broken else row


def inside(path: Path, shown: str, reading: Reading) -> Inside | None:
    """What the object holds that a .json or .jsonl file is, or that stands at a field of it; None
    for rows: one a line, or a list.

    Raises:
        UserError: the file cannot be read, or there is no such field.
    """
    with _opened(path, shown, reading) as file:
        span = Span(0, _size(file), 1)
        return look_inside(lambda: _lines(file, shown, span, {}, -1), shown, _CHUNK, reading.field)


@contextmanager
def _opened(path: Path, shown: str, reading: Reading) -> Iterator[BinaryIO]:
    """The file as UTF-8."""
    try:
        with path.open("rb") as file:
            if reading.encoding is None:
                yield file
                return
            with tempfile.TemporaryFile() as copy:
                _recode(file, copy, shown, reading.encoding)
                copy.seek(0)
                yield copy
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}; pass a file to read") from None


def _recode(file: BinaryIO, copy: BinaryIO, shown: str, encoding: str) -> None:
    decoder, lines = codecs.getincrementaldecoder(encoding)(), 1
    try:
        while chunk := file.read(_CHUNK):
            text = decoder.decode(chunk)
            lines += text.count("\n")
            copy.write(text.encode())
        copy.write(decoder.decode(b"", True).encode())
    except UnicodeError as error:  # also of a text that UTF-8 cannot hold
        good = getattr(error, "object", "")[: getattr(error, "start", 0)]
        if isinstance(good, bytes):
            good = good.decode(encoding, "replace")
        raise UserError(
            f"{shown}:{lines + good.count(chr(10))}: is not {encoding} "
            f"({getattr(error, 'reason', error)}); pass its --encoding, or save it as UTF-8"
        ) from None


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _is_array(path: Path, file: BinaryIO) -> bool:
    """Whether a .json file's first character is a bracket, or that of a .jsonl file whose first
    line is not JSON by itself; the file is at its beginning then.
    """
    suffix, text = path.suffix.lower(), b""
    while suffix in (".json", ".jsonl") and not text and (chunk := file.read(2**16)):
        text = chunk.removeprefix(codecs.BOM_UTF8).strip()
    array = text.startswith(b"[")
    if array and suffix == ".jsonl":
        file.seek(0)
        first = next(filter(bytes.strip, file), b"").removeprefix(codecs.BOM_UTF8)
        array = not stands_alone(first.decode(errors="replace"))
    file.seek(0)
    return array


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
                raise UserError(
                    f"{shown}: the file is UTF-16; pass --encoding utf-16, or save it as UTF-8"
                )
            raw, at = raw.removeprefix(codecs.BOM_UTF8), len(raw)
        else:
            at += len(raw)
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode()[-20:]
            byte = f"0x{raw[error.start]:02x}"
            undecodable[number] = (
                f"not UTF-8 (byte {byte} after {before!r}); save it as UTF-8, or pass its "
                "--encoding, such as cp1252"
            )
            line = raw.decode(errors="replace")
        yield line
        number += line.endswith("\n")


# A record of a table with its first and last line, or what is wrong with it.
_Record = tuple[int, int, list[str] | RowError]


def _unquoted(lines: Iterator[str]) -> Iterator[_Record]:
    """The records of TSV, one a line, in which quotes are text."""
    for number, line in enumerate(lines, start=1):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, number, text.split("\t")


def _records(lines: Iterator[str]) -> Iterator[_Record]:
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

        reader = csv.reader(keep(), strict=True)
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
    records: Iterator[_Record], undecodable: dict[int, str], shown: str, cure: str
) -> Iterator[tuple[int, int, dict | RowError]]:
    header = None
    for first, last, fields in records:
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
                RowError(f"{len(fields)} fields, the header has {len(header)}{span}; {cure}"),
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
