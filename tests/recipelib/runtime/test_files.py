"""Files are written whole or not at all, and YAML that means something else is refused."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_fields import one_line

from recipelib.runtime.errors import UserError
from recipelib.runtime.files import load_yaml, read_metrics, write_json, write_jsonl

fewer = settings(max_examples=50, deadline=None)


@fewer
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_comes_back_as_it_was_with_null_for_what_json_lacks(tmp_path_factory, data):
    def expected(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        return [expected(item) for item in value] if isinstance(value, list) else value

    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "one.json", data)
    assert json.loads((folder / "one.json").read_text("utf-8")) == expected(data)
    write_jsonl(folder / "many.jsonl", [data, data])
    lines = (folder / "many.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [expected(data)] * 2
    assert lines[-1] == b""


def test_json_is_readable_utf8_and_takes_numpy_numbers_and_lone_surrogates(tmp_path):
    path = tmp_path / "new folder" / "metrics.json"
    data = {"é": np.float32(0.5), "array": np.arange(2), "nan": np.float64("nan"), "path": path}
    write_json(path, data | {"half": "\ud83d"})
    assert '"é": 0.5' in path.read_text("utf-8")
    back = json.loads(path.read_text("utf-8"))
    assert back == {"é": 0.5, "array": [0, 1], "nan": None, "path": str(path), "half": "\ud83d"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{"row": 1}])

    def records():
        yield {"row": 2}
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        write_jsonl(path, records())
    with pytest.raises(TypeError):
        write_json(path, {"no JSON": object()})
    assert path.read_text() == '{"row": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "metrics.json", {})
    assert (tmp_path / "metrics.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("name: a\nname: b", "line 2", "the key 'name' stands twice; keep one"),
        (
            "verbalizer:\n  good: [a]\n  good: [b]",
            "line 3",
            "the key 'good' stands twice; keep one",
        ),
        ("verbalizer: {0: [bad]}", "line 1", 'the key 0 is read as 0, not as text; write "0"'),
        ("a: b\nno: [bad]", "line 2", 'the key no is read as False, not as text; write "no"'),
        ("verbalizer:\n  1.5: [bad]", "line 2", 'read as 1.5, not as text; write "1.5"'),
        ("~: [bad]", "line 1", "read as None, not as text"),
        ("2024-01-01: x", "line 1", 'not as text; write "2024-01-01"'),
        (
            "prompt: Review: {{ text }}",
            "line 1",
            "put text with a colon, braces or quotes into quotes",
        ),
        ("prompt: {{ text }}", "line 1", "not as text"),
        ("a: 'open", "line 1", "put text with a colon, braces or quotes into quotes"),
        ("a: \tb\n\tc: d", "line", "quotes"),
        ("a: &x [1]\nb: *x", "line 2", "*x is an alias; write the value out"),
        ("a: !!python/object/apply:os.getcwd []", "line 1", "could not determine a constructor"),
        ("- name: a", "", "holds no keys; a template starts with 'name:'"),
        ("", "", "holds no keys; a template starts with 'name:'"),
        ("name: 2020-99-99", "", "month must be in 1..12; put it into quotes"),
        ("a: " + "[" * 5000, "", "nested too deeply to be a template; flatten it"),
    ],
)
def test_yaml_that_means_something_else_is_refused(tmp_path, text, place, problem):
    file = tmp_path / "task.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_yaml(file)
    message = one_line(error)
    assert message.startswith(f"{file}: {place}")
    assert problem in message


@pytest.mark.parametrize(
    ("make_file", "problem"),
    [
        (lambda file: file.write_bytes(b"name: \xff"), "not UTF-8 at byte 6; save it as UTF-8"),
        (lambda file: file.mkdir(), "Is a directory; pass a file"),
        (lambda file: None, "No such file or directory; pass a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, make_file, problem):
    file = tmp_path / "task.yaml"
    make_file(file)
    with pytest.raises(UserError) as error:
        load_yaml(file)
    assert one_line(error).startswith(f"{file}: {problem}")


def test_what_a_run_has_written_is_read_and_no_run_is_empty(tmp_path):
    assert read_metrics(tmp_path) == {}
    write_json(tmp_path / "metrics.json", {"score": 0.5})
    assert read_metrics(str(tmp_path)) == {"score": 0.5}
    (tmp_path / "metrics.json").write_text("score: 0.5")
    with pytest.raises(UserError, match=r"metrics.json: is not what a run writes") as error:
        read_metrics(tmp_path)
    assert one_line(error).startswith(str(tmp_path))
