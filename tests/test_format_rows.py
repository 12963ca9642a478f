"""recipes/format_rows.py: other trainers are given what the recipes train, in every form."""

import argparse
import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import format_rows as tool
import pytest
from datasets import Dataset, load_dataset, load_from_disk
from recipe_runs import REVIEWS, write_rows
from template_cases import CASES
from tiny_llama import save_tiny_llama, tiny_llama
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from recipelib.encoding import (
    FORMS,
    PromptEncoder,
    check_form,
    encode_formatted,
    encode_rows,
    format_rows,
)
from recipelib.prompts import PromptTemplate
from recipelib.runtime import Store, UserError

# With the marks by which TRL knows the assistant's turns. A turn begins on a line of its own.
CHAT_TEMPLATE = """\
{{- tools or '' }}
{%- for turn in messages %}
    {{- '[' + turn.role + ']\\n' }}
    {%- if turn.role == 'assistant' %}
        {%- generation %}
            {{- turn.content }}
            {%- for call in turn.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
            {{- '</s>' }}
        {%- endgeneration %}
    {%- else %}{{- turn.content }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n' }}{%- endif %}
"""
CHATS = PromptTemplate({"name": "chats", "form": "generative", "messages": "messages"})
ASK, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
MORE, LAST = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": " 2\n"}
BARE = {**LAST, "content": "2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def reviews_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), reviews=REVIEWS) / "reviews.jsonl"


def formatted(rows: list[dict], template: PromptTemplate, form: str, **options) -> Dataset:
    return format_rows(Dataset.from_list(rows), template, form, num_proc=1, **options)


def conversation(*turns: dict, form: str = "messages", **options) -> list[dict]:
    return formatted([{"messages": json.dumps(turns)}], CHATS, form, **options).to_list()


def run(capsys, *words: object) -> str:
    """What the tool says."""
    tool.main(["--template", "movie_reviews", *map(str, words)])
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    """The one line that the tool ends in."""
    with pytest.raises(SystemExit) as ended:
        tool.main([*map(str, words)])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def supervised(rows: Dataset) -> list[list[int]]:
    """The ids that a loss covers, of each row."""
    return [
        [index for index, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
        for row in rows
    ]


# What other trainers make of it ------------------------------------------------------------------


def trained_by_trl(rows: Dataset, tokenizer, folder: Path, **options) -> Dataset:
    """The rows as TRL's own trainer prepares them, after a step on them."""
    args = SFTConfig(
        **{"output_dir": str(folder), "max_steps": 1, "use_cpu": True, "bf16": False},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **{"max_length": None, "gradient_checkpointing": False, **options},
    )
    model = tiny_llama(len(tokenizer))
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer.train_dataset


TURNS = [{"messages": [ASK, ANSWER, MORE, BARE]}, {"messages": [ASK, {**BARE, "content": "so"}]}]
REVIEW = PromptTemplate.load("movie_reviews")


@pytest.mark.parametrize(
    ("form", "rows", "template", "rendering", "options"),
    [
        ("prompt_completion", REVIEWS[:4], REVIEW, "text", {}),
        ("prompt_completion", REVIEWS[:4], REVIEW, "chat", {}),
        ("messages", REVIEWS[:4], REVIEW, None, {"assistant_only_loss": True}),
        ("messages", TURNS, CHATS, None, {"assistant_only_loss": True}),
        ("ids", REVIEWS[:4], REVIEW, "text", {}),
    ],
    ids=["texts", "turns", "messages", "conversations", "ids"],
)
def test_trl_supervises_the_ids_that_we_train(
    form, rows, template, rendering, options, tokenizer, tmp_path
):
    tokenizer.pad_token = tokenizer.eos_token
    more = {"tokenizer": tokenizer}
    chat = "chat" if form == "messages" and template is REVIEW else rendering
    ours = supervised(formatted(rows, template, "ids", rendering=chat, **more))
    given = formatted(rows, template, form, rendering=rendering, **more)
    theirs = supervised(trained_by_trl(given, tokenizer, tmp_path, **options))
    if rendering == "chat":
        # TRL learns what the chat template writes behind the end of the turn, too.
        behind = tokenizer("\n")["input_ids"]
        assert behind
        ours = [ids + behind for ids in ours]
    assert len(theirs) == len(rows)
    assert theirs == ours


# Every form of every template --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_template_is_written_in_every_form(name, tokenizer):
    template, rows = PromptTemplate.load(name), CASES[name].rows
    encoder = PromptEncoder(template, tokenizer, 1024)

    def written(form: str, encoder: PromptEncoder | None) -> list:
        chat = check_form(template, form, None, encoder is not None)
        options = {"encoder": encoder, "chat": chat, "seed": 42, "store": Store()}
        return encode_formatted(rows, template, form, **options).examples.to_list()

    trained = encode_rows(encoder, rows, seed=42).examples.to_list()
    mask = [[1] * row.pop("length") for row in trained]
    ids = written("ids", encoder)
    assert [row.pop("attention_mask") for row in ids] == mask
    assert ids == trained
    texts = [row["text"] for row in written("text", encoder)]
    assert texts == [tokenizer.decode(row["input_ids"]) for row in trained]
    pairs, messages = written("prompt_completion", None), written("messages", None)
    assert len(messages) == len(trained)
    if template.conversation:
        return
    whole = [pair["prompt"] + pair["completion"] for pair in pairs]
    assert [text + tokenizer.eos_token for text in whole] == texts
    for row, pair in zip(messages, pairs, strict=True):
        *asked, answered = row["messages"]
        said = "\n\n".join(turn["content"] for turn in asked)
        assert (said, answered["content"]) == (pair["prompt"], pair["completion"].strip())
        assert [turn["role"] for turn in row["messages"]][-2:] == ["user", "assistant"]


def test_the_length_and_the_seed_are_those_of_training(tokenizer):
    rows = [{"text": "so " * 90, "kind": "x"}, {"text": "so", "kind": "x" * 90}] * 3
    fields = {"name": "two", "form": "generative", "shorten": ["text"]}
    fields |= {"prompts": ["{{ kind }}: {{ text }}?", "{{ text }} {{ kind }}?"], "answer": " yes"}
    template = PromptTemplate(fields)
    encoder = PromptEncoder(template, tokenizer, 60)
    trained = encode_rows(encoder, rows, seed=7)
    assert (trained.counts.shortened, trained.counts.left_out) == (3, 3)
    options = {"tokenizer": tokenizer, "max_length": 60, "seed": 7}
    texts = formatted(rows, template, "text", **options)["text"][:]
    assert texts == [tokenizer.decode(example) for example in trained.examples["input_ids"]]
    assert len({text[:2] for text in texts}) == 2  # both phrasings
    assert all(len(text) > 180 for text in formatted(rows, template, "text")["text"][0::2])


# Conversations -----------------------------------------------------------------------------------


def test_a_conversation_is_written_as_it_is_learned(tokenizer, capsys):
    whole = [ASK, ANSWER, MORE, LAST, MORE]
    assert conversation(*whole) == [{"messages": [ASK, ANSWER, MORE, BARE]}]
    assert conversation(*whole, form="prompt_completion") == [
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": [ASK, ANSWER, MORE], "completion": [BARE]},
    ]
    assert "one for each turn that is learned" in capsys.readouterr().out

    unlearned = {**ANSWER, "weight": 0}
    assert conversation(ASK, unlearned, MORE, LAST, tokenizer=tokenizer) == [
        {"messages": [ASK, unlearned, MORE, BARE]}
    ]
    assert "weight: 0, which TRL does not read" in capsys.readouterr().out
    pairs = conversation(ASK, unlearned, MORE, LAST, form="prompt_completion")
    assert pairs == [{"prompt": [ASK, ANSWER, MORE], "completion": [BARE]}]

    # Of too long a conversation the oldest turns go.
    options = {"tokenizer": tokenizer, "max_length": 80}
    long = {**MORE, "content": "Well " * 8}
    (row,) = conversation(ASK, ANSWER, long, LAST, form="prompt_completion", **options)[1:]
    assert row == {"prompt": [long], "completion": [BARE]}


def test_calls_and_tools_stay_what_they_are_in_files(tokenizer, tmp_path):
    rows = [
        {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [ASK, ANSWER], "tools": None},
    ]
    rows = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    expected = [
        {"messages": [ASK, called], "tools": [TOOL]},
        {"messages": [ASK, ANSWER], "tools": None},
    ]
    found = formatted(rows, CHATS, "messages", tokenizer=tokenizer)
    assert found.to_list() == expected
    found.to_parquet(tmp_path / "rows.parquet")
    read = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert read.to_list() == expected


# From the command line ---------------------------------------------------------------------------


def test_what_is_held_out_is_never_in_the_training_file(reviews_file, tmp_path, capsys):
    parts = {}
    for split in ("train", "eval"):
        said = run(
            *(capsys, "--dataset", reviews_file, "--split", split),
            *("--output", tmp_path / f"{split}.jsonl", "--as", "prompt_completion"),
        )
        lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        parts[split] = [json.loads(line)["prompt"] for line in lines]
    assert "2 from 2 rows" in said
    assert said.endswith(f"written: {tmp_path / 'eval.jsonl'}\n")
    assert (len(parts["train"]), len(parts["eval"])) == (22, 2)
    assert not {*parts["train"]} & {*parts["eval"]}


def test_every_format_holds_the_same_rows(reviews_file, tmp_path, capsys):
    base = ["--dataset", reviews_file, "--as", "prompt_completion"]
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv", "a"):
        run(capsys, *base, "--output", tmp_path / name)
    whole = load_from_disk(tmp_path / "a").to_list()
    assert len(whole) == 22
    for kind, name in (("parquet", "a.parquet"), ("json", "a.jsonl"), ("csv", "a.csv")):
        read = load_dataset(kind, data_files=str(tmp_path / name), split="train")
        assert read.to_list() == whole, name
    assert json.loads((tmp_path / "a.json").read_text()) == whole
    assert {path.name for path in tmp_path.iterdir()} == {
        *("a.parquet", "a.jsonl", "a.json", "a.csv", "a")
    }


def test_a_data_set_s_own_columns_tell_what_it_is(tmp_path, capsys):
    chats = write_rows(tmp_path, chats=[{"messages": [ASK, ANSWER]}] * 2) / "chats.jsonl"
    tool.main(["--dataset", str(chats), "--output", str(tmp_path / "out" / "a.json")])
    assert "taken for OpenAI's messages" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/a.json").read_text()) == [{"messages": [ASK, ANSWER]}]


# What each option may be; the rows change, or a line says what is wrong.
OPTIONS = {
    "as": ["text"],
    "split": ["eval"],
    "template": ["OTHER"],
    "dataset": ["FOLDER"],
    "train_split": ["more", "--dataset", "FOLDER"],
    "eval_split": ["extra", "--dataset", "FOLDER", "--split", "eval"],
    "columns": ["text=label"],
    "field": ["data.rows", "--dataset", "INSIDE"],
    "encoding": ["latin-1", "--dataset", "LATIN"],
    "model_name_or_path": ["MODEL", "--max_length", "95"],
    "max_length": ["90", "--model_name_or_path", "MODEL"],
    "rendering": ["text"],
    "max_train_samples": ["3"],
    "max_eval_samples": ["1", "--split", "eval"],
    "seed": ["7", "--max_train_samples", "3"],
    "skip_bad_rows": ["true", "--dataset", "BAD"],
    "revision": ["main"],
    "chat_template_kwargs": ['{"deep": 1}'],
    "trust_remote_code": ["true"],
}
SAYS = {
    "rendering": "--rendering text: messages are turns, which are a chat; leave it out",
    **{
        name: f"--{name}: of which model? Pass --model_name_or_path, or leave it out"
        for name in ("revision", "chat_template_kwargs", "trust_remote_code")
    },
}


def test_every_option_changes_something_or_is_refused(
    model, reviews_file, tmp_path, monkeypatch, capsys
):
    folder = write_rows(tmp_path / "folder", train=REVIEWS[:5], more=REVIEWS[5:9])
    write_rows(folder, validation=REVIEWS[9:11], extra=REVIEWS[11:13])
    bad = write_rows(tmp_path / "bad", train=[{"sentence": "x", "label": "?"}, *REVIEWS[:3]])
    write_rows(bad, validation=REVIEWS[:2])
    other = PromptTemplate({**REVIEW.fields, "system": "Well."}, REVIEW.path)
    other.save(tmp_path / "other.yaml")
    latin = tmp_path / "latin.csv"
    latin.write_text("sentence,label\n" + "so sch\xf6n,positive\n" * 10, encoding="latin-1")
    inside = tmp_path / "inside.json"
    inside.write_text(json.dumps({"data": {"rows": REVIEWS[:7]}}))
    places = {
        "LATIN": latin,
        "INSIDE": inside,
        "FOLDER": folder,
        "BAD": bad,
        "MODEL": model,
        "OTHER": tmp_path / "other.yaml",
    }
    output, seen = tmp_path / "a.json", set()
    for name, words in {"": [], **OPTIONS}.items():
        given = [str(places.get(word, word)) for word in words]
        options = {"--template": "movie_reviews", "--dataset": str(reviews_file)}
        if name:
            options |= {f"--{name}": given[0], **dict(zip(given[1::2], given[2::2], strict=True))}
        argv = [*chain(*options.items()), "--output", str(output)]
        if name in SAYS:
            assert refused(capsys, *argv) == f"error: {SAYS[name]}"
            assert not output.exists()
            continue
        tool.main(argv)
        written = output.read_text()
        assert written not in seen, name
        seen.add(written)
        output.unlink()

    def stop(parser, argv):
        names = {action.dest for action in parser._actions} - {"help", "output", "form"}
        # How many processes work and whether they keep what they made changes no row.
        assert names == {*OPTIONS} - {"as"} | {"dataset_num_proc", "dataset_cache"}
        assert [*FORMS] == tool.FORMS
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(StopIteration):
        tool.main([])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--as", "ids"], "--as ids: ids are of one model's tokenizer; pass --model_name_or_path"),
        (["--as", "text", "--rendering", "chat"], "--as text: a chat as one text is of one model"),
        (["--output", "a.txt"], "--output a.txt: not one of .parquet, .jsonl, .json, .csv, or a"),
        (["--output", "a.csv"], "--output a.csv: CSV holds texts only, and these are lists; write"),
        (["--output", "reviews.jsonl"], "reviews.jsonl: the rows are read from it; write elsewhe"),
        (["--output", "folder"], "--output folder: is there already; name another, or delete it"),
        (["--max_length", "0"], "--max_length 0: must be 1 or more"),
        (["--chat_template_kwargs", "3"], "--chat_template_kwargs: JSON, but no object; write it"),
        (["--model_name_or_path", "MODEL", "--max_length", "3"], "--max_length 3: no training row"),
        (["--model_name_or_path", "./nowhere"], "./nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words, said, model, reviews_file, tmp_path, monkeypatch, capsys
):
    (tmp_path / "reviews.jsonl").write_bytes(reviews_file.read_bytes())
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    words = [str(model) if word == "MODEL" else word for word in words]
    base = ["--template", "movie_reviews", "--dataset", "reviews.jsonl", "--output", "a.jsonl"]
    assert said in refused(capsys, *base, *words)
    assert (tmp_path / "reviews.jsonl").read_bytes() == reviews_file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"reviews.jsonl", "folder"}


def test_an_error_while_writing_leaves_the_earlier_file(
    reviews_file, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "a.parquet"
    output.write_text("earlier")

    def fail(self, path):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "to_parquet", fail)
    base = ["--template", "movie_reviews", "--dataset", reviews_file, "--output", output]
    assert refused(capsys, *base) == f"error: --output {output}: No space left on device"
    assert output.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_the_help_answers_without_torch():
    code = (
        "import sys, format_rows\ntry: format_rows.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    folder = Path(tool.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)


# From Python -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.shuffle(seed=1, keep_in_memory=True),
        lambda data: data.filter(lambda row: row["label"] == "negative"),
        lambda data: data.rename_columns({"sentence": "text"}).rename_columns({"text": "sentence"}),
        lambda data: data.rename_columns({"label": "text", "other": "label"}),
    ],
    ids=["shuffled", "filtered", "renamed and back", "renamed"],
)
def test_a_data_set_is_taken_as_it_is_and_not_as_its_files_are(change, tmp_path):
    rows = [{**row, "other": REVIEWS[-place]["label"]} for place, row in enumerate(REVIEWS)]
    Dataset.from_list(rows).save_to_disk(tmp_path)
    data = change(load_from_disk(tmp_path))
    rows = format_rows(data, REVIEW, "prompt_completion", num_proc=1)
    assert len(rows) == len(data)
    for row, pair in zip(data, rows, strict=True):
        assert row["sentence"] in pair["prompt"]
        assert pair["completion"].strip() == row["label"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            Dataset.from_list([{"sentence": "x", "label": "?"}]),
            "the data set, row 1: label: '?' is",
        ),
        (
            Dataset.from_list([{"text": "x", "label": "?"}]),
            "the data set: no column 'sentence'; th",
        ),
        (Dataset.from_list(REVIEWS).select([]), "the data set: holds no rows"),
        ({"train": Dataset.from_list(REVIEWS)}, "dict: pass a datasets.Dataset, such as one split"),
    ],
)
def test_a_data_set_that_does_not_fit_ends_in_one_line(data, said):
    with pytest.raises(UserError) as error:
        format_rows(data, REVIEW, "messages", num_proc=1)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_the_call_that_the_documentation_shows_runs(tokenizer, reviews_file, monkeypatch):
    text = (Path(tool.__file__).parent / "README.md").read_text(encoding="utf-8")
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "rows" in code
    ]
    monkeypatch.chdir(reviews_file.parent)
    names = {"tokenizer": tokenizer}
    exec(code, names)
    assert names["rows"].column_names == ["prompt", "completion"]
    assert len(names["rows"]) == len(REVIEWS)
