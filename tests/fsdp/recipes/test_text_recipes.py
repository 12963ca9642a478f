"""cot_sft.py and instruction_sft.py over two processes under FSDP2 train and score what one process
does.
"""

import json

import pytest
from comparing import MODEL, assert_equal_losses, assert_equal_updates
from launching import assert_sharded_over_two, records
from run_files import read_json
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


def test_every_recipe_says_that_each_of_two_processes_holds_half(two):
    for name, said in two.said.items():
        assert "no GPU: a rehearsal, FSDP2 over 2 gloo processes" in said, name
        assert_sharded_over_two(said)


def test_chain_of_thought_is_tuned_and_scored_as_in_one_process(both, untrained):
    two, single = both("cot")
    assert_equal_losses(two, single, 6)
    assert_equal_updates(two, single, untrained("cot"))
    said = [[one["generated"] for one in records(folder)] for folder in (two, single)]
    assert said[0] == said[1]
    metrics = [read_json(folder / "metrics.json") for folder in (two, single)]
    for name in ("score", "base_score", "answer_only", "self_consistency", "train_tokens"):
        assert metrics[0][name] == metrics[1][name], name


def test_instructions_are_tuned_and_scored_as_in_one_process(both, root):
    two, single = both("instruction")
    assert_equal_losses(two, single, 6)
    assert_equal_updates(two, single, root / "model", MODEL)
    assert AutoModelForCausalLM.from_pretrained(two)
    metrics = [read_json(folder / "metrics.json") for folder in (two, single)]
    assert metrics[0]["mixture"] == metrics[1]["mixture"]
    for name, task in metrics[0]["tasks"].items():
        other = metrics[1]["tasks"][name]
        assert task.pop("classes", None) == other.pop("classes", None)
        assert task == pytest.approx(other, abs=1e-5)
    assert metrics[0]["padding_fraction"] == 0
    lines = [(folder / "samples.jsonl").read_text().splitlines() for folder in (two, single)]
    assert list(map(json.loads, lines[0])) == list(map(json.loads, lines[1]))
    assert len(lines[0]) == 3 * 2 * 2  # at steps 0, 3 and 6, two rows of two tasks


def test_one_process_prepares_what_both_train(both, two):
    folders = both("chats")
    assert "encoding (1 process waits)" in two.errors
    assert_equal_losses(*folders, 2)
    found = [read_json(folder / "metrics.json") for folder in folders]
    # A tenth is held out; both answers of a conversation are one example.
    assert [metrics["train_examples"] for metrics in found] == [720, 720]


def test_each_process_reads_its_share_of_a_stream(two, root):
    metrics = read_json(root / "two_stream" / "metrics.json")
    assert metrics["steps"] == 4
    assert metrics["bad_rows_skipped"] == 0
    trained = 4 * 8  # steps, rows of both processes
    # And what was read ahead: sixteen rows at a time by each.
    assert trained <= metrics["train_rows"] <= trained + 4 * 16
    assert "rows were read" in two.said["two_stream"]
