"""Text files are read row by row, and a bad row is named by its line."""

import hashlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import ROWS, SST2, arguments, ask, dump, load, numbered, refusal, write

from recipelib.data import text_rows
from recipelib.data.rows import load_rows, load_splits
from recipelib.data.text_rows import read_text_rows, scan
from recipelib.prompts import PromptTemplate, RowError
from recipelib.runtime import UserError

# Formats


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    # Nothing is quoted in TSV, so that its fields have no tabs and no lines.
    plain = [row for row in ROWS if not {*"\t\n"} & {*row["sentence"]}]
    rows = plain if suffix == "tsv" else ROWS
    path = write(tmp_path / f"rows.{suffix}", rows)
    loaded = load(path)
    assert loaded.rows == rows
    assert loaded.source == str(path)
    assert loaded.skipped == 0


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_any_text_survives_any_text_format(tmp_path_factory, suffix, texts):
    if suffix == "tsv":
        texts = [re.sub(r"[\t\r\n]", " ", text) for text in texts]
    rows = [{"sentence": text, "label": "0"} for text in texts]
    path = write(tmp_path_factory.mktemp("any") / f"rows.{suffix}", rows)
    assert load(path).rows == rows


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(dump(row) + "\n" for row in ROWS), encoding="utf-8")
    assert load(path).rows == ROWS


def test_an_array_on_one_line_and_blank_lines_between_rows_are_fine(tmp_path):
    array, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    array.write_text(" \n" + dump(ROWS) + "\n\n", encoding="utf-8")
    lines.write_text("\n" + "\n \t\n".join(map(dump, ROWS)), encoding="utf-8")
    assert load(array).rows == load(lines).rows == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, suffix):
    rows = numbered(3)
    path = write(tmp_path / f"rows.{suffix}", rows)
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert load(path).rows == rows


def test_csv_fields_stay_text_and_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"sentence,label,id\n{'x' * 300_000},1,007\n\n")
    (row,) = load(path).rows
    assert row["id"] == "007"
    assert len(row["sentence"]) == 300_000


# Bad rows, with their places


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"sentence": "a", "label": }', "no JSON at column 28: Expecting value"),
        ('{"sentence": "a", "label": "1"} x', "no JSON at column 33: more text after the object"),
        ('{"sentence": "a", "sentence": "b", "label": "1"}', "the key 'sentence' stands twice"),
        ('{"sentence": {"a": 1, "a": 2}, "label": "1"}', "the key 'a' stands twice"),
        ('[{"sentence": "a", "label": "1"}]', "list instead of an object"),
        ("12", "int instead of an object"),
        ('{"sentence": NaN, "label": "1"}', "NaN is no JSON"),
        ('{"sentence": [-Infinity], "label": "1"}', "-Infinity is no JSON"),
        ('{"sentence": "\\ud83d", "label": "1"}', "\\ud83d is half a character"),
        ('{"sentence": "a", "label": "5"}', "label: '5' is not in the verbalizer"),
        ('{"sentence": "a", "label": null}', "label is null"),
        ('{"sentence": "a"}', "no column 'label'; the row has 'sentence'"),
        ("[" * 100_000, "no JSON at column 1: maximum recursion"),
        ('{"sentence": 1' + "0" * 5000 + "}", "no JSON at column 1: Exceeds the limit"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number_in_one_line(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    good = dump(ROWS[4])
    path.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    text = refusal(path)
    assert text.startswith(f"rows.jsonl:3: {problem}")
    assert "\n" not in text
    assert load(path, skip_bad_rows=True).rows == [ROWS[4]] * 2


def test_a_pair_of_surrogates_is_one_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"sentence": "\\ud83c\\udfac", "label": "1"}')
    assert load(path).rows == [{"sentence": "🎬", "label": "1"}]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("a,1,2", "3 fields, the header has 2"),
        ("a", "1 fields, the header has 2"),
        ('"a" b,1', "text follows a closing quote"),
        ("a\rb,1", "a carriage return stands outside quotes"),
        ("a,5", "label: '5' is not in the verbalizer"),
        ("a,", "label is empty; give the answer"),
    ],
)
def test_a_bad_csv_row_is_named_by_its_first_line(tmp_path, record, problem):
    path = tmp_path / "rows.csv"
    path.write_bytes(f'sentence,label\n"two\nlines",1\n{record}\nb,0\n'.encode())
    text = refusal(path)
    assert text.startswith(f"rows.csv:4: {problem}")
    assert "\n" not in text
    kept = load(path, skip_bad_rows=True)
    assert [row["sentence"] for row in kept.rows] == ["two\nlines", "b"]
    assert kept.skipped == 1


