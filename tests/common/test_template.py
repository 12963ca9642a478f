import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.row_values import RowError, read_entities
from common.template import PromptTemplate

ASK = {"name": "task", "form": "generative", "prompt": "Q: {{ text }}", "answer": " {{ gold }}"}
SORT = {
    "name": "task",
    "form": "generative",
    "prompt": "Q: {{ text }}",
    "label": "label",
    "verbalizer": {"bad": ["terrible", "really bad"], "good": ["great"]},
}
PAIR = {**SORT, "form": "inference", "first": "{{ text }}", "second": "It is {{ word }}."}
PAIR.pop("prompt")
SPAN = {
    "name": "task",
    "form": "extractive",
    "prompt": "{{ context }}?",
    "context": "context",
    "references": "answers.text",
}
NAMES = {
    "name": "task",
    "form": "extractive",
    "prompt": "{{ sentence }} {{ type }}?",
    "context": "sentence",
    "spans": {"tokens": "tokens", "tags": "tags", "types": {"PER": ["person"], "LOC": ["place"]}},
}
ANY_TEXT = st.text(max_size=40) | st.sampled_from(
    [
        "{{ 7*7 }}",
        "{% raw %}",
        "{# gone? #}",
        "<|im_end|>",
        "[MASK]",
        "|||",
        "\r\n",
        "\u2028",
        "\x00",
    ]
)
quick = settings(max_examples=60, deadline=None)


def make(fields, **more):
    return PromptTemplate({**fields, **more}, "task.yaml")


def first(template, row, **options):
    return template.questions(row, **options)[0]


def without(fields, *keys):
    return {key: value for key, value in fields.items() if key not in keys}


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# The file


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("name: a\nname: b", "line 2", "the key 'name' stands twice; keep one"),
        (
            "verbalizer:\n  good: [a]\n  good: [b]",
            "line 3",
            "the key 'good' stands twice; keep one",
        ),
        ("verbalizer: {0: [bad]}", "line 1", 'the key 0 is read as 0, not as text; write "0"'),
        ("a: b\nno: [bad]", "line 2", 'the key no is read as False, not as text; write "no"'),
        ("verbalizer:\n  1.5: [bad]", "line 2", 'read as 1.5, not as text; write "1.5"'),
        ("~: [bad]", "line 1", "read as None, not as text"),
        ("2024-01-01: x", "line 1", 'not as text; write "2024-01-01"'),
        (
            "prompt: Review: {{ text }}",
            "line 1",
            "put text with a colon, braces or quotes into quotes",
        ),
        ("prompt: {{ text }}", "line 1", "not as text"),
        ("a: 'open", "line 1", "put text with a colon, braces or quotes into quotes"),
        ("a: \tb\n\tc: d", "line", "quotes"),
        ("a: &x [1]\nb: *x", "line 2", "*x is an alias; write the value out"),
        ("a: !!python/object/apply:os.getcwd []", "line 1", "could not determine a constructor"),
        ("- name: a", "", "holds no keys; a template starts with 'name:'"),
        ("", "", "holds no keys; a template starts with 'name:'"),
        ("a: " + "[" * 5000, "", "nested too deeply to be a template; flatten it"),
    ],
)
def test_yaml_that_means_something_else_is_refused(tmp_path, text, place, problem):
    file = tmp_path / "task.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        PromptTemplate.load(str(file))
    message = one_line(error)
    assert message.startswith(f"{file}: {place}")
    assert problem in message


