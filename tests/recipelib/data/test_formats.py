"""A data set that comes without a template is recognized by its columns, and what it was taken for
is said; columns that say nothing end in one line.
"""

import json

import datasets
import pytest
from datasets import Dataset
from encoding_cases import refusal
from row_files import write

from recipelib.data.formats import guess_template, template_for
from recipelib.data.rows import load_rows
from recipelib.prompts import RowError
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime import Store

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
DOLLY = {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "sums"}


@pytest.mark.parametrize(
    ("row", "guess"),
    [
        ({"messages": HI, "id": 1}, "OpenAI's messages (messages); not used: id"),
        ({"prompt": "Hi", "messages": HI}, "OpenAI's messages (messages); not used: prompt"),
        ({"conversations": SHARED}, "ShareGPT's conversations (conversations)"),
        ({"conversations": HI, "tools": "[]"}, "OpenAI's messages (conversations, tools)"),
        (
            {"prompt": HI[:1], "completion": HI[1:]},
            "TRL's conversational prompts and completions (prompt, completion)",
        ),
    ],
)
def test_conversations_are_recognized(row, guess):
    template, taken_for = guess_template(row, "rows.jsonl")
    (question,) = template.questions(row)
    assert taken_for == f"taken for {guess}"
    assert list(question.turns) == HI
    assert template.metric == "loss"


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "guess"),
    [
        (ALPACA, "Add.\n\n1 and 2", "\n\n3", "Alpaca's instructions (instruction, input, output)"),
        ({**ALPACA, "input": ""}, "Add.", "\n\n3", None),
        ({**ALPACA, "input": None}, "Add.", "\n\n3", None),
        (
            {"instruction": "Go.", "output": "Gone."},
            "Go.",
            "\n\nGone.",
            "Alpaca's instructions (instruction, output)",
        ),
        (
            DOLLY,
            "Add.\n\n1 and 2",
            "\n\n3",
            "Dolly's instructions (instruction, context, response); not used: category",
        ),
        (
            {"prompt": "1, 2, ", "completion": "3"},
            "1, 2, ",
            "3",
            "prompts and completions (prompt, completion)",
        ),
        (
            {"prompt": "{{ 7*7 }}", "response": "49"},
            "{{ 7*7 }}",
            "\n\n49",
            "prompts and responses (prompt, response)",
        ),
    ],
)
def test_instructions_are_recognized(row, prompt, answer, guess):
    template, taken_for = guess_template(row, "rows.jsonl")
    (question,) = template.questions(row)
    assert (template.prompt(question), question.answer) == (prompt, answer)
    assert guess is None or taken_for == f"taken for {guess}"
    assert template.metric == "loss"


def test_an_input_that_only_later_rows_have_is_asked_with():
    template, _ = guess_template({"instruction": "Go.", "output": "Gone."}, "rows.jsonl")
    assert template.prompt(template.questions(ALPACA)[0]) == "Add.\n\n1 and 2"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "Hi"},
        {"messages": "Hi"},
        {"messages": []},
        {"messages": [{"speaker": "Ada"}], "id": 1},
        {**ALPACA, "response": "3"},
        {**ALPACA, "context": "here"},
        {"prompt": HI, "completion": "Hello"},
        {"prompt": "Hi", "completion": "Hello", "response": "Hello"},
        {"prompt": "Hi", "response": ["Hello", "Hey"]},
    ],
    ids=", ".join,
)
def test_columns_that_tell_nothing_end_in_one_line(row):
    message = refusal(lambda: guess_template(row, "rows.jsonl"))
    columns = ", ".join(map(repr, row)) or "none"
    assert message.startswith(f"rows.jsonl: the columns {columns} do not tell what is asked")
    assert "pass --template, or name them messages, conversations, instruction with " in message


