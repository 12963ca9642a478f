"""Which prompts an evaluation with demonstrations shows."""

import pytest
from template_cases import CASES
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.asking import CausalAsker, MaskedAsker
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting.previews import preview_prompts, say_first_prompt

TOKENIZER, MODEL = tokenizer_for("gpt2"), tiny_llama(300)


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