@pytest.mark.parametrize(
    ("make_file", "problem"),
    [
        (lambda file: file.write_bytes(b"name: \xff"), "not UTF-8 at byte 6; save it as UTF-8"),
        (lambda file: file.mkdir(), "Is a directory; pass a file"),
        (lambda file: None, "No such file or directory; pass a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, make_file, problem):
    file = tmp_path / "task.yaml"
    make_file(file)
    with pytest.raises(UserError) as error:
        PromptTemplate.load(str(file))
    assert one_line(error).startswith(f"{file}: {problem}")


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
        (without(SORT, "verbalizer"), "verbalizer", "is missing: 'label' names the class's column"),
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
        ({**SPAN, **NAMES, "references": "a"}, "references", "either 'references' or 'spans'"),
        ({**ASK, "metric": "accuracy"}, "metric", "accuracy does not fit"),
        ({**SORT, "metric": "squad"}, "metric", "squad does not fit"),
        ({**ASK, "metric": "f1"}, "metric", "must be one of accuracy, macro_f1"),
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


def test_checking_leaves_the_given_fields_as_they_are():
    fields = {**SORT, "verbalizer": {"good": "great"}, "shorten": ["text"]}
    before = json.dumps(fields)
    template = make(fields)
    assert json.dumps(fields) == before
    assert template.verbalizer == {"good": ["great"]}
    assert template.shorten == {"text": "right"}


# The sandbox

HOSTILE_ROW = {"text": "ab", "key": "__class__", "items": [1, 2], "map": {"k": "v"}, "gold": ""}


@pytest.mark.parametrize(
    "source",
    [
        # underscore attributes
        "{{ text.__class__ }}",
        "{{ x.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ text['__class__'] }}",
        "{{ text['__cla' ~ 'ss__'] }}",
        "{{ text['__cla' + 'ss__'] }}",
        "{{ text[['__cla', 'ss__']|join] }}",
        "{{ text[key] }}",
        "{{ items[key].x }}",
        "{{ text|attr('__class__') }}",
        "{{ text|attr('upper') }}",
        "{{ items|map(attribute='__class__')|list }}",
        "{{ items|map(attribute='real.__class__')|list }}",
        "{{ items|map(attribute=key)|join }}",
        "{{ items|map('attr', '__class__')|list }}",
        "{{ items|selectattr('__class__')|list }}",
        "{{ items|rejectattr('__class__')|list }}",
        "{{ items|sort(attribute='__class__') }}",
        "{{ items|unique(attribute='__class__')|list }}",
        "{{ items|sum(attribute='__class__') }}",
        "{{ items|groupby('__class__') }}",
        "{{ items|pprint }}",
        # formatting, which reads attributes
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{x.__class__}'.format_map({'x': text}) }}",
        "{{ '{0.__class__}'|format(text) }}",
        "{{ text['for' ~ 'mat'](1) }}",
        "{{ '%s' % text }}",
        # globals and what hangs on them
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ range.__init__ }}",
        "{{ dict.__base__ }}",
        "{{ cycler('a') }}",
        "{{ joiner() }}",
        "{{ lipsum() }}",
        "{{ dict(a=1) }}",
        "{% set n = namespace(x=1) %}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        # other templates
        "{% include 'x' %}",
        "{% include key %}",
        "{% import 'x' as x %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{% block b %}{% endblock %}",
        # changing the row
        "{{ items.append(3) }}",
        "{% set x = items.pop() %}",
        "{{ items.extend(items) }}",
        "{{ map.update({'k': 1}) }}",
        "{{ map.clear() }}",
        "{{ map.setdefault('a', 1) }}",
        # loops, macros, generators, methods
        "{% for x in text %}{{ loop.__class__ }}{% endfor %}",
        "{% for x in text %}{{ loop.cycle.__func__ }}{% endfor %}",
        "{% for x in text recursive %}{{ loop(text) }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
        "{% call text() %}{{ caller.__globals__ }}{% endcall %}",
        "{% filter upper %}a{% endfilter %}",
        "{{ (items|map('abs')).gi_frame }}",
        "{{ (items|map('abs'))['gi_' ~ 'code'] }}",
        "{{ text.upper.__self__ }}",
        "{{ text() }}",
        "{{ map['get']('k') }}",
        "{% set f = text.upper %}{{ f() }}",
        "{{ [text.upper][0]() }}",
        "{{ text.encode() }}",
        "{{ text.translate(map) }}",
    ],
)
def test_no_escape_leaves_the_sandbox(source):
    row = json.loads(json.dumps(HOSTILE_ROW))
    with pytest.raises(UserError) as error:
        make(ASK, prompt=source).questions(row)
    message = one_line(error)
    assert message.startswith("task.yaml: prompt: ")
    assert message.endswith("what common/sandbox.py allows")
    assert row == HOSTILE_ROW


ZEROS = "1000000000"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * %s }}",
        "{{ %s * text }}",
        "{{ [1] * %s }}",
        "{{ items * %s }}",
        "{{ 2 ** %s }}",
        "{{ 10 ** 10 ** 10 }}",
        "{% for i in range(%s) %}{% endfor %}",
        "{{ 'a'.center(%s) }}",
        "{{ 'a'.ljust(%s) }}",
        "{{ 'a'.rjust(%s) }}",
        "{{ 'a'.zfill(%s) }}",
        "{{ '\t'.expandtabs(%s) }}",
        "{{ '%%%sd' %% 1 }}",
        "{{ '%%*d' %% (%s, 1) }}",
        "{{ '{:>%s}'.format(1) }}",
        "{{ '{0:>{1}}'.format(1, %s) }}",
        "{{ '%%%sd'|format(1) }}",
        "{{ 'a'|center(%s) }}",
        "{{ 'a'|indent(%s, true) }}",
        "{{ items|batch(%s, 'x')|list }}",
        "{{ items|slice(%s)|list }}",
        "{{ items|tojson(indent=%s) }}",
        "{{ 1.5|round(%s, 'ceil') }}",
        "{{ 'ab'|wordwrap(1, true, text) }}",
        "{{ map|xmlattr }}",
        "{{ items|map('center', %s)|list }}",
    ],
)
def test_no_number_asks_for_a_huge_text(source):
    source = source.replace("%s", ZEROS).replace("%%", "%")
    with pytest.raises(UserError) as error:
        make(ASK, prompt=source).questions(HOSTILE_ROW)
    assert one_line(error).startswith("task.yaml: prompt: ")