def test_a_bad_csv_row_of_several_lines_says_where_it_ends(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('sentence,label\n"a\nb\nc",1,2\n')
    assert refusal(path).startswith(
        "rows.csv:2: 3 fields, the header has 2 (the row runs to line 4)"
    )


def test_an_open_quote_does_not_hide_the_rows_after_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('sentence,label\n"open,1\nb,0\nc,7\nd,1\n')
    lines = refusal(path).split("\n")
    assert lines[0].startswith("rows.csv:2: a quote is opened and never closed")
    assert lines[1].startswith("rows.csv:4: label: '7'")
    assert [row["sentence"] for row in load(path, skip_bad_rows=True).rows] == ["b", "d"]
    path.write_text('sentence,label\n"open,1\nb,0\n"c",1\n')
    assert refusal(path).startswith("rows.csv:2: text follows a closing quote on line 4")
    assert [row["sentence"] for row in load(path, skip_bad_rows=True).rows] == ["b", "c"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path, suffix):
    path = write(tmp_path / f"rows.{suffix}", numbered(4))
    path.write_bytes(path.read_bytes().replace(b"row 2", b"caf\xe9"))
    line = 3 if suffix == "jsonl" else 4
    assert re.match(rf"rows.{suffix}:{line}: not UTF-8 \(byte 0xe9 after .*caf", refusal(path))
    assert len(load(path, skip_bad_rows=True).rows) == 3


def test_bytes_that_are_not_utf8_spoil_a_whole_row_of_several_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'sentence,label\na,1\n"b\n\xff",1\nc,0\n')
    assert refusal(path).startswith("rows.csv:3: not UTF-8 (byte 0xff")
    array = write(tmp_path / "rows.json", numbered(2))
    array.write_bytes(array.read_bytes().replace(b"row 1", b"\xff"))
    assert refusal(array).startswith("rows.json:6: not UTF-8 (byte 0xff")


def test_a_utf16_file_is_one_error(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\na,1\n", encoding="utf-16")
    assert refusal(path) == (
        "rows.csv: the file is UTF-16; pass --encoding utf-16, or save it as UTF-8"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp1252", "naïve – €"), ("utf-16", "日本 Ċ 🎬"), ("shift_jis", "ソース 表"), ("utf_8", "ü")],
)
def test_files_of_another_encoding_are_read_as_that(tmp_path, suffix, encoding, text):
    rows = [{"sentence": f"{text} {number}", "label": "1"} for number in range(3)]
    path = write(tmp_path / f"rows.{suffix}", rows)
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert load(path, encoding=encoding).rows == rows


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        (
            "utf-16",
            r"rows.csv:1: is not utf-16 \(UTF-16 stream does not start with BOM\); pass",
        ),
        ("ascii", r"rows.csv:3: is not ascii \(ordinal not in range\(128\)\)"),
        ("utf-61", "--encoding utf-61: no encoding that Python knows"),
        ("hex", "--encoding hex: no encoding that Python knows"),
    ],
)
def test_a_wrong_encoding_is_one_line(tmp_path, encoding, told):
    path = tmp_path / "rows.csv"
    path.write_bytes("sentence,label\na,1\nü,0\n".encode("latin-1"))
    assert re.match(told, refusal(path, encoding=encoding))
    assert load(path, encoding="latin-1").rows[1]["sentence"] == "ü"


