"""The sweep over architectures, on two of them."""

import json
import os
import time

import architectures
import pytest


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs the sweep in this process; gives what its last line holds, and the table."""

    def inline(run, steps, log):
        for step in steps:
            yield step, run(step), ""

    monkeypatch.setattr(architectures, "forked", inline)
    monkeypatch.setattr(architectures, "import_libraries", lambda: None)

    def start(*words: str) -> tuple[dict, str]:
        table = tmp_path / "table.md"
        architectures.main([*words, "--keep", str(tmp_path / "kept"), "--write", str(table)])
        return json.loads(capsys.readouterr().out.splitlines()[-1]), table.read_text()

    return start


def test_each_type_is_built_and_its_table_tells_what_works_and_what_is_refused(sweep, monkeypatch):
    words = ("--types", "qwen3", "bert", "--recipes", "lora_sft")
    counts, table = sweep(*words)
    assert (counts["types"], counts["works"], counts["refused"]) == (2, 1, 1)
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == [[" qwen3 ", " works "], [" bert ", " refused 1 "]]
    assert "1. 1 x `` --model_name_or_path MODEL: is a masked" in table
    # What was kept is not run again.
    monkeypatch.setattr(architectures, "run_step", None)
    assert sweep(*words) == (counts, table)


def test_a_recipe_that_raises_dies_or_hangs_is_a_result_and_the_next_one_is_run(tmp_path):
    def run(step: str) -> str:
        if step == "raises":
            raise ValueError("no\nsuch thing")
        if step == "dies":
            os._exit(3)
        time.sleep(60 if step == "hangs" else 0)
        return "works"

    steps = ["raises", "dies", "goes on", "hangs", "goes on"]
    found = [*architectures.forked(run, steps, tmp_path / "log.txt", seconds=0.5)]
    assert [(step, result) for step, result, _ in found] == [
        ("raises", "fails: ValueError: no"),
        ("dies", "fails: the process died with exit code 3"),
        ("goes on", "works"),
        ("hangs", "fails: no end within 0.5 s"),
        ("goes on", "works"),
    ]
    assert "in run" in found[0][2]