TEN = "'aaaaaaaaaa'"


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + TEN + f"|replace('a', {TEN})" * 9 + " }}",
        "{{ " + TEN + f".replace('a', {TEN})" * 9 + " }}",
        "{{ " + TEN + f".replace('', {TEN})" * 9 + " }}",
        "{{ text|regex_replace('a', '" + "b" * 2000 + "') }}",
        r"{{ text|regex_replace('(a+)', '" + r"\\1" * 2000 + "') }}",
        "{{ ('x' ~ text).join(text) }}",
        "{{ text|join('x' ~ text) }}",
        "{% set x = text %}" + "{% set x = x ~ x ~ x ~ x %}" * 15,
        "{% set x = text %}" + "{% set x = x + x %}" * 30,
        "{% set x = [1, 2] %}" + "{% set x = x + x %}" * 30,
        "{% set x = text %}" + "{% set x = [x, x, x, x]|join %}" * 15,
        "{% set x = 99999999 %}" + "{% set x = x * x %}" * 40 + "{{ x }}",
        "{% for a in text %}{% for b in text %}{{ text }}{% endfor %}{% endfor %}",
        "{% set x %}{{ text }}{% endset %}",
    ],
)
def test_no_chain_of_small_steps_grows_a_huge_text(source):
    with pytest.raises(UserError) as error:
        make(ASK, prompt=source).questions({"text": "a" * 10_000, "gold": ""})
    assert one_line(error).startswith("task.yaml: prompt: ")


def test_a_yaml_alias_bomb_is_refused_before_it_grows(tmp_path):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    file = tmp_path / "task.yaml"
    file.write_text("\n".join([*lines, "name: *a11"]))
    with pytest.raises(UserError, match=r"line 2: \*a0 is an alias"):
        PromptTemplate.load(str(file))


@pytest.mark.parametrize("key", ["answer", "system", "cloze", "first", "second", "question", "yes"])
def test_every_text_is_checked_when_it_is_loaded(key):
    fields = {**PAIR, "answer": " {{ word }}", key: "{{ mask.__class__ }}"}
    with pytest.raises(UserError, match=f"^task.yaml: {key}: access to '__class__' is not allowed"):
        make(fields)


