"""Every mistake in a template's fields is one line that names the file, the key and the cure."""

import json

import pytest
from template_fields import ASK, NAMES, PAIR, SORT, SPAN, make, one_line, without

from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

# The file


def test_a_misspelled_template_name_is_corrected():
    with pytest.raises(UserError) as error:
        PromptTemplate.load("movie_review")
    assert "did you mean 'movie_reviews'?" in one_line(error)
    with pytest.raises(UserError, match=r"one of .*movie_reviews.*sst2"):
        PromptTemplate.load("zzz")


def test_a_folder_of_a_template_s_name_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert PromptTemplate.load("sst2").name == "sst2"


@pytest.mark.parametrize("words", ["[yes, good]", "[good, off]", "[1]", "[null]", "[2.50]"])
def test_label_words_that_yaml_turns_into_something_else_are_refused(tmp_path, words):
    file = tmp_path / "task.yaml"
    lines = [f"{key}: {json.dumps(value)}" for key, value in without(SORT, "verbalizer").items()]
    file.write_text("\n".join([*lines, "verbalizer:", f"  good: {words}"]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        PromptTemplate.load(str(file))
    message = one_line(error)
    assert message.startswith(f"{file}: verbalizer.good: YAML reads a word as ")
    assert message.endswith("put it into quotes")


# The fields


@pytest.mark.parametrize(
    ("fields", "key", "problem"),
    [
        # unknown keys
        ({**ASK, "promt": "x"}, "promt", "unknown key; did you mean 'prompt'?"),
        ({**ASK, "zzz": "x"}, "zzz", "unknown key; known keys: answer, "),
        ({**ASK, "two\nlines": "x"}, "two lines", "unknown key"),
        ({**ASK, "dataset": {"pth": "x"}}, "dataset.pth", "known keys: path, name"),
        ({**ASK, "demonstrations": {"n": 4}}, "demonstrations.n", "known keys: k, sampler"),
        # wrong types
        ({**ASK, "prompt": 5}, "prompt", "must be text, not 5; put text into quotes"),
        ({**ASK, "answer": True}, "answer", "must be text, not True"),
        ({**ASK, "stop": "x"}, "stop", "must be a list, not 'x'"),
        ({**ASK, "stop": [1]}, "stop", "YAML reads an item as 1, not as text; put it into quotes"),
        ({**ASK, "stop": [""]}, "stop", "an empty text matches everywhere; leave it out"),
        ({**ASK, "columns": ["a"]}, "columns", "must be keys and values"),
        ({**ASK, "columns": {"a": 1}}, "columns.a", "must name a column, not 1"),
        ({**ASK, "dataset": {"revision": 12}}, "dataset.revision", 'write "12" in quotes'),
        ({**ASK, "shorten": "text"}, "shorten", "must be a list or keys and values"),
        ({**PAIR, "negatives": True}, "negatives", "must be a whole number, not True"),
        ({**PAIR, "negatives": -1}, "negatives", "must be 0 or more"),
        ({**NAMES, "spans": {**NAMES["spans"], "none": False}}, "spans.none", "is not text"),
        ({**ASK, "rationale": {"text": 5, "join": "x"}}, "rationale.text", "is not text"),
        ({**SORT, "verbalizer": {}}, "verbalizer", "must map each label to its words"),
        ({**SORT, "verbalizer": {"a": []}}, "verbalizer.a", "needs one word or a list of words"),
        ({**SORT, "verbalizer": {"a": [" "]}}, "verbalizer.a", "an empty word; name one"),
        ({**SORT, "verbalizer": {"a": "x", "b": "X."}}, "verbalizer.b", "'X.' also stands for 'a'"),
        # missing fields
        (without(ASK, "name"), "name", "is missing; give the task a short name"),
        (without(ASK, "form"), "form", "must be one of generative, extractive, inference"),
        (without(ASK, "prompt"), "prompt", "is missing; it holds the text that the model is asked"),
        (without(ASK, "answer"), "answer", "is missing; it holds the text that the model is to"),
        (
            {**SORT, "verbalizer": {True: ["a"], False: ["b"]}},
            "verbalizer.True",
            "is not text; write 'true'",
        ),
        ({**SORT, "dataset": {"train": False}}, "dataset.train", "put what stands there into"),
        (without(SORT, "label"), "label", "is missing: 'label' names the class's column"),
        (without(PAIR, "first"), "first", "is missing; the form asks whether 'first' and 'second'"),
        (without(PAIR, "label", "verbalizer"), "label", "is missing"),
        (without(SPAN, "context"), "context", "is missing; it names the variable that the answer"),
        (without(NAMES, "spans"), "references", "has either 'references' or 'spans'"),
        ({**NAMES, "spans": {"tokens": "t", "types": {"A": "a"}}}, "spans.tags", "is missing"),
        ({**NAMES, "spans": {"tokens": "t", "tags": "g"}}, "spans.types", "must map each label"),
        (
            {**ASK, "rationale": {"text": "x"}},
            "rationale.join",
            "is missing; 'text' is the reasoning",
        ),
        ({**ASK, "prompts": []}, "prompts", "stands beside 'prompt'; keep one of them"),
        ({**without(ASK, "prompt"), "prompts": []}, "prompts", "is empty; give at least one"),
        # fields that contradict one another
        ({**ASK, "messages": "messages"}, "messages", "brings its own answers"),
        (
            {**ASK, "completion": "answer"},
            "completion",
            "names the turns behind those of 'messages'",
        ),
        ({**SORT, "history": "h"}, "history", "goes with a prompt and an answer of free text, not"),
        ({**ASK, "history": "h", "shorten": ["text"]}, "history", "not with shorten"),
        ({**SPAN, **NAMES, "references": "a"}, "references", "either 'references' or 'spans'"),
        ({**ASK, "metric": "accuracy"}, "metric", "accuracy does not fit"),
        ({**SORT, "metric": "squad"}, "metric", "squad does not fit"),
        ({**ASK, "metric": "f1"}, "metric", "must be one of accuracy, macro_f1, matthews, f1 "),
        ({**SORT, "metric": [{"f1": "a"}]}, "metric", "f1 CLASS, exact_match"),
        ({**SORT, "metric": ["accuracy", "f1 z"]}, "metric", "f1 z: 'z' is no class of"),
        ({**SORT, "metric": ["accuracy", "squad"]}, "metric", "squad does not fit: accuracy"),
        ({**SORT, "metric": ["accuracy"] * 2}, "metric", "accuracy stands twice; keep one"),
        ({**ASK, "metric": []}, "metric", "is empty; name at least one"),
        ({**ASK, "metric": ["loss", "squad"]}, "metric", "loss compares no answers; let it stand"),
        ({**ASK, "metric": "entity_f1"}, "metric", "does not fit: entity_f1 goes with spans"),
        ({**NAMES, "metric": "squad"}, "metric", "squad does not fit: entity_f1 goes with spans"),
        ({**ASK, "shorten": [["x"]]}, "shorten", "['x'] is not text; name fields"),
        ({**ASK, "name": "glue/sst2"}, "name", "'glue/sst2' is no plain name; leave out slashes"),
        ({**ASK, "name": ".."}, "name", "'..' is no plain name"),
        ({**ASK, "shorten": ["txt"]}, "shorten", "'txt' stands in no text; name one of text"),
        ({**PAIR, "shorten": ["first"]}, "shorten", "'first' stands in no text; name one of text"),
        ({**ASK, "shorten": {"text": "middle"}}, "shorten", "must be right or left"),
        ({**ASK, "demonstrations": {"k": -1}}, "demonstrations.k", "must be a whole number"),
        ({**ASK, "demonstrations": {"k": "4"}}, "demonstrations.k", "must be a whole number"),
        ({**ASK, "demonstrations": {"sampler": "best"}}, "demonstrations.sampler", "one of first,"),
        # texts that cannot work
        ({**ASK, "prompt": "Q: {{ text }} "}, "prompt", "ends in white space; write |-"),
        ({**ASK, "prompt": "Q: {{ text }}\n"}, "prompt", "ends in white space; write |-"),
        ({**SORT, "cloze": "It was {{ word }}."}, "cloze", "has no {{ mask }}; place it where"),
        ({**ASK, "prompt": "{{ text"}, "prompt", "line 1: unexpected end of template"),
        ({**ASK, "answer": "a\n{% fi %}"}, "answer", "line 2: Encountered unknown tag 'fi'"),
        ({**SORT, "cloze": "{{ mask }"}, "cloze", "line 1: unexpected '}'"),
        ({**PAIR, "second": "{% if %}"}, "second", "line 1: "),
        ({**without(ASK, "prompt"), "prompts": ["a", "{{"]}, "prompts", "line 1: "),
        ({**ASK, "rationale": {"text": "{{ 1 +", "join": ""}}, "rationale.text", "line 1: "),
        (
            {**ASK, "prompt": "{{ text|lowr }}"},
            "prompt",
            "the filter lowr is not allowed, only abs",
        ),
        ({**ASK, "prompt": "{{" + "(" * 3000 + "}}"}, "prompt", "nested too deeply"),
        (
            {**ASK, "prompt": "{% for a in text %}" * 30 + "{% endfor %}" * 30},
            "prompt",
            "nested too deeply",
        ),
        ({**SPAN, "references": "{{ a }}"}, "references", "write an expression without braces"),
        ({**SPAN, "start": "a b"}, "start", "write an expression without braces, such as answers"),
        ({**ASK, "extract": ["(a"]}, "extract", "'(a' is no regular expression: missing )"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_cure(fields, key, problem):
    with pytest.raises(UserError) as error:
        make(fields)
    message = one_line(error)
    assert message.startswith(f"task.yaml: {key}: ")
    assert problem in message


def test_columns_of_the_command_line_do_not_hide_a_mistake_in_those_of_the_file(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("name: a\nform: generative\nprompt: x\nanswer: y\ncolumns: [a]\n")
    with pytest.raises(UserError, match="columns: must be keys and values"):
        PromptTemplate.load(str(file), columns={"text": "b"})


def test_checking_leaves_the_given_fields_as_they_are():
    fields = {**SORT, "verbalizer": {"good": "great"}, "shorten": ["text"]}
    before = json.dumps(fields)
    template = make(fields)
    assert json.dumps(fields) == before
    assert template.verbalizer == {"good": ["great"]}
    assert template.shorten == {"text": "right"}
