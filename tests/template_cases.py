"""For each shipped template three rows in the columns of the data set that it names, a typical one
and awkward ones, and what must come of them.
"""

from dataclasses import dataclass


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


REVIEW = "The movie review is: A warm, witty film. The sentiment of the review is [M]."
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
        prompt="The movie review is: A warm, witty film.\nThe sentiment of the review is",
        target=" positive",
        cloze=REVIEW,
    ),
    "sst2": Case(
        rows=[
            {"sentence": "A warm, witty film.", "label": 1},
            {"sentence": "one long string of cliches .", "label": 0.0},  # a column with gaps
            {"sentence": "it 's <mask> {{ text }}", "label": "1"},  # from a CSV file
        ],
        golds=["1", "0", "1"],
        prompt="The movie review is: A warm, witty film.\nThe sentiment of the review is",
        target=" positive",
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
    "word_problems": Case(
        rows=[
            {
                "question": "A box holds 16 nails. Tom has 3 boxes and uses 9. How many are left?",
                "rationale": "The boxes hold 3 x 16 = 48 nails. So 48 - 9 = 39 are left.",
                "answer": "39",
                "kind": "boxes",
            },
            # The reasoning uses the words that lead to the answer; the answer is no text.
            {"question": "2 + 2?", "rationale": " The answer is 2 + 2 = 4. ", "answer": 4},
            {
                "question": "600 more than 600?",
                "rationale": "600 + 600 = 1,200.",
                "answer": "1,200\n",
            },
        ],
        golds=[("39",), ("4",), ("1,200",)],
        prompt=(
            "Question: A box holds 16 nails. Tom has 3 boxes and uses 9. How many are left?\n"
            "Answer:"
        ),
        target=(" The boxes hold 3 x 16 = 48 nails. So 48 - 9 = 39 are left.\nThe answer is 39"),
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
            {
                "messages": [
                    {"role": "user", "content": " 你好 \n"},
                    {"role": "assistant", "content": "<think>\n"},
                ]
            },
        ],
        golds=[2, 4, 2],
    ),
    "commonsense_qa": Case(
        rows=[
            {
                "id": "a1",
                "question": "Where does milk stay fresh?",
                "question_concept": "milk",
                "choices": {"label": list("ABCDE"), "text": ["oven", "fridge", "x", "y", "z"]},
                "answerKey": "B",
            },
            {
                "question": "Q?",
                "choices": {"label": ["A", "B"], "text": ["a", "b"]},
                "answerKey": "A",
            },
            # From a CSV file, where lists are JSON text.
            {
                "question": " Why? ",
                "choices": '{"label": ["A", "B"], "text": ["so", "{{ 7*7 }}"]}',
                "answerKey": "b",
            },
        ],
        golds=["B", "A", "B"],
        prompt="Question: Where does milk stay fresh?\nAnswer:",
        target=" fridge",
        cloze="Where does milk stay fresh? [M].",
    ),
    "arc": Case(
        rows=[
            {
                "id": "a1",
                "question": "What melts?",
                "choices": {"text": ["ice.", "stone.", "wood."], "label": ["1", "2", "3"]},
                "answerKey": "1",
            },
            {
                "question": "Which is larger?",
                "choices": {"text": ["2", "1"], "label": ["A", "B"]},
                "answerKey": "A",
            },
            # As in the files of its authors: a list of options.
            {
                "question": "Which?",
                "choices": [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}],
                "answerKey": "B",
            },
        ],
        golds=["1", "A", "B"],
        prompt="Question: What melts?\nAnswer:",
        target=" ice.",
        cloze="What melts? [M]",
    ),
    "hellaswag": Case(
        rows=[
            {
                "ind": 4,
                "activity_label": "Removing ice",
                "ctx_a": "A man stands by a car. [step] He scrapes.",
                "ctx_b": "then, the man",
                "ctx": "unused",
                "endings": ["sings [substeps] loudly.", "drives off.", "sleeps.", "waits."],
                "label": "1",
            },
            {
                "activity_label": "X",
                "ctx_a": "",
                "ctx_b": "élan",
                "endings": ["a", "b"],
                "label": 0,
            },
            {
                "activity_label": "Y",
                "ctx_a": "It rains.",
                "ctx_b": "",
                "endings": ["a", "", None, "d"],  # what is empty is no option
                "label": "3",
            },
        ],
        golds=["B", "A", "D"],
        prompt="Removing ice: A man stands by a car. He scrapes. Then, the man",
        target=" drives off.",
    ),
    "date_understanding": Case(
        rows=[
            {
                "input": "It is 2 May 1999. What is tomorrow?\nOptions:\n(A) 05/03/1999\n(B) x",
                "target": "(A)",
            },
            {"input": "Now?\nOptions:\n(A) 1\n(B) 2\n(C) 3\n", "target": "(C)"},
            {"input": "Then?\nOptions:\n(A) 10\n(B) 1", "target": " B "},
        ],
        golds=["A", "C", "B"],
        prompt=(
            "Question: It is 2 May 1999. What is tomorrow?\n"
            "Options:\n(A) 05/03/1999\n(B) x\nAnswer:"
        ),
        target=" (A)",
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
