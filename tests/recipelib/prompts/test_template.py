"""Rows become texts as a template says, data stays data, and answers are read back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_fields import ASK, NAMES, PAIR, SORT, SPAN, first, make, one_line, without

from recipelib.prompts.template import PromptTemplate
from recipelib.prompts.values import RowError
from recipelib.runtime.errors import UserError

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


# Rows


@given(ANY_TEXT, ANY_TEXT.filter(str.strip))
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
            {"text": "a", "gold": "g"},
            "prompt: .*has no attribute 'b'",
        ),
        *(
            (ASK, {"text": "a", "gold": gold}, "gold is empty; give the answer, or leave the row")
            for gold in ("", " ")
        ),
        *(
            ({**ASK, **more}, {"text": 7, "gold": "g"}, "'int object' has no attribute 'strip'")
            for more in (
                {"system": "{{ text.strip() }}"},
                {"cloze": "{{ text.strip() }} {{ mask }}"},
            )
        ),
        (
            {**PAIR, "first": "{{ text.strip() }}", "prompt": "{{ text }} {{ second }}"},
            {"text": 7, "label": "bad"},
            "has no attribute 'strip'",
        ),
        (
            {**without(ASK, "prompt"), "prompts": ["{{ text }}", "{{ text.strip() }}"]},
            {"text": 7, "gold": "g"},
            "has no attribute 'strip'",
        ),
        ({**ASK, "prompt": "{{ text.keys }}"}, {"text": {}, "gold": "g"}, "keys is a method"),
        ({**ASK, "prompt": "{{ text + 1 }}"}, {"text": "a", "gold": "g"}, "prompt: .*does not fit"),
        (
            {**ASK, "prompt": "{{ 1 / text|int }}"},
            {"text": "", "gold": "g"},
            "prompt: .*does not fit",
        ),
        (
            {**ASK, "prompt": "{{ text|regex_replace(text) }}"},
            {"text": "(", "gold": "g"},
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


@pytest.mark.parametrize("label", [-1, "-1", -1.0])
def test_a_placeholder_for_a_label_is_none_where_none_is_needed(label):
    assert first(make(SORT), {"text": "", "label": label}, answers=False).label is None
    with pytest.raises(RowError, match="is not in the verbalizer"):
        make(SORT).questions({"text": "", "label": label})
    signs = make(SORT, verbalizer={"-1": ["bad"], "1": ["good"]})
    assert first(signs, {"text": "", "label": label}, answers=False).label == "-1"


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


# Entities


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


# Templates made of others

REASONED = {"rationale": {"text": " {{ why }}", "join": "\nSo:"}}
ROW = {"text": "1 + 1", "gold": "2", "label": "good", "why": "One more than one."}


def target(template, row=ROW) -> str:
    return first(template, row).target


def test_a_template_without_its_rationale_asks_for_the_bare_answer():
    template = make(ASK, **REASONED)
    assert target(template) == " One more than one.\nSo: 2"
    bare = template.without_rationale()
    assert target(bare) == " 2"
    assert (bare.rationale, bare.path, bare.name) == (None, template.path, template.name)
    assert target(template) == " One more than one.\nSo: 2"  # which stays as it is


@pytest.mark.parametrize(("fields", "answer"), [(ASK, " 2"), (SORT, " great")])
def test_a_rationale_behind_the_answer_is_one_text_with_it(fields, answer):
    template = make(fields, **REASONED).with_rationale_behind()
    assert target(template) == f"{answer}\nOne more than one."
    assert template.rationale is None


@pytest.mark.parametrize("change", ["without_rationale", "with_rationale_behind"])
def test_where_there_is_no_rationale_it_cannot_be_moved(change):
    with pytest.raises(UserError) as error:
        getattr(make(ASK), change)()
    assert one_line(error).startswith("task.yaml: rationale: is missing; say there where")


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "Be brief."), ({"system": "Do sums."}, "Do sums.\nBe brief.")]
)
def test_an_instruction_is_a_further_line_of_the_system_text(own, expected):
    template = make(ASK, **own).with_instruction("Be brief.")
    assert template.system(first(template, ROW)) == expected
    again = template.with_instruction("Be kind.")
    assert again.system(first(again, ROW)) == f"{expected}\nBe kind."


def test_a_further_stop_ends_an_answer_too():
    template = make(ASK, stop=["Q:"]).with_stop("\n")
    assert template.stop == ["\n", "Q:"]
    assert [template.read_answer(text) for text in ("2\n3", "2 Q: 3")] == ["2", "2"]


def test_columns_of_other_names_are_read_and_those_of_the_file_stay():
    template = make(ASK, columns={"text": "sum", "gold": "result"})
    changed = template.with_columns({"text": "question"})
    assert target(changed, {"question": "1 + 1", "result": "2", "sum": "no"}) == " 2"
    assert changed.prompt(first(changed, {"question": "1 + 1", "result": "2"})) == "Q: 1 + 1"
    assert template.with_columns({}) is template
    with pytest.raises(UserError, match=r"columns\.text: must name a column"):
        template.with_columns({"text": 1})


def test_what_was_changed_is_saved_with_the_template(tmp_path):
    template = make(ASK, **REASONED).with_instruction("Be brief.").with_stop("\n")
    template = template.with_rationale_behind().with_columns({"text": "sum"})
    template.save(tmp_path / "task.yaml")
    again = PromptTemplate.load(str(tmp_path / "task.yaml"))
    assert again.fields == template.fields
    row = {**ROW, "sum": "1 + 1"}
    assert (target(again, row), again.stop) == (target(template, row), ["\n"])
