"""Each shipped template on three rows, in the columns of the data set that it names: a typical one,
then awkward ones."""

import re
from dataclasses import dataclass

import pytest

from common.row_values import RowError
from common.schema import TEMPLATE_FOLDER
from common.template import PromptTemplate

FILES = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.yaml"))


@dataclass
class Case:
    """Three rows and what must come of them.

    `prompt`, `target` and `cloze` are the first row's first question's; `golds` holds each row's
    label, its references, its entities by type, or for conversations the number of turns.
    """

    rows: list[dict]
    golds: list
    prompt: str = ""
    target: str | None = None
    cloze: str = ""


def entailment(labels):
    return [
        {
            "premise": "Two dogs run on a beach.",
            "hypothesis": "Dogs are outside.",
            "label": labels[0],
        },
        {"premise": 'He said "no" {{ 7*7 }}.', "hypothesis": "He agreed.", "label": labels[1]},
        {"premise": "It rained.\nThen it stopped.", "hypothesis": "Très bien?", "label": labels[2]},
    ]


def answered(context, question, *answers):
    starts = [context.rindex(answer) for answer in answers]
    return {
        "id": "1",
        "title": "Title",
        "context": context,
        "question": question,
        "answers": {"text": list(answers), "answer_start": starts},
    }


def tagged(*pairs):
    tokens, tags = zip(*(pair.rsplit("/", 1) for pair in pairs), strict=True)
    return {"tokens": list(tokens), "ner_tags": list(tags)}


REVIEW = "The movie review is: A warm, witty film. It was [M]."
PASSAGES = Case(
    rows=[
        answered("Ada wrote the first program in 1843.", "Who wrote it?", "Ada", "Ada wrote"),
        # The gold answer is the second "1", which only the offset tells.
        answered("Room 1 costs 1.", " What does it cost?\n", "1"),
        answered("Der Fluß heißt «Spree».", "Which river?", "Spree»."),
    ],
    golds=[("Ada", "Ada wrote"), ("1",), ("Spree».",)],
    prompt="Ada wrote the first program in 1843.\n\nQuestion: Who wrote it?\nAnswer:",
    target=" Ada",
)

