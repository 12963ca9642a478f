"""The benchmark of preparing rows."""

import hashlib
import json
import os
import shutil

import prepare_rows
import pytest
from tokenizers_for_tests import tokenizer_for

from recipelib.models import load_tokenizer


@pytest.fixture
def tidy(monkeypatch):
    """What a run changes in its own process does not outlive the test."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("logging.disable", lambda level: None)
    # `Dataset.map` with processes puts a copy in its place, which libraries that hold it never see.
    monkeypatch.setattr(os, "environ", os.environ)


@pytest.fixture
def chat_model(tmp_path, model_folder):
    """A folder with the bundled tokenizer, whose chats have control tokens."""
    tokenizer_for("bundled").save_pretrained(tmp_path / "chat")
    shutil.copy(model_folder / "config.json", tmp_path / "chat")
    return tmp_path / "chat"


def test_all_sides_prepare_the_same_tokens(here, tidy, chat_model, capsys):
    words = ["--quick", "--rows", "3", "--processes", "1", "--data", "two_turns", "reviews"]
    result = prepare_rows.main([*words, "--model_name_or_path", str(chat_model)])
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) == result
    assert result["processes"] == 1
    assert list(result["data"]) == ["two_turns", "reviews"]
    for data, one in result["data"].items():
        assert one["rows"] == 3
        assert list(one["arms"]) == ["ours", *prepare_rows.PEERS[data]]
        for peer, ratio in one["ratio"].items():
            rates = [one["arms"][arm]["rows_per_second"] for arm in ("ours", peer)]
            assert ratio == pytest.approx(rates[0] / rates[1])
        for arm in one["arms"].values():
            assert arm["rows_per_second"] == pytest.approx(3 / sum(arm["seconds"]))
            assert len(arm["second_start"]) == 1
    assert f"{result['data']['two_turns']['ratio']['trl']:.2f} times trl" in shown


def test_a_side_that_makes_other_tokens_fails_the_benchmark(here, tidy, model_folder, monkeypatch):
    known = prepare_rows.count
    monkeypatch.setattr(prepare_rows, "count", lambda *args: (known(*args)[0] + 1, 0))
    words = ["--quick", "--rows", "3", "--processes", "1", "--data", "reviews"]
    with pytest.raises(prepare_rows.RunFailed, match=r"reviews, map: \d+ tokens, ours \d+"):
        prepare_rows.main([*words, "--model_name_or_path", str(model_folder)])


def test_the_rows_are_those_that_were_measured():
    for data, known in (
        ("two_turns", "f127f4a07865"),
        ("forty_turns", "fdcfaf94783d"),
        ("reviews", "9f6cdbed9bb7"),
    ):
        rows = prepare_rows.generate_rows(data, 20)
        assert rows == prepare_rows.generate_rows(data, 30)[:20]
        found = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
        assert found == known, (data, found)


def test_the_chat_template_marks_what_our_masks_supervise(chat_model):
    tokenizer = load_tokenizer(str(chat_model))
    tokenizer.chat_template = prepare_rows.CHAT_TEMPLATE
    turns = prepare_rows.generate_rows("two_turns", 1)[0]["messages"]
    encoded = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, inside in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if inside
    ]
    text = tokenizer.decode(marked)
    assert text.count("<|im_end|>") == 2
    assert turns[1]["content"] in text
    assert turns[0]["content"] not in text