@pytest.mark.parametrize("key", ["references", "start"])
def test_expressions_are_checked_when_they_are_loaded(key):
    with pytest.raises(UserError, match=f"^task.yaml: {key}: access to '__class__' is not allowed"):
        make(SPAN, **{key: "answers.__class__"})
    with pytest.raises(UserError, match=f"^task.yaml: {key}: calling center is not allowed"):
        make(SPAN, **{key: "answers.text.center(5)"})


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ text.split()[0]|upper }}", "TWO"),
        ("{{ text ~ '!' }}{{ text + '?' }}", "two words!two words?"),
        ("{{ text|replace('w', 'v')|trim }}", "tvo vords"),
        ("{{ text.replace('w', 'v', 1) }}", "tvo words"),
        ("{{ ', '.join(items) }}|{{ items|join(' and ') }}", "a, b|a and b"),
        ("{{ text|regex_replace('[aeiou]', '_') }}", "tw_ w_rds"),
        (r"{{ text|regex_replace('(\\w+) (\\w+)', '\\2 \\1') }}", "words two"),
        ("{{ text|regex_replace('') }}", "two words"),
        (
            "{% for x in items %}{{ loop.index }}{{ x }}{{ loop.last }} {% endfor %}.",
            "1aFalse 2bTrue .",
        ),
        ("{% set n = number * 2 + 1 %}{{ n % 4 }} {{ 'AB'[0] }}", "3 A"),
        (
            "{{ map.k }} {{ map['k'] }} {{ map.get('z', '-') }} {{ map.items()|list|length }}",
            "v v - 1",
        ),
        ("{{ items|map('upper')|join }}{{ rows|map(attribute='id')|join(',') }}", "AB7,8"),
        ("{% if absent %}x{% else %}y{% endif %}{{ map.z|default('z') }}", "yz"),
        ("{% raw %}{{ text }}{% endraw %}", "{{ text }}"),
        ("a\n{{ text }}\nb", "a\ntwo words\nb"),
    ],
)
def test_what_a_prompt_needs_is_allowed(source, rendered):
    row = {
        "text": "two words",
        "items": ["a", "b"],
        "number": 5,
        "map": {"k": "v"},
        "rows": [{"id": 7}, {"id": 8}],
        "gold": "",
    }
    template = make(ASK, prompt=source, optional=["absent"])
    assert template.prompt(first(template, row)) == rendered


# Rows


@given(ANY_TEXT, ANY_TEXT)
@quick
def test_any_text_in_a_field_stays_as_it_is(text, gold):
    template = make(ASK, system="[{{ text }}]", cloze="{{ mask }}{{ text }}")
    question = first(template, {"text": text, "gold": gold})
    assert template.prompt(question) == "Q: " + text
    assert template.system(question) == f"[{text}]"
    assert template.cloze(question, "[MASK]") == "[MASK]" + text
    assert question.answer == " " + gold
    assert question.references == (gold.strip(),)


@given(ANY_TEXT, ANY_TEXT)
@quick
def test_any_text_in_a_pair_stays_as_it_is(text, other):
    template = make(
        PAIR, second="{{ other }}", question="Q?", prompt="{{ first }}|{{ second }}|{{ question }}"
    )
    question = first(template, {"text": text, "other": other, "label": "good"})
    assert template.pair(question) == (text, other)
    assert template.prompt(question) == f"{text}|{other}|Q?"


def test_an_answer_keeps_its_line_breaks():
    assert (
        first(make(ASK, answer="\n{{ gold }}\n"), {"text": "", "gold": "a\n"}).answer == "\na\n\n"
    )


def test_a_null_and_an_absent_optional_column_are_empty_text():
    template = make(ASK, prompt="[{{ text }}{{ more }}]", optional=["more"])
    for row in ({"text": "a"}, {"text": "a", "more": None}, {"text": "a", "more": ""}):
        assert template.prompt(first(template, {**row, "gold": "g"})) == "[a]"
    assert template.prompt(first(template, {"text": None, "gold": "g"})) == "[]"


