"""A template reads data and nothing else, and grows no text without end."""

import json

import pytest
from template_fields import ASK, PAIR, SPAN, first, make, one_line

from recipelib.prompts import sandbox
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

HOSTILE_ROW = {"text": "ab", "key": "__class__", "items": [1, 2], "map": {"k": "v"}, "gold": "g"}


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
    assert message.endswith("what recipelib/prompts/sandbox.py allows")
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
        *(
            "{% set x = ['x'] %}" + "{% set x = [x, x, x, x] %}" * 20 + end
            for end in ("{{ x }}", "{{ x|upper }}", "{{ x|replace('x', '') }}", "{{ x ~ '' }}", "")
        ),
        "{% set x = ['x'] %}" + "{% set x = {1: x, 2: x} %}" * 40,
        "{% set x = ('x',) %}" + "{% set x = (x, x) %}" * 40,
        "{% set x = ['x'] %}" + "{% set x = [x, x] + [x, x] %}" * 20,
    ],
)
def test_no_chain_of_small_steps_grows_a_huge_text(source, monkeypatch):
    monkeypatch.setattr(sandbox, "_LONGEST", 100_000)  # to get there sooner
    with pytest.raises(UserError) as error:
        make(ASK, prompt=source).questions({"text": "a" * 10_000, "gold": "g"})
    assert one_line(error).startswith("task.yaml: prompt: ")


def test_ten_million_elements_are_the_most():
    source = "{% set x = ['x'] %}" + "{% set x = [x, x, x, x] %}" * 20
    with pytest.raises(UserError, match="a value of over 10,000,000 characters or elements"):
        make(ASK, prompt=source).questions({"text": "a", "gold": "g"})


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
        (
            "{% set a, b = 1, [2, 3] %}{{ a }}{{ b }}{% for c, d in [(4, 5)] %}{{ d }}{% endfor %}",
            "1[2, 3]5",
        ),
        ("{{ own.items }} {{ own.nothing }}{{ [own.nothing, 'a']|join }}.", "own a."),
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
        "own": {"items": "own", "nothing": None},
        "rows": [{"id": 7}, {"id": 8}],
        "gold": "g",
    }
    template = make(ASK, prompt=source, optional=["absent"])
    assert template.prompt(first(template, row)) == rendered
