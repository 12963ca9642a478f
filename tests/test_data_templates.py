"""Each shipped template on the rows of template_cases.py."""

import re

import pytest
from template_cases import CASES, PASSAGES, tagged

from recipelib.prompts.schema import TEMPLATE_FOLDER
from recipelib.prompts.template import PromptTemplate
from recipelib.prompts.values import RowError

FILES = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.yaml"))
ASKED = sorted(set(CASES) - {"conversations"})
OPTIONS = ["arc", "commonsense_qa", "date_understanding", "hellaswag"]
CHOSEN = {name for name, case in CASES.items() if isinstance(case.golds[0], str)}
CLASSES = sorted(CHOSEN - set(OPTIONS))
ALL_ROWS = [(name, number) for name in ASKED for number in range(3)]


def load(name):
    return PromptTemplate.load(name)


def test_every_shipped_template_is_tested_here():
    assert sorted(CASES) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_template_says_what_it_is(name):
    template = load(name)
    header = re.match(r"(#.*\n)+", template.path.read_text(encoding="utf-8"))
    assert template.name == name
    assert template.description.endswith(("?", "."))
    assert template.dataset["path"]
    assert 1 <= header.group().count("\n") <= 3


@pytest.mark.parametrize("name", FILES)
def test_the_rows_bring_every_column_that_the_template_needs(name):
    template = load(name)
    for row in CASES[name].rows:
        assert template.missing_columns(row) == []


@pytest.mark.parametrize("name", ASKED)
def test_the_first_row_reads_exactly_so(name):
    template, case = load(name), CASES[name]
    question = template.questions(case.rows[0])[0]
    assert template.prompt(question) == case.prompt
    assert question.target == case.target
    assert template.cloze(question, "[M]") == case.cloze


@pytest.mark.parametrize(("name", "number"), ALL_ROWS)
def test_the_gold_answers_are_the_row_s(name, number):
    template, gold = load(name), CASES[name].golds[number]
    questions = template.questions(CASES[name].rows[number])
    if isinstance(gold, dict):
        assert {one.asked: list(one.references) for one in questions if one.references} == gold
        assert [one.asked for one in questions] == list(template.entity_spans["types"])
    elif isinstance(gold, str):
        assert {one.label for one in questions} == {gold}
    else:
        assert [one.references for one in questions] == [gold]


@pytest.mark.parametrize(("name", "number"), ALL_ROWS)
def test_the_gold_target_reads_back_as_the_gold_answer(name, number):
    template = load(name)
    for question in template.questions(CASES[name].rows[number]):
        answer = template.read_answer(question.target)
        if template.entity_spans:
            assert template.read_spans(answer) == list(question.references)
        elif template.asks_each_word:
            assert (answer == "yes") == (question.asked == question.label)
        elif template.label:
            assert template.read_label(answer, question) == question.label
        else:
            assert answer == question.references[0]


@pytest.mark.parametrize(("name", "number"), ALL_ROWS)
def test_spans_stand_in_the_context(name, number):
    template = load(name)
    for question in template.questions(CASES[name].rows[number]):
        found = [question.variables[template.context][a:b] for a, b in question.spans]
        assert found == list(question.references[: len(found)])
        assert bool(found) == (template.form == "extractive" and bool(question.references))


def test_a_span_is_found_by_its_offset_where_its_text_stands_twice():
    (question,) = load("squad").questions(PASSAGES.rows[1])
    assert question.spans == ((13, 14),)


@pytest.mark.parametrize(("name", "number"), ALL_ROWS)
def test_a_row_without_its_answer_is_asked_in_the_same_words(name, number):
    template = load(name)
    row = CASES[name].rows[number]
    asked = {k: v for k, v in row.items() if k in map(template.column, template.prompt_variables)}
    expected = [template.prompt(one) for one in template.questions(row)]
    questions = template.questions(asked, answers=False)
    assert [template.prompt(one) for one in questions] == expected
    assert all(one.answer is None and not one.references for one in questions)