def test_in_tsv_quotes_are_text_as_in_pandas(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('sentence\tlabel\n"open\t1\r\n"whole"\t0\nsay ""\t1\n\n')
    pandas = pytest.importorskip("pandas").read_csv(path, sep="\t", quoting=3, dtype=str)
    assert load(path).rows == pandas.to_dict("records")
    path.write_text('sentence\tlabel\n"a\nb"\t1\n')
    assert "in TSV a tab always ends a field" in refusal(path)


def test_reading_an_array_goes_on_after_a_broken_element(tmp_path):
    path = write(tmp_path / "rows.json", [*numbered(3), {"sentence": "x", "label": "9"}])
    path.write_text(path.read_text().replace('"row 1",', '"row 1"'))
    lines = refusal(path).split("\n")
    assert lines[0].startswith("rows.json:6: no JSON at line 8, column 5: Expecting ',' delimiter")
    assert lines[1].startswith("rows.json:14: label: '9'")
    kept = load(path, skip_bad_rows=True)
    assert (kept.rows, kept.skipped) == ([numbered(3)[0], numbered(3)[2]], 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n{"a": 1}\n{"a": 1}]', "rows.json:3: no comma between two rows"),
        ('[{"a": 1},\n{"a": 1}', "rows.json:2: no comma between two rows, or no ]"),
        ('[{"a": 1},\n]', "rows.json:2: a comma after the last row"),
        ('[{"a": 1}]\n[]', "rows.json:2: more text after the array"),
        ('[{"a": 1}, {"a": }]', "rows.json:1: no JSON at column 18"),
        ("[", "rows.json:1: no JSON at column 2"),
    ],
)
def test_an_array_that_cannot_be_read_on_is_one_error_even_if_bad_rows_are_skipped(
    tmp_path, text, problem
):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert refusal(path, skip_bad_rows=True).startswith(problem)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_an_empty_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_text("")
    assert refusal(path).startswith(f"rows.{suffix}: holds no rows")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sentence,label\n", "rows.csv: holds no rows"),
        (",\na,1\n", "rows.csv:1: the header: is empty"),
        ("\nlabel,label\na,1\n", "rows.csv:2: the header: the column 'label' stands twice"),
        ('"sentence" x,label\na,1\n', "rows.csv:1: the header: text follows a closing quote"),
    ],
)
def test_a_csv_file_needs_a_header_and_a_row(tmp_path, text, problem):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert refusal(path).startswith(problem)


# Rows inside an object

HALVES = ask(prompt="{{ 1 }}", answer=" a")
SPLITS = {"info": {"rows": 5}, "train": numbered(3), "val": [["a", "1"], ["b", "0"]]}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_inside_an_object_are_those_at_its_field(tmp_path, indent, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_text(json.dumps({"n": 1, "data": SPLITS, "more": []}, indent=indent))
    assert load(path, field="data.train").rows == numbered(3)
    columns = {"text": "0", "label": "1"}
    template = PromptTemplate({**SST2.fields, "columns": columns})
    own = PromptTemplate({**template.fields, "dataset": {"path": path.name, "field": "data.val"}},
                         tmp_path / "t.yaml")  # fmt: skip
    rows = [{"0": "a", "1": "1"}, {"0": "b", "1": "0"}]
    assert load(path, template, field="data.val").rows == rows == load_rows(own, None, "x").rows
    # An object of lists has a split for each.
    args = arguments(path, field="data", eval_split="val")
    assert load_rows(SST2, str(path), "train", field="data").rows == numbered(3)
    with pytest.raises(UserError, match=r"split val: no column 'label'"):
        load_splits(SST2, args, 0)
    for field, told in (
        ("date.train", "--field date.train: no key 'date'; its keys: n, data, more"),
        ("data.test", "--field data.test: no key 'test' in data; its keys: info, train, val"),
        ("data.info", r"is the object at data.info, not rows, .* in it; its keys: rows"),
        ("n", "--field n: is no list of rows; it is 1"),
    ):
        assert re.search(told, refusal(path, field=field))


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_instead_of_rows_is_one_line_that_names_its_lists(tmp_path, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"v": 1, "items": {"all": numbered(3)}}, indent=indent))
    assert re.fullmatch(
        r"rows.json: is one object, not rows.*; its lists: items.all \(3\); name the one with the "
        "rows, as in --field items.all",
        refusal(path),
    )
    path.write_text(json.dumps(SPLITS, indent=indent))
    assert load(path).rows == numbered(3)
    assert [len(part.rows) for part in load_splits(HALVES, arguments(path), 0)] == [3, 2]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', "rows.json: has objects over several lines; write"),
        ('{\n "train": [\n  {"a": 1},\n  {"a": oops}\n ]\n}', "rows.json:4: no JSON at column 9"),
        ('{\n "train": [\n  {"a": 1}', "rows.json:3: no JSON at column 11: Expecting ','"),
        (
            '{\n "a": "x"\n}',
            "rows.json: is one object, not rows, and has no split 'train'; no list",
        ),
    ],
)
def test_broken_objects_over_several_lines_are_one_line(tmp_path, text, told):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert refusal(path).startswith(told)
    assert "\n" not in refusal(path)