@pytest.mark.parametrize(
    ("fields", "row", "problem"),
    [
        (ASK, {"gold": "g"}, "no column 'text'; the row has 'gold': map the variable with columns"),
        (ASK, {"text": "a"}, "no column 'gold'; the row has 'text'"),
        (ASK, {}, "no column 'gold'; the row has none"),
        ({**ASK, "columns": {"text": "review"}}, {"text": "a", "gold": "g"}, "no column 'review'"),
        (ASK, {"text": "a", "gold": None}, "gold is null; give the answer, or leave the row out"),
        (
            {**ASK, "prompt": "{{ text.b }}"},
            {"text": "a", "gold": ""},
            "prompt: .*has no attribute 'b'",
        ),
        ({**ASK, "prompt": "{{ text + 1 }}"}, {"text": "a", "gold": ""}, "prompt: .*does not fit"),
        (
            {**ASK, "prompt": "{{ 1 / text|int }}"},
            {"text": "", "gold": ""},
            "prompt: .*does not fit",
        ),
        (
            {**ASK, "prompt": "{{ text|regex_replace(text) }}"},
            {"text": "(", "gold": ""},
            "does not",
        ),
        (
            SORT,
            {"text": "a", "label": "fine"},
            r"label: 'fine' is not in the verbalizer \('bad', 'good'\)",
        ),
        (SORT, {"text": "a", "label": None}, "label is null"),
        (
            SPAN,
            {"context": "a b", "answers": {}},
            "references: answers.text is not there; mend the row",
        ),
        (SPAN, {"context": "a b", "answers": {"text": []}}, "no gold answer"),
        (SPAN, {"context": "a b", "answers": {"text": [""]}}, "'' does not stand in context"),
        (SPAN, {"context": "a b", "answers": {"text": ["c"]}}, "'c' does not stand in context"),
        (
            {**SPAN, "start": "answers.at"},
            {"context": "a b", "answers": {"text": ["b"], "at": [1]}},
            "'b' does not stand at character 1 of context",
        ),
        (
            {**SPAN, "start": "answers.at"},
            {"context": "a b", "answers": {"text": ["b"], "at": ["x"]}},
            "start: 'x' is no character offset",
        ),
        (NAMES, {"tokens": ["a"], "tags": []}, "1 tokens but 0 tags"),
        (NAMES, {"tokens": ["a"], "tags": ["B-ORG"]}, "the tag 'B-ORG' is none of O, B-TYPE"),
        (NAMES, {"tokens": ["a"], "tags": ["PER"]}, "the tag 'PER' is none of"),
        (NAMES, {"tokens": ["a;b"], "tags": ["B-PER"]}, "cannot be told apart; change spans.join"),
        (NAMES, {"tokens": ["none"], "tags": ["B-PER"]}, r"change spans.join or spans.none"),
    ],
)
def test_a_bad_row_is_one_line_with_its_cure(fields, row, problem):
    with pytest.raises(RowError, match=problem) as error:
        make(fields).questions(row)
    one_line(error)


def test_an_unknown_label_lists_only_a_few_of_many():
    template = make(SORT, verbalizer={f"label{n}": [f"word{n}"] for n in range(77)})
    with pytest.raises(RowError, match=r"\('label0', .*'label7', \.\.\.\)"):
        template.questions({"text": "", "label": "x"})


@pytest.mark.parametrize(("value", "label"), [(0, "0"), (1.0, "1"), ("1", "1"), (" 0 ", "0")])
def test_integer_labels_are_read_as_their_text(value, label):
    template = make(SORT, verbalizer={"0": ["bad"], "1": ["good"]})
    assert first(template, {"text": "", "label": value}).label == label


@pytest.mark.parametrize("value", [2, 0.5, True, "", "01", float("nan"), [0]])
def test_values_that_are_no_class_are_none(value):
    assert make(SORT, verbalizer={"0": ["bad"], "1": ["good"]}).read_class(value) is None