@pytest.mark.parametrize("row", [ALPACA, DOLLY, {"prompt": HI[:1], "completion": HI[1:]}])
def test_the_template_is_saved_like_any_other(row, tmp_path):
    template, taken_for = guess_template(row, "rows.jsonl", "mine")
    template.save(tmp_path / "template.yaml")
    saved = PromptTemplate.load(str(tmp_path / "template.yaml"))
    assert saved.questions(row) == template.questions(row)
    assert (saved.name, saved.description, saved.metric) == ("mine", taken_for, "loss")


# What stands beside the turns, and rows that are not alike


SAID = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "then"}]
TOOLS = '[{"name": "look"}]'


@pytest.mark.parametrize(
    ("rows", "system", "turns", "tools"),
    [
        ([{**ALPACA, "system": None}, {**ALPACA, "system": "Be."}], "Be.", [], 0),
        ([{**ALPACA, "system_prompt": "Be."}], "Be.", [], 0),
        ([{"prompt": "Hi", "completion": "Hello", "system": "Be."}], "Be.", [], 0),
        (
            [{**ALPACA, "history": None}, {**ALPACA, "history": [["before", "then"]]}],
            "",
            [*SAID, *({"role": r, "content": c} for r, c in [("user", "Add.\n\n1 and 2")])],
            0,
        ),
        (
            [
                {"query": "Hi", "response": "Hello", "system": "", "history": ""},
                {"query": "Hi", "response": "Hello", "system": "Be.", "history": json.dumps(SAID)},
            ],
            "Be.",
            [*SAID, HI[0]],
            0,
        ),
        ([{"instruction": "Hi", "output": "Hello", "tools": TOOLS}], "", [HI[0]], 1),
        ([{"conversations": SHARED, "system": "Be.", "tools": TOOLS}], "Be.", [HI[0]], 1),
        ([{"messages": json.dumps(HI), "system": "Be.", "functions": TOOLS}], "Be.", [HI[0]], 1),
        ([{"messages": "[{'role'"}, {"messages": HI, "system": "Be."}], "Be.", [HI[0]], 0),
        ([{"version": 1, "text": "x"}, ALPACA, {"messages": HI}, {"messages": HI}], "", HI[:1], 0),
    ],
)
def test_systems_histories_and_tools_are_parts_of_the_prompt(rows, system, turns, tools, tmp_path):
    template, _ = template_for(str(write(tmp_path / "rows.jsonl", rows)))
    (question,) = template.questions(rows[-1])
    if not turns:
        assert (template.system(question), question.turns) == (system, ())
        return
    told = [{"role": "system", "content": system}] if system else []
    assert list(question.turns[:-1]) == [*told, *turns]
    # The answers of the history are learned, too.
    assert not any("weight" in turn for turn in question.turns)
    assert len(question.tools) == tools


@pytest.mark.parametrize(
    ("first", "row", "problem"),
    [
        ({"messages": HI}, {"messages": HI, "images": ["a.png"]}, "images: only text is learned"),
        ({"messages": HI, "weight": 1}, {"messages": HI, "weight": 0.5}, "weight: 0.5: rows are"),
        ({"messages": HI}, {"messages": HI, "chosen": "x"}, "chosen: no recipe learns preferences"),
        ({"messages": HI}, {"messages": HI, "history": [["a", "b"]]}, "history: the template that"),
        ({"messages": HI}, {"messages": HI, "kto_tag": False}, "kto_tag: is false, so the answer"),
        (ALPACA, {**ALPACA, "label": "False"}, "label: is false, so the answer is not to be"),
        (ALPACA, {**ALPACA, "system": "Be."}, "system: the template that was guessed from the"),
        (ALPACA, {**ALPACA, "instruction": HI}, "instruction: is a list, not text as in the rows"),
        (ALPACA, {"messages": HI}, "no column 'instruction'; the row has 'messages', and"),
    ],
)
def test_a_row_that_does_not_fit_the_guess_says_why(first, row, problem):
    template, _ = guess_template(first, "rows.jsonl")
    with pytest.raises(RowError) as error:
        template.questions(row)
    assert str(error.value).startswith(problem)