def test_a_broken_first_line_hides_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"sentence": "a", "label":\n' + dump(ROWS[0]) + "\n")
    assert refusal(path).startswith("rows.jsonl:1: no JSON at column 1: ")
    assert load(path, skip_bad_rows=True).rows == [ROWS[0]]


# Parts of a file

HARD = {
    "broken.jsonl": (
        b'\n{"a": 1}\n  \n{"a": \n{"a": 2} x\n[1]\n{"a": "\xe9"}\n{"a": "\xc3\xa9"}\n{"b": 3}'
    ),
    "marked.jsonl": b'\xef\xbb\xbf{"a": 1}\n{"a": NaN}\n{"a": 1, "a": 2}\n{"a": "\\ud83d"}\n',
    "array.json": (
        b'\xef\xbb\xbf [\n {"a": "\xf0\x9f\x8e\xac, ]"},\n {"a": [1, {"b": 2}]}  , \n\n {"a": 5}\n]'
    ),
    "line.json": b'[{"a": "\xe6\x97\xa5"}, {"a": {"b": "}"}},{"c": 12}, 7, "x", {"a": -1.5e3}]',
    "broken.json": b'[\n  {"a": 1},\n  {"a": 2\n   "b": 3},\n  {"a": "\xff"},\n  {"a": 4}\n]\n',
    "cut.json": b'[{"a": 1},\n{"a": 2},\n{"a": ',
    "short.json": b'[{"a": 1} {"a": 2}]',
    "comma.json": b'[{"a": 1},\n\n]',
    "more.json": b'[{"a": 1}]\n\n  {}',
    "lines.json": b'\n {"a": 1}\n{"a": 2}\n',
    "quoted.csv": b'a,b\n"x\ny",1\n\n"open,2\nz,3\n"c" d,4\n\xff,5\nlast,"6\n"',
    "tabs.tsv": b'a\tb\n"x\ty"\t1\n2\n',
}


def read_whole(path, span=None) -> list:
    """The rows with their lines, errors as text."""
    entries = []
    try:
        for line, row in read_text_rows(path, path.name, span):
            entries.append((line, f"bad: {row}" if isinstance(row, RowError) else row))
    except UserError as error:
        entries.append(str(error))
    return entries


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("chunk", [16, 30])
def test_how_much_is_read_at_once_changes_nothing(tmp_path, monkeypatch, name, chunk):
    path = tmp_path / name
    path.write_bytes(HARD[name])
    whole = read_whole(path)
    assert whole
    monkeypatch.setattr(text_rows, "_CHUNK", chunk)
    assert read_whole(path) == whole


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("size", [1, 9, 20, 1000])
def test_spans_have_the_rows_of_the_whole_file(tmp_path, monkeypatch, name, size):
    path = tmp_path / name
    path.write_bytes(HARD[name])
    monkeypatch.setattr(text_rows, "_CHUNK", 7)
    hashed = hashlib.sha256()
    lines, spans = scan(path, name, size, hashed)
    assert hashed.digest() == hashlib.sha256(HARD[name]).digest()
    assert lines == len(HARD[name].splitlines())
    assert (spans[0].start, spans[-1].end) == (0, len(HARD[name]))
    assert [one.end for one in spans[:-1]] == [one.start for one in spans[1:]]
    if name.endswith(".jsonl"):
        assert len(spans) > 1 or size == 1000
    elif name != "lines.json":
        assert len(spans) == 1  # rows may run over several lines
    entries = [entry for span in spans for entry in read_whole(path, span)]
    assert entries == read_whole(path)