def test_columns_are_renamed_and_the_command_line_wins(tmp_path):
    file = tmp_path / "task.yaml"
    make(ASK, columns={"text": "review"}).save(file)
    row = {"review": "mapped", "title": "other", "gold": "g"}
    for columns, text in [(None, "mapped"), ({"text": "title"}, "other")]:
        template = PromptTemplate.load(str(file), columns=columns)
        assert template.prompt(first(template, row)) == f"Q: {text}"


@pytest.mark.parametrize("column", ["question", "type", "first", "reference", "word"])
def test_a_column_may_bear_the_name_of_a_variable_of_another_form(column):
    template = make(ASK, prompt="{{ " + column + " }}")
    assert template.missing_columns({"gold": "g"}) == [column]
    assert template.prompt(first(template, {column: "a", "gold": "g"})) == "a"


def test_rows_to_predict_need_no_answer():
    for fields in (ASK, SORT, SPAN, NAMES, PAIR):
        row = {"text": "a", "context": "a", "tokens": ["a", "b"]}
        for question in make(fields).questions(row, answers=False):
            assert question.answer is None
            assert question.target is None
            assert question.label is None


def test_a_row_that_brings_its_answer_is_scored_in_prediction_too():
    question = first(make(ASK), {"text": "a", "gold": "g"}, answers=False)
    assert question.references == ("g",)


# Forms


def test_a_class_has_one_candidate_per_word_and_trains_on_the_first():
    question = first(make(SORT), {"text": "a", "label": "bad"})
    assert question.candidates == {"bad": (" terrible", " really bad"), "good": (" great",)}
    assert question.answer == " terrible"


def test_a_pair_that_names_the_word_is_asked_once_per_class():
    questions = make(PAIR, yes=" {{ 'right' }}", no=" wrong").questions(
        {"text": "a", "label": "good"}
    )
    assert [(one.asked, one.answer) for one in questions] == [("bad", " wrong"), ("good", " right")]
    assert make(PAIR).pair(questions[1]) == ("a", "It is great.")
    assert make(PAIR).prompt(questions[0]) == "a\nIt is terrible."


def test_a_pair_s_question_stands_last_unless_a_prompt_says_otherwise():
    template = make(PAIR, question="{{ second|upper }} So?")
    assert template.prompt(first(template, {"text": "a", "label": "bad"})) == (
        "a\nIt is terrible.\nIT IS TERRIBLE. So?"
    )


def test_phrasings_ask_the_same_question_in_other_words():
    template = make(without(ASK, "prompt"), prompts=["A {{ text }}", "B {{ text }}"])
    question = first(template, {"text": "x", "gold": "g"})
    assert [template.prompt(question, number) for number in (0, 1)] == ["A x", "B x"]


def test_the_rationale_stands_before_the_answer():
    template = make(ASK, rationale={"text": " {{ why }}", "join": " So"})
    question = first(template, {"text": "a", "why": "since", "gold": "b"})
    assert question.target == " since So b"
    assert question.answer == " b"
    assert template.missing_columns({"text": "a", "gold": "b"}) == ["why"]


def test_the_system_text_is_empty_without_one():
    assert make(ASK).system(first(make(ASK), {"text": "a", "gold": "b"})) == ""


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("hello", "turn 1 is no {role, content}; convert the conversation"),
        ([{"from": "human", "value": "x"}], "turn 1 is no {role, content}"),
        ([{"role": "bot", "content": "x"}], "turn 1 has the role 'bot'; use system, user"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}],
            "turn 2 is empty",
        ),
        ([{"role": "user", "content": None}], "turn 1 is empty"),
        ([{"role": "user", "content": "x"}], "no assistant turn, so nothing to learn"),
        ([], "no assistant turn, so nothing to learn"),
    ],
)
def test_a_conversation_that_cannot_be_learned_says_why(turns, problem):
    template = make({"name": "task", "form": "generative", "messages": "chat"})
    with pytest.raises(RowError, match=re.escape(problem)) as error:
        template.questions({"chat": turns})
    assert one_line(error).startswith("chat: ")