CASES = {
    "movie_reviews": Case(
        rows=[
            {"sentence": "A warm, witty film.", "label": "positive"},
            {"sentence": "Bloated.", "label": "negative"},
            {"sentence": "", "label": " negative "},
        ],
        golds=["positive", "negative", "negative"],
        prompt="The movie review is: A warm, witty film.\nIt was",
        target=" great",
        cloze=REVIEW,
    ),
    "sst2": Case(
        rows=[
            {"sentence": "A warm, witty film.", "label": 1},
            {"sentence": "one long string of cliches .", "label": 0.0},  # a column with gaps
            {"sentence": "it 's <mask> {{ text }}", "label": "1"},  # from a CSV file
        ],
        golds=["1", "0", "1"],
        prompt="The movie review is: A warm, witty film.\nIt was",
        target=" great",
        cloze=REVIEW,
    ),
    "trec": Case(
        rows=[
            {
                "text": "How far is it from Denver to Aspen ?",
                "coarse_label": "NUM",
                "fine_label": "x",
            },
            {"text": "What does `` NASA '' stand for ?", "coarse_label": "ABBR"},
            {"text": "Who?", "coarse_label": "HUM"},
        ],
        golds=["NUM", "ABBR", "HUM"],
        prompt=(
            "Question: How far is it from Denver to Aspen ?\n"
            "Does it ask for an abbreviation, an entity, a description, a person, a place or a "
            "number?\nIt asks for:"
        ),
        target=" number",
        cloze="How far is it from Denver to Aspen ? This question asks for: [M].",
    ),
    "rte": Case(
        rows=entailment(["entailment", "not_entailment", "not_entailment"]),
        golds=["entailment", "not_entailment", "not_entailment"],
        prompt=(
            "Text: Two dogs run on a beach.\nStatement: Dogs are outside.\n"
            "Does the statement follow from the text, yes or no?\nAnswer:"
        ),
        target=" yes",
        cloze='"Dogs are outside."? [M], "Two dogs run on a beach."',
    ),
    "esnli": Case(
        rows=[
            row | {"explanation_1": reason, "explanation_2": None}
            for row, reason in zip(
                entailment(["entailment", "contradiction", "neutral"]),
                [" A beach is outside . ", "The answer is yes would be a lie.", "Nobody can tell."],
                strict=True,
            )
        ],
        golds=["entailment", "contradiction", "neutral"],
        prompt=(
            "Premise: Two dogs run on a beach.\nHypothesis: Dogs are outside.\n"
            "If the premise is true, is the hypothesis true as well: yes, maybe or no?\nAnswer:"
        ),
        target=" A beach is outside .\nThe answer is yes",
        cloze='"Two dogs run on a beach."? [M], "Dogs are outside."',
    ),
    "gsm8k": Case(
        rows=[
            {
                "question": "A box holds 600 nails. How many do 3 hold?",
                "answer": "3 boxes hold 3*600 = <<3*600=1800>>1,800 nails.\n#### 1,800",
            },
            {"question": "How cold is it?", "answer": "It fell by <<2+3=5>>5.\n\nSo: -5\n#### -5"},
            {"question": "Half of 1?", "answer": "1/2 = <<1/2=0.5>>$0.5\n#### 0.5"},
        ],
        golds=[("1800",), ("-5",), ("0.5",)],
        prompt="Question: A box holds 600 nails. How many do 3 hold?\nAnswer:",
        target=" 3 boxes hold 3*600 = 1,800 nails.\nThe answer is 1800",
    ),
    "squad": PASSAGES,
    "xquad": PASSAGES,
    "wnut17": Case(
        rows=[
            tagged("Paris/B-location", "Hilton/B-person", "met/O", "Ed/B-person", "Lee/I-person"),
            # Two of a type side by side, one that I- begins, and a name with the usual separators.
            tagged("Rome/B-location", "Oslo/B-location", "M&amp;M/I-product", ",/I-product"),
            tagged("nothing/O", "here/O", "|/O"),
        ],
        golds=[
            {"location": ["Paris"], "person": ["Hilton", "Ed Lee"]},
            {"location": ["Rome", "Oslo"], "product": ["M&amp;M ,"]},
            {},
        ],
        prompt=(
            "Text: Paris Hilton met Ed Lee\nQuestion: Which companies does the text name? "
            "(Separated by ||; none if there are none.)\nAnswer:"
        ),
        target=" none",
    ),
    "banking77": Case(
        rows=[
            {"text": "Where is my new card?", "label": "card_arrival"},
            {"text": "Was this payment undone?", "label": "reverted_card_payment?"},
            {"text": "Still no refund\n", "label": "Refund_not_showing_up"},
        ],
        golds=["card_arrival", "reverted_card_payment?", "Refund_not_showing_up"],
        prompt="Customer: Where is my new card?\nThe customer's concern:",
        target=" card arrival",
        cloze="Where is my new card? My concern: [M].",
    ),
    "alpaca": Case(
        rows=[
            {"instruction": "Sort these.", "input": "b, a", "output": "a, b", "text": "unused"},
            {"instruction": "Say hello.", "input": "", "output": "Hello!\n\n### Hello"},
            {"instruction": "Say hello.", "output": " Hello! "},
        ],
        golds=[("a, b",), ("Hello!\n\n### Hello",), ("Hello!",)],
        prompt="### Instruction:\nSort these.\n\n### Input:\nb, a\n\n### Response:",
        target="\na, b",
    ),
    "conversations": Case(
        rows=[
            {
                "full_topic": "Travel",
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello! {{ 7*7 }}"},
                ],
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello!"},
                    {"role": "user", "content": "Bye"},
                ]
            },
            {"messages": [{"role": "assistant", "content": "I begin.\n"}]},
        ],
        golds=[2, 4, 1],
    ),
    "next_sentence": Case(
        rows=[
            {"text": "The striker scored twice.", "label": "Sports"},
            {"text": "A new chip\\is faster.", "label": "Sci/Tech"},
            {"text": "", "label": "World"},
        ],
        golds=["Sports", "Sci/Tech", "World"],
        prompt=(
            "The striker scored twice.\nThis article is about politics.\n"
            "Does the last sentence fit the article, yes or no?\nAnswer:"
        ),
        target=" no",
        cloze="The striker scored twice. This article is about [M].",
    ),
}
ASKED = sorted(set(CASES) - {"conversations"})
CLASSES = sorted(name for name, case in CASES.items() if isinstance(case.golds[0], str))
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
            assert template.read_label(answer) == question.label
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
