"""What the benchmarks share."""

import measuring
import pytest

from recipelib.runtime.errors import UserError


def test_arms_take_turns_and_each_run_is_held_against_the_first():
    held = []
    runs = measuring.in_turn(
        ("ours", "theirs"),
        2,
        run=lambda arm, number: f"{arm} {number}",
        said=str,
        check=lambda arm, run, first: held.append((run, first)),
    )
    assert runs == {"ours": ["ours 1", "ours 2"], "theirs": ["theirs 1", "theirs 2"]}
    assert [run for run, _ in held] == ["ours 1", "theirs 1", "ours 2", "theirs 2"]
    assert {first for _, first in held} == {"ours 1"}


def test_a_command_line_leaves_out_what_is_not_set():
    options = {"steps": 3, "dataset": None, "bf16": False, "columns": ("text=a", "label=b")}
    line = ["--steps", "3", "--bf16", "False", "--columns", "text=a", "label=b"]
    assert measuring.words(options) == line


def test_a_failure_is_one_line_with_the_last_words():
    error = measuring.failure("lora", 2, "a bar\nerror: no such model\n\n")
    assert str(error) == "lora: ended with exit code 2: error: no such model"


def test_several_runs_are_shown_with_their_deviation():
    assert measuring.spread([0.5]) == "0.500"
    assert measuring.spread([0.4, 0.6]) == "0.500 ± 0.141"


def test_data_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"sst2/train.jsonl: no such file; python benchmarks/prep"):
        measuring.data_files("sst2", tmp_path)


def test_kept_runs_with_other_settings_are_refused(tmp_path):
    file = tmp_path / "settings.json"
    measuring.keep_settings(file, {"rows": 7, "sha256": {"train.jsonl": "a"}})
    measuring.keep_settings(file, {"rows": 7, "sha256": {"train.jsonl": "a"}})
    with pytest.raises(UserError, match=r"settings.json: was run with other settings \(sha256\)"):
        measuring.keep_settings(file, {"rows": 7, "sha256": {"train.jsonl": "b"}})