# Entities

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def naive_entities(tokens, tags):
    """The same, read entity by entity: each start is followed to its end."""
    found = []
    for i, tag in enumerate(tags):
        kind = tag[2:]
        before = tags[i - 1][2:] if i else ""
        if tag == "O" or (tag[0] == "I" and before == kind):
            continue
        j = i + 1
        while j < len(tags) and tags[j] == f"I-{kind}":
            j += 1
        start = sum(len(token) + 1 for token in tokens[:i])
        text = " ".join(tokens[i:j])
        found.append((kind, text, start, start + len(text)))
    return found


@given(st.lists(st.tuples(st.text(max_size=4), st.sampled_from(TAGS)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_bio_tags_read_as_the_naive_reading_does(pairs):
    tokens, tags = [token for token, _ in pairs], [tag for _, tag in pairs]
    found = read_entities(tokens, tags, {"PER": [], "LOC": []})
    assert found == naive_entities(tokens, tags)
    sentence = " ".join(tokens)
    assert all(sentence[start:end] == text for _, text, start, end in found)


def test_each_type_is_asked_and_none_stands_for_no_entity():
    template = make(NAMES)
    row = {"tokens": ["Ada", "met", "Bo", "Li"], "tags": ["B-PER", "O", "B-PER", "I-PER"]}
    person, place = template.questions(row)
    assert template.prompt(person) == "Ada met Bo Li person?"
    assert person.answer == " Ada; Bo Li"
    assert person.spans == ((0, 3), (8, 13))
    assert (place.answer, place.references, place.spans) == (" none", (), ())


@pytest.mark.parametrize(
    ("answer", "entities"),
    [
        (" Ada; Bo Li", ["Ada", "Bo Li"]),
        ("Ada;Bo Li ;", ["Ada", "Bo Li"]),
        (" none ", []),
        ("", []),
        (None, []),
        ("none; Ada", ["none", "Ada"]),
    ],
)
def test_entities_are_read_from_an_answer(answer, entities):
    assert make(NAMES).read_spans(answer) == entities


def test_entities_may_be_joined_by_line_breaks():
    template = make(NAMES, spans={**NAMES["spans"], "join": "\n"})
    assert template.read_spans(" Ada\nBo Li") == ["Ada", "Bo Li"]


# Reading answers


@pytest.mark.parametrize(
    ("stop", "extract", "generated", "answer"),
    [
        ([], [], " yes \n", "yes"),
        ([], [], "", ""),
        (["\n"], [], " yes\nno", "yes"),
        (["\n", "."], [], " a. b\nc", "a"),
        ([".", "\n"], [], " a\nb. c", "a"),
        (["\n"], [], "\nno", ""),
        ([], [r"is (\d+)"], "is 1, is 2", "2"),
        ([], [r"\d+"], "1 or 2", "2"),
        ([], [r"is (\d+)", r"\d+"], "3, is 1, 2", "1"),
        ([], [r"is (\d+)", r"\d+"], "1 or 2", "2"),
        ([], [r"is (\d+)"], "no number", None),
        (["Q:"], [r"is (\d+)"], "is 1\nQ: is 2", "1"),
        (["Q:"], [r"is (\d+)"], "Q: is 2", None),
        ([], [r"is (\d+)|(none)"], "is 1 or none", "none"),
        ([], [r"(x)?yes"], "yes", "yes"),
        ([], [r"is( \w+)"], "it is so", "so"),
    ],
)
def test_an_answer_is_cut_and_extracted(stop, extract, generated, answer):
    assert make(ASK, stop=stop, extract=extract).read_answer(generated) == answer


@given(st.text("ab\nQ:", max_size=20))
@quick
def test_an_answer_never_holds_a_stop(generated):
    answer = make(ASK, stop=["\n", "Q:"]).read_answer(generated)
    assert "\n" not in answer
    assert "Q:" not in answer
    assert generated.lstrip(" ").startswith(answer)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("great", "good"),
        (" Great. ", "good"),
        ("REALLY BAD", "bad"),
        ("great film", None),
        ("good", None),
        ("", None),
        (None, None),
    ],
)
def test_a_label_is_read_from_its_words(answer, label):
    assert make(SORT).read_label(answer) == label
