"""What was written before an interruption is found again, and nothing else."""

import pytest

from recipelib.inference.journal import Journal
from recipelib.runtime.errors import UserError


def test_results_are_found_by_what_was_asked_under_the_same_identity(tmp_path):
    journal = Journal(tmp_path / "partial", {"model": "a"})
    assert not (tmp_path / "partial").exists()
    journal.add([([1, 2], [[3]]), ([1], [[4], [5]])], [[-1.25], [-0.1, float("-inf")]])
    journal.add([([9], [[3]])], [[-2.0]])
    asked = [([1], [[4], [5]]), ([7], [[3]]), ([1, 2], [[3]])]
    assert Journal(tmp_path / "partial", {"model": "a"}).load(asked) == {
        0: [-0.1, float("-inf")],
        2: [-1.25],
    }
    assert Journal(tmp_path / "partial", {"model": "b"}).load(asked) == {}
    # A result does not change what a run that goes on plans with.
    assert journal.load(asked) == {}


def test_more_than_the_identity_may_decide_a_result(tmp_path):
    journal = Journal(tmp_path, {})
    journal.within({"temperature": 0.7}).add([[1]], ["a"])
    again = Journal(tmp_path, {})
    assert again.load([[1]]) == {}
    assert again.within({"temperature": 0.0}).load([[1]]) == {}
    assert again.within({"temperature": 0.7}).load([[1]]) == {0: "a"}
    assert len(again) == 1


def test_half_a_line_of_an_interrupted_run_is_dropped_and_written_over(tmp_path):
    journal = Journal(tmp_path, {})
    journal.add([[1], [2]], ["one", "two"])
    file = tmp_path / "process-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    again = Journal(tmp_path, {})
    assert again.load([[1], [2]]) == {0: "one"}
    again.add([[3]], ["three"])
    assert Journal(tmp_path, {}).load([[1], [2], [3]]) == {0: "one", 2: "three"}
    file.write_bytes(whole[:10])
    assert len(Journal(tmp_path, {})) == 0


def test_a_file_that_no_run_wrote_is_named(tmp_path):
    (tmp_path / "process-0.jsonl").write_text('["a", 1]\nhello\n')
    with pytest.raises(UserError, match=r"process-0\.jsonl:2: not a line that a run has written"):
        Journal(tmp_path, {})


def test_a_discarded_journal_knows_nothing_and_leaves_nothing(tmp_path):
    journal = Journal(tmp_path / "partial", {})
    journal.add([[1]], ["a"])
    journal = Journal(tmp_path / "partial", {})
    journal.discard()
    assert journal.load([[1]]) == {}
    assert not (tmp_path / "partial").exists()
