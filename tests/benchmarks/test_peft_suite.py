"""The benchmark that runs PEFT's tests, on a source of a few lines."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import peft_suite
import pytest
from measuring import RunFailed

from recipelib.adapters import bottleneck
from recipelib.runtime import UserError

XML = """<testsuites><testsuite>
<testcase classname="tests.a.TestA" name="test_one[BottleneckConfig]"/>
<testcase classname="tests.a.TestA" name="test_two[BottleneckConfig]"><skipped/></testcase>
<testcase classname="tests.a.TestA" name="test_three[BottleneckConfig]">
<failure message="%s"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder with the lines that cases are written behind."""
    tests = tmp_path / "peft" / "tests"
    tests.mkdir(parents=True)
    (tests.parent / "PKG-INFO").write_text(f"Name: peft\nVersion: {peft_suite.VERSION}\n\n")
    (tests / "testing_utils.py").write_text("import os\n")
    for name, lines in ({"testing_common.py": peft_suite.COMMON} | peft_suite.CASES).items():
        text = "import os\nfrom peft import (\n    LoraConfig,\n)\n"
        for line in lines:
            end = {"[": "]", "(": ")", "{": "}"}.get(line[-1], "    return")
            text += f"{line}\n{end}\n"
        (tests / name).write_text(text)
    return tests.parent


def started(monkeypatch, error: str) -> None:
    """pytest is not started; its result is there."""

    def run(command, **options):
        result = next(word for word in command if word.startswith("--junitxml="))
        Path(result.partition("=")[2]).write_text(XML % error)
        return SimpleNamespace(returncode=1, stdout="", stderr="")

    monkeypatch.setattr(peft_suite.subprocess, "run", run)
    monkeypatch.setattr(peft_suite, "save_models", lambda cache: None)


def test_failures_are_counted_and_named_with_their_reasons(source, monkeypatch, capsys):
    started(monkeypatch, f"NotImplementedError: {bottleneck.NO_MERGING}")
    peft_suite.main(["--quick", "--source", str(source)])
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert list(last["files"]) == list(peft_suite.QUICK)
    assert all(
        counts == {"passed": 1, "failed": 1, "skipped": 1} for counts in last["files"].values()
    )
    assert "2 failed: it merges" in out
    assert "test_config.py::TestA.test_three[BottleneckConfig]" in out
    started(monkeypatch, "AssertionError: 1 is not 2")
    with pytest.raises(RunFailed, match="2 failures without a reason"):
        peft_suite.main(["--quick", "--source", str(source)])
    out = capsys.readouterr().out
    assert "NO REASON" in out
    assert "test_three[BottleneckConfig]: AssertionError: 1 is not 2" in out


def test_our_cases_stand_in_their_lists(source, tmp_path):
    tests = peft_suite.write_tests(source, tmp_path)
    for name in peft_suite.CASES:
        text = (tests / name).read_text()
        ast.parse(text)
        assert "\nfrom peft_bottleneck import BottleneckConfig\nfrom peft import (" in text
        assert "(BottleneckConfig" in text or ", BottleneckConfig, {" in text
    ast.parse((tests / "testing_utils.py").read_text())
    assert "pytest.skip('merging')" in (tests / "testing_common.py").read_text()


def test_a_source_that_will_not_do(source, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        peft_suite.source_of(tmp_path / "nothing", tmp_path)
    odd = tmp_path / "odd.tar.gz"
    odd.write_text("no archive")
    with pytest.raises(UserError, match="is no source distribution"):
        peft_suite.source_of(odd, tmp_path)
    information = source / "PKG-INFO"
    information.write_text(information.read_text().replace("Version: ", "Version: 1"))
    with pytest.raises(UserError, match="of another version than the installed"):
        peft_suite.source_of(source, tmp_path)
    information.unlink()
    with pytest.raises(UserError, match="holds no PKG-INFO and tests"):
        peft_suite.source_of(source, tmp_path)
    (source / "tests" / "test_config.py").write_text("from peft import (\n)\nCONFIGS = (\n)\n")
    with pytest.raises(UserError, match=r"test_config.py of PEFT .*: has no line"):
        peft_suite.write_tests(source, tmp_path)
