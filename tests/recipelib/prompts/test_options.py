"""Options that differ from row to row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_fields import make, one_line, without

from recipelib.prompts.options import read_options
from recipelib.prompts.values import RowError
from recipelib.runtime import UserError

CHOOSE = {
    "name": "task",
    "form": "generative",
    "prompt": "Q: {{ text }}",
    "options": "choices",
    "label": "gold",
}
LETTERS = {"A": "red", "B": "blue"}


@pytest.mark.parametrize(
    "texts",
    [
        ["red", "blue"],
        ("red", " blue\n"),
        {"A": "red", "B": "blue"},
        {"text": ["red", "blue"], "label": ["A", "B"]},
        [{"label": "A", "text": "red"}, {"label": "(B)", "text": "blue"}],
        '["red", "blue"]',
        '{"A": "red", "B": "blue"}',
        ["red", "blue", None, "  "],
    ],
)
def test_options_are_read_from_all_that_data_sets_write(texts):
    assert read_options(texts).texts == LETTERS


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("B", "B"),
        (" (b) ", "B"),
        ("B.", "B"),
        (1, "B"),
        (1.0, "B"),
        ("1", "B"),
        ("blue", "B"),
        (" Blue.", "B"),
        ([0, 1], "B"),
        ([1.0, 0.0], "A"),
        (0, "A"),
    ],
)
def test_the_right_option_is_named_by_letter_index_text_or_score(value, right):
    assert read_options(["red", "blue"]).right(value) == right


@pytest.mark.parametrize("value", ["C", 2, -1, "green", "", [1, 1], [0, 1, 0], True, 0.5])
def test_what_names_no_option_is_an_error_that_shows_them(value):
    with pytest.raises(RowError, match=r"A \('red'\), B \('blue'\)"):
        read_options(["red", "blue"]).right(value)


def test_a_number_that_is_an_index_and_a_text_is_an_error_until_the_options_are_named():
    with pytest.raises(RowError, match=r"options\.names"):
        read_options(["4", "2", "1"]).right("1")
    assert read_options(["4", "2", "1"]).right(1) == "B"  # a number is an index
    assert read_options(["4", "2", "1"], ["1", "2", "3"]).right("1") == "1"
    assert read_options(["4", "2", "1"]).right("4") == "A"


def test_an_empty_option_keeps_its_place_and_cannot_be_right():
    options = read_options(["red", "", "blue"])
    assert options.texts == {"A": "red", "C": "blue"}
    assert options.right(2) == "C"
    with pytest.raises(RowError, match="empty option"):
        options.right(1)


@pytest.mark.parametrize(
    ("texts", "names", "said"),
    [
        ("red, blue", None, "split"),
        ("[red]", None, "JSON"),
        (["red"], None, "at least two"),
        ([], None, "at least two"),
        (["red", "blue"], ["A"], "name"),
        (["red", "blue"], ["A", "(A)"], "same name"),
        ({"text": ["red", "blue"]}, None, "'label'"),
        ([{"text": "red", "label": "A"}, "blue"], None, "'label'"),
        (list("x" * 27), None, "name"),
    ],
)
def test_what_is_no_options_is_one_line(texts, names, said):
    with pytest.raises(RowError, match=said):
        read_options(texts, names)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"options": {"text": "choices"}}, "options.text: unknown key"),
        ({"options": {"names": ["1", "2"]}}, "options.texts: is missing"),
        ({"options": ["a b"]}, "'columns'"),
        ({"options": {"texts": 3}}, "expression"),
        ({"options": "choices["}, "options.texts"),
        ({"options": "choices.__class__"}, "options.texts"),
        ({"verbalizer": {"a": "b"}}, "verbalizer"),
        ({"metric": "macro_f1"}, "accuracy"),
        ({"form": "inference", "first": "a", "second": "b"}, "generative"),
    ],
)
def test_a_template_s_options_are_checked(more, said):
    with pytest.raises(UserError) as error:
        make(CHOOSE, **more)
    assert said in one_line(error)


def test_options_need_a_label():
    with pytest.raises(UserError) as error:
        make(without(CHOOSE, "label"))
    assert one_line(error).startswith("task.yaml: label: is missing")


def test_columns_make_options_and_a_prompt_can_show_them():
    shown = "{% for one in options %}{{ one.letter }}) {{ one.text }}\n{% endfor %}{{ text }}?"
    template = make(CHOOSE, prompt=shown, options=["a", "b", "c"], answer=" {{ letter }}")
    row = {"text": "Which", "a": "red", "b": "blue", "c": None, "gold": "blue"}
    (question,) = template.questions(row)
    assert template.prompt(question) == "A) red\nB) blue\nWhich?"
    assert (question.label, question.answer) == ("B", " B")
    assert template.missing_columns({"text": 1, "a": 1, "gold": 1}) == ["b", "c"]
    (asked,) = template.questions({key: row[key] for key in "abc"} | {"text": ""}, answers=False)
    assert asked.label is None
    assert asked.candidates == question.candidates


def test_a_column_of_the_name_options_can_be_their_source():
    template = make(CHOOSE, prompt="{{ text }} {{ options[1].text }}", options="options")
    row = {"text": "Q", "options": ["red", "blue"], "gold": 1}
    (question,) = template.questions(row)
    assert template.prompt(question) == "Q blue"
    assert template.content_variables == {"text"}


def test_of_options_that_say_the_same_the_first_is_right():
    row = {"text": "Q", "choices": ["red", "blue", "red"], "gold": "C"}
    assert make(CHOOSE).questions(row)[0].label == "A"


@pytest.mark.parametrize(
    ("written", "letters", "word"),
    [
        ("a blue one, not B", ["red", "blue"], "blue"),
        ("It is (B), a red one", ["red", "blue"], "B"),
        ("deep blue sea", ["blue", "deep blue"], "deep blue"),
        ("neither", ["red", "blue"], None),
    ],
)
def test_what_a_model_writes_is_read_as_a_letter_or_a_text(written, letters, word):
    template = make(CHOOSE)
    (question,) = template.questions({"text": "Q", "choices": letters, "gold": 0})
    assert template.first_word(written, question) == word


@given(
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=26, unique=True),
    data=st.data(),
)
def test_a_letter_or_an_index_finds_its_option_whatever_the_texts_say(texts, data):
    place = data.draw(st.integers(0, len(texts) - 1))
    options = read_options(texts)
    assert list(options.texts) == [chr(ord("A") + at) for at in range(len(texts))]
    assert options.right(place) == options.right(chr(ord("A") + place))
    assert options.texts[options.right(place)] == texts[place].strip()
