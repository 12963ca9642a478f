"""Rows are shown as the model will see them, before anything is loaded."""

import io
import re
from functools import partial
from types import SimpleNamespace

import pytest
from template_cases import CASES
from tokenizers_for_tests import NAMES, tokenizer_for

from recipelib.encoding.asking import CausalAsker, MaskedAsker
from recipelib.encoding.examples import EncodedRows
from recipelib.encoding.prompt_encoder import IGNORED, PromptEncoder
from recipelib.encoding.tokens import TextEncoder
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting.previews import preview, preview_prompts, say_first_prompt


def shown_before(number, row):
    return [(f"Shown before {number},", " negative")]


def asker_of(name, max_length=200, tokenizer="gpt2"):
    encoder = PromptEncoder(PromptTemplate.load(name), tokenizer_for(tokenizer), max_length)
    return MaskedAsker(encoder) if tokenizer == "bert" else CausalAsker(encoder)


@pytest.mark.parametrize("name", ["movie_reviews", "next_sentence", "squad", "gsm8k", "wnut17"])
def test_a_preview_shows_every_prompt_of_a_row_with_its_demonstrations(name, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    asker, rows = asker_of(name, 400), CASES[name].rows[:2]
    preview_prompts(asker, rows, shown_before)
    out = capsys.readouterr().out
    for number, row in enumerate(rows):
        questions = asker.encoder.template.questions(row)
        assert out.count(f"row {number + 1}: ") == len(questions)
        assert out.count(f"Shown before {number}, negative") == len(questions)
        for question in questions:
            assert asker.encoder.template.prompt(question) in out
    assert "tokens, 1 demonstration" in out
    assert ("candidates: " in out) == bool(asker.encoder.template.label)


def test_a_preview_shows_the_cloze_of_a_masked_model(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    preview_prompts(asker_of("movie_reviews", tokenizer="bert"), CASES["movie_reviews"].rows, None)
    out = capsys.readouterr().out
    assert out.count("[MASK]") >= 3
    assert "tokens, 0 demonstrations" in out


def test_a_conversation_is_shown_as_it_is_scored(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    asker, row = asker_of("conversations", 400), CASES["conversations"].rows[0]
    preview_prompts(asker, [row], None)
    say_first_prompt(asker, row, None)
    out = capsys.readouterr().out
    for message in row["messages"]:
        assert out.count(message["content"].strip()) >= 2
    assert "tokens, 0 demonstrations" in out


def test_a_preview_says_where_a_row_does_not_fit(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    preview_prompts(asker_of("movie_reviews", 5), CASES["movie_reviews"].rows[:2], None)
    out = capsys.readouterr().out
    assert "row 1: does not fit into 5 tokens" in out
    assert "row 2: does not fit into 5 tokens" in out


def test_markup_and_control_characters_in_a_prompt_are_only_text(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    rows = [{"sentence": "[bold]film[/] \x1b[31mred", "label": "positive"}]
    preview_prompts(asker_of("movie_reviews"), rows, None)
    say_first_prompt(asker_of("movie_reviews"), rows[0], None)
    assert capsys.readouterr().out.count(r"[bold]film[/] \x1b[31mred") == 2


def test_the_first_prompt_is_shown_whole_and_of_a_long_one_the_ends(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    row = CASES["movie_reviews"].rows[0]
    say_first_prompt(asker_of("movie_reviews"), row, shown_before)
    out = capsys.readouterr().out
    assert "Shown before 0, negative" in out
    assert out.rstrip().endswith(CASES["movie_reviews"].prompt)

    def many(number, asked):
        return [(f"Demonstration {n} of many:", " negative") for n in range(200)]

    say_first_prompt(asker_of("movie_reviews", 10_000), row, many)
    out = capsys.readouterr().out
    assert "Demonstration 0 of many" in out
    assert "Demonstration 100 of many" not in out
    assert out.rstrip().endswith(CASES["movie_reviews"].prompt)
    assert " characters ...]" in out
    assert len(out) < 3_200


def test_a_first_row_that_does_not_fit_shows_nothing(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    say_first_prompt(asker_of("movie_reviews", 5), CASES["movie_reviews"].rows[0], None)
    assert capsys.readouterr().out == ""


def test_other_processes_show_no_prompts(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    row = CASES["movie_reviews"].rows[0]
    preview_prompts(asker_of("movie_reviews"), [row], None)
    say_first_prompt(asker_of("movie_reviews"), row, None)
    assert capsys.readouterr().out == ""


# A task before training


def encoded_rows(*parts: list[tuple[list[int], bool]]) -> EncodedRows:
    """An example for each list of (ids, supervised) runs."""
    examples = []
    for runs in parts:
        ids = [one for run, _ in runs for one in run]
        labels = [one if supervised else IGNORED for run, supervised in runs for one in run]
        examples.append((ids, labels))
    return EncodedRows.of(examples)


def task_of(encoded: EncodedRows, tokenizer) -> SimpleNamespace:
    return SimpleNamespace(encoded=encoded, tokenizer=tokenizer, templates=[])


def body(out: str) -> str:
    """What stands below the ruled headings."""
    return "\n".join(line for line in out.splitlines() if "──" not in line)


@pytest.mark.parametrize("name", NAMES)
def test_a_preview_shows_the_text_and_marks_exactly_the_supervised_tokens(name, capsys):
    tokenizer = tokenizer_for(name)
    encode = TextEncoder(tokenizer).encode
    question, answer = list(encode("the story\n  is:")), list(encode(" very good"))
    preview(task_of(encoded_rows([(question, False), (answer, True)]), tokenizer), 1)
    out = capsys.readouterr().out
    assert f"{len(question + answer)} tokens, {len(answer)} supervised" in out
    # The space in front is shown, though by itself the answer decodes to "very good" in T5.
    assert re.search(r"is ?:⟦ +very good⟧$", body(out).rstrip())
    whole = tokenizer.decode(question + answer)
    assert body(out).replace("⟦", "").replace("⟧", "").strip() == whole.strip()


def test_only_as_many_examples_are_shown_as_asked_for_and_there_are(capsys):
    encoded = encoded_rows(*[[([65], False), ([66], True)]] * 3)
    preview(task_of(encoded, tokenizer_for("gpt2")), 2)
    assert len(re.findall(r"example \d", capsys.readouterr().out)) == 2
    preview(task_of(encoded, tokenizer_for("gpt2")), 9)
    assert len(re.findall(r"example \d", capsys.readouterr().out)) == 3


def test_every_answer_of_a_conversation_is_marked(capsys):
    encode = partial(tokenizer_for("gpt2").encode, add_special_tokens=False)
    turns = [(encode("who?"), False), (encode(" me"), True)] * 3
    preview(task_of(encoded_rows(turns), tokenizer_for("gpt2")), 1)
    assert body(capsys.readouterr().out).strip() == "who?⟦ me⟧" * 3


def test_an_example_that_is_all_answer_is_marked_whole(capsys):
    ids = tokenizer_for("gpt2").encode("good")
    preview(task_of(encoded_rows([(ids, True)]), tokenizer_for("gpt2")), 1)
    assert body(capsys.readouterr().out).strip() == "⟦good⟧"


def test_characters_of_several_tokens_and_markup_come_out_whole(capsys):
    tokenizer = tokenizer_for("gpt2")
    text, answer = "日本 [bold]🎬[/bold] größer", " 日👍"
    ids, target = tokenizer.encode(text), tokenizer.encode(answer)
    assert len(target) > len(answer)
    preview(task_of(encoded_rows([(ids, False), (target, True)]), tokenizer), 1)
    assert body(capsys.readouterr().out).strip() == f"{text}⟦{answer}⟧"


def test_a_long_line_is_not_broken_and_no_control_character_reaches_the_terminal(capsys):
    tokenizer = tokenizer_for("gpt2")
    ids = tokenizer.encode("good " * 100 + "\x1b[31mred\x07")
    preview(task_of(encoded_rows([(ids, False), (tokenizer.encode(" x"), True)]), tokenizer), 1)
    out = capsys.readouterr().out
    assert "good " * 100 + r"\x1b[31mred\x07⟦ x⟧" in out


def test_a_stream_without_the_brackets_still_shows_the_preview(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    ids = tokenizer_for("gpt2").encode(" good")
    preview(task_of(encoded_rows([([65], False), (ids, True)]), tokenizer_for("gpt2")), 1)
    stream.flush()
    assert rb"\u27e6 good\u27e7" in stream.buffer.getvalue()


def test_a_terminal_shows_the_marks_as_color(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    encode = tokenizer_for("gpt2").encode
    encoded = encoded_rows([(encode("it was"), False), (encode(" good"), True)])
    preview(task_of(encoded, tokenizer_for("gpt2")), 1)
    out = capsys.readouterr().out
    assert "⟦" not in out
    assert re.search(r"it was\x1b\[[\d;]+m good\x1b\[0m", out)