@pytest.mark.parametrize("name", FILES)
def test_a_saved_template_asks_the_same(name, tmp_path):
    load(name).save(tmp_path / "template.yaml")
    saved = PromptTemplate.load(str(tmp_path / "template.yaml"))
    for row in CASES[name].rows:
        assert saved.questions(row) == load(name).questions(row)
    assert (saved.stop, saved.extract, saved.shorten) == (
        load(name).stop,
        load(name).extract,
        load(name).shorten,
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_classification_template_serves_every_method(name):
    template = load(name)
    assert template.metric == "accuracy"
    assert "cloze" in template.texts
    assert template.content_free
    assert template.shorten
    assert template.demonstrations["k"] > 0


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("filler", ["", "N/A"])
def test_content_free_inputs_can_be_asked(name, filler):
    template = load(name)
    question = template.questions(CASES[name].rows[0])[0]
    empty = question.change(**dict.fromkeys(template.shorten, filler))
    assert template.prompt(empty) != template.prompt(question)


@pytest.mark.parametrize("name", ASKED)
def test_prompt_and_answer_own_one_space_or_line_break_between_them(name):
    template = load(name)
    for row in CASES[name].rows:
        for question in template.questions(row):
            assert template.prompt(question)[-1:].strip()
            texts = [text for words in question.candidates.values() for text in words]
            for text in [question.target, *texts]:
                assert re.match(r"[ \n](\S|$)", text) or name == "alpaca"


@pytest.mark.parametrize("number", range(3))
def test_every_turn_of_a_conversation_stays_as_it_is(number):
    case = CASES["conversations"]
    (question,) = load("conversations").questions(case.rows[number])
    assert len(question.turns) == case.golds[number]
    assert list(question.turns) == case.rows[number]["messages"]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_the_row_s_and_stay_where_its_texts_are_emptied(name):
    template = load(name)
    for row in CASES[name].rows:
        (question,) = template.questions(row)
        assert len(question.candidates) == len(question.options.texts) >= 2
        assert question.answer == question.candidates[question.label][0]
        emptied = question.change(**dict.fromkeys(template.content_variables, "N/A"))
        assert template.prompt(emptied) != template.prompt(question)
        assert emptied.candidates == question.candidates


def test_next_sentence_asks_about_every_topic_and_says_yes_to_the_right_one():
    template = load("next_sentence")
    questions = template.questions(CASES["next_sentence"].rows[0])
    assert [(one.asked, one.answer) for one in questions] == [
        ("World", " no"),
        ("Sports", " yes"),
        ("Business", " no"),
        ("Sci/Tech", " no"),
    ]
    assert template.pair(questions[3]) == (
        "The striker scored twice.",
        "This article is about technology.",
    )
    assert questions[0].candidates == {"yes": (" yes",), "no": (" no",)}


def test_rte_is_asked_once_as_a_pair():
    template = load("rte")
    (question,) = template.questions(CASES["rte"].rows[0])
    assert not template.asks_each_word
    assert template.pair(question) == ("Two dogs run on a beach.", "Dogs are outside.")
    assert question.candidates == {"entailment": (" yes",), "not_entailment": (" no",)}


def test_banking77_has_its_77_intents_in_plain_words():
    verbalizer = load("banking77").verbalizer
    assert len(verbalizer) == 77
    for intent, (word,) in verbalizer.items():
        assert word.casefold() == intent.replace("_", " ").rstrip("?").casefold()


def test_xquad_asks_exactly_as_squad():
    squad, xquad = load("squad").fields, load("xquad").fields
    assert {key for key in squad | xquad if squad.get(key) != xquad.get(key)} == {"name", "dataset"}


@pytest.mark.parametrize(
    ("name", "columns", "row", "gold"),
    [
        (
            "trec",
            {"text": "question", "label": "label"},
            {"question": "Who?", "label": "HUM"},
            "HUM",
        ),
        (
            "banking77",
            {"label": "label_text"},
            {"text": "?", "label": 1, "label_text": "age_limit"},
            "age_limit",
        ),
    ],
)
def test_the_column_mapping_that_a_header_names_works(name, columns, row, gold):
    assert PromptTemplate.load(name, columns=columns).questions(row)[0].label == gold


@pytest.mark.parametrize(
    ("name", "generated", "answer"),
    [
        ("gsm8k", " 3*600 = 1,800.\nThe answer is $1,800.\n\nQuestion: 5?", "$1,800"),
        ("gsm8k", " so 2 nails.\nThe answer is: -2 nails", "-2"),
        ("gsm8k", " The answer is 7.\nQuestion: How many?\nAnswer: The answer is 9", "7"),
        ("gsm8k", " 2 and 3 make 5.", "5"),
        ("gsm8k", " The answer is −5.", "−5"),
        ("gsm8k", " The answer is .5.", ".5"),
        ("gsm8k", " The answer is 1/2.", "1/2"),
        ("gsm8k", " The answer is -$3.50", "-$3.50"),
        ("gsm8k", " The answer is $-3", "$-3"),
        ("gsm8k", " We have 48-24", "24"),
        ("gsm8k", " It is...42", "42"),
        ("gsm8k", " No idea", None),
        ("esnli", " Dogs bark.\nThe answer is Yes.", "Yes"),
        ("esnli", " No. It may be so, maybe", "maybe"),
        ("esnli", " Who knows", None),
        ("squad", " Ada\nQuestion: Who?", "Ada"),
        ("wnut17", " Rome || Oslo\n\nText: x", "Rome || Oslo"),
        ("alpaca", "\nHi\n\nthere\n\n### Instruction:\nMore", "Hi\n\nthere"),
    ],
)
def test_what_models_write_is_read(name, generated, answer):
    assert load(name).read_answer(generated) == answer


def test_an_entity_that_holds_the_separator_is_refused():
    row = tagged("a/B-group", "||/I-group", "b/I-group")
    with pytest.raises(RowError, match=r"cannot be told apart; change spans\.join"):
        load("wnut17").questions(row)


def test_a_squad_2_row_without_an_answer_is_refused():
    row = {**PASSAGES.rows[0], "answers": {"text": [], "answer_start": []}}
    with pytest.raises(RowError, match="no gold answer"):
        load("squad").questions(row)