def test_preferences_are_refused_with_what_can_be_learned_of_them():
    message = refusal(lambda: guess_template({"prompt": HI[:1], "chosen": HI[1:]}, "rows.jsonl"))
    assert message.startswith("rows.jsonl: chosen: no recipe learns preferences; to learn the")


def test_what_nothing_reads_is_counted_once_and_again_from_the_cache(tmp_path, capsys):
    odd = [HI[0], {**HI[1], "mood": "gay", "id": 7}]
    rows = [{"messages": HI}] * 100 + [{"messages": odd}] * 3 + [{"messages": HI, "topic": "x"}]
    file = write(tmp_path / "rows.jsonl", rows)
    template, _ = template_for(str(file))
    store = Store(1, tmp_path / "cache")
    for _ in range(2):
        load_rows(template, str(file), "train", store=store)
        assert capsys.readouterr().out == (
            f"warning: {file}: nothing reads the turns' key 'mood' (3 rows), the column 'topic' "
            "(1 row); if that should change what is learned, put it into the text, or name the "
            "column in a --template\n"
        )
    # A template that someone wrote leaves columns out on purpose, but hardly these.
    alpaca = PromptTemplate.load("alpaca")
    (question,) = alpaca.questions({**ALPACA, "history": [["a", "b"]], "topic": "x"})
    assert question.unread == ("the column 'history'",)


# Where the rows are


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_the_first_row_of_a_file_decides(suffix, tmp_path):
    template, taken_for = template_for(str(write(tmp_path / f"tasks{suffix}", [ALPACA, ALPACA])))
    assert template.name == "tasks"
    assert taken_for == "taken for Alpaca's instructions (instruction, input, output)"
    assert template.questions(ALPACA)[0].answer == "\n\n3"


def test_conversations_in_parquet_are_recognized(tmp_path):
    template, _ = template_for(str(write(tmp_path / "chats.parquet", [{"messages": HI}])))
    assert template.messages == "messages"


def test_a_folder_is_known_by_the_split_that_is_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", [ALPACA])
    write(tmp_path / "other.jsonl", [{"conversations": SHARED}])
    assert template_for(str(tmp_path))[0].name == tmp_path.name
    assert template_for(str(tmp_path))[0].messages is None
    assert template_for(str(tmp_path), "other")[0].messages == "conversations"
    assert "no file for the split 'test'" in refusal(lambda: template_for(str(tmp_path), "test"))


def test_a_first_line_that_is_broken_is_passed_over_and_later_ones_are_not_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{\n" + json.dumps(ALPACA) + "\n{\n", encoding="utf-8")
    assert template_for(str(file))[0].name == "rows"


def test_a_data_set_of_the_hub_is_known_by_its_first_row(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options["split"]))
        return Dataset.from_list([{"conversations": SHARED, "id": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    template, taken_for = template_for("somebody/chats:small", "first")
    assert asked == [(("somebody/chats", "small"), "first")]
    assert template.name == "chats"
    assert taken_for == "taken for ShareGPT's conversations (conversations); not used: id"


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("empty.jsonl", b"", "holds no rows"),
        ("empty.csv", b"a,b\n", "holds no rows"),
        ("bad.jsonl", b"{\n{\n", ":2: no JSON at column"),
        ("bad.parquet", b"no", ": no Parquet file ("),
        ("rows.txt", b"Hi", ": not one of .jsonl, .json"),
    ],
)
def test_a_file_without_a_row_says_so(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = refusal(lambda: template_for(str(tmp_path / name)))
    assert message.startswith(str(tmp_path / name))
    assert problem in message


def test_an_empty_parquet_file_says_so(tmp_path):
    file = tmp_path / "rows.parquet"
    Dataset.from_list([ALPACA]).select([]).to_parquet(file)
    assert "holds no rows" in refusal(lambda: template_for(str(file)))
