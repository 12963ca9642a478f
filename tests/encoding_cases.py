"""A template of every form, rows for them, and prompts put together by hand: what the tests of
encoding, shortening and conversations share.
"""

from functools import lru_cache
from unittest import mock

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from tokenizers_for_tests import WORDS, chat_tokenizer, tokenizer_for

from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.encoding.tokens import TextEncoder
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

ROOMY = 100_000
LABELS = {"0": ["terrible", "really bad"], "1": ["great"], "2": ["insurance", "insurance change"]}

TEMPLATES = {
    "class": {
        "form": "generative",
        "system": "Judge the {{ kind }}.",
        "prompt": "Title: {{ title }}\nText: {{ text }}{{ text_end }}\nIt was",
        "cloze": "{{ title }} - {{ text }}{{ text_end }} It was {{ mask }}, truly.",
        "label": "label",
        "verbalizer": LABELS,
        "shorten": {"title": "left", "text": "right"},
    },
    "free": {
        "form": "generative",
        "prompts": ["Do: {{ text }}\n\n{{ title }}Answer:", "{{ title }}|||{{ text }} ->"],
        "answer": "{{ output }}",
        "rationale": {"text": " {{ reason }}", "join": "\nSo:"},
        "shorten": ["text"],
    },
    "span": {
        "form": "extractive",
        "prompt": "{{ context }}\n\nQuestion: {{ title }}\nAnswer:",
        "context": "context",
        "references": "answers.text",
        "start": "answers.start",
        "shorten": ["context", "title"],
    },
    "entities": {
        "form": "extractive",
        "prompt": "{{ sentence }}\nWhich {{ type }}?",
        "context": "sentence",
        "spans": {
            "tokens": "tokens",
            "tags": "tags",
            "types": {"PER": ["people"], "LOC": ["places"]},
            "join": " || ",
        },
        "shorten": {"sentence": "left"},
    },
    "pair": {
        "form": "inference",
        "first": "{{ text }}",
        "second": "{{ title }}",
        "question": "Does it follow?",
        "cloze": "{{ title }}? {{ mask }}, {{ text }}",
        "label": "label",
        "verbalizer": LABELS,
        "shorten": {"text": "right", "title": "left"},
    },
    "each": {
        "form": "inference",
        "system": "Be exact.",
        "first": "{{ text }}",
        "second": "{{ title }} It is about {{ word }}.",
        "negatives": 2,
        "label": "label",
        "verbalizer": {**LABELS, "3": ["music"]},
        "shorten": ["text"],
    },
}
CHAT = {"name": "chat", "form": "generative", "messages": "messages"}


def template(name, **changes):
    return PromptTemplate({"name": name, **TEMPLATES[name], **changes})


@lru_cache
def _shared_template(form):
    return template(form)


@lru_cache
def text_encoder(tokenizer, chat_template_kwargs=None):
    return TextEncoder(tokenizer, chat_template_kwargs)


def _encoder(template, tokenizer, rendering="text"):
    with mock.patch(
        "recipelib.encoding.prompt_encoder.TextEncoder", text_encoder
    ):  # made once per tokenizer
        return PromptEncoder(template, tokenizer, ROOMY, rendering)


@lru_cache
def encoder_for(form, name, rendering="text"):
    return _encoder(_shared_template(form), tokenizer_for(name), rendering)


@lru_cache
def chat_encoder(chat_template):
    return _encoder(PromptTemplate(CHAT), chat_tokenizer(chat_template))


def limited(encoder, max_length):
    """The encoder with another budget; they are shared, so each test sets it."""
    encoder.max_length = max_length
    return encoder


@st.composite
def rows(draw, form, texts, cut=None):
    """A row of a task, every field of it drawn from `texts`, those that may be cut from `cut`."""
    cut = texts if cut is None else cut
    row = {"kind": draw(texts), "title": draw(cut), "text": draw(cut), "text_end": draw(texts)}
    row |= {"output": draw(texts), "reason": draw(texts), "label": draw(st.sampled_from("012"))}
    if form == "span":
        before, answer, after = draw(cut), draw(texts.filter(bool)), draw(cut)
        row["context"] = before + answer + after
        row["answers"] = {"text": [answer], "start": [len(before)]}
    if form == "entities":
        tokens = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
        tokens[-1] = draw(texts) or "x"
        tags = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC"])
        row["tokens"], row["tags"] = tokens, [draw(tags) for _ in tokens]
    return row


def questions(form, row):
    """The questions of a row; entities that cannot be told apart are the template's to refuse."""
    try:
        return _shared_template(form).questions(row)
    except ValueError:
        assume(False)


@st.composite
def asked(draw, form, texts, cut=None):
    return draw(st.sampled_from(questions(form, draw(rows(form, texts, cut)))))


def demonstrations(texts):
    return st.lists(st.tuples(texts, texts), max_size=3)


def message_of(error):
    message = str(error.value if hasattr(error, "value") else error)
    assert message
    assert "\n" not in message
    return message


def prompt_ids(encoder, question, demonstrations, phrasing=0):
    """The ids of a prompt that nothing was cut from, put together by hand."""
    system, last = encoder.template.system(question), encoder.template.prompt(question, phrasing)
    if encoder.chat:
        turns = [{"role": "system", "content": system}] if system else []
        for one, answer in demonstrations:
            turns.append({"role": "user", "content": one})
            turns.append({"role": "assistant", "content": answer.strip()})
        return encoder.text.chat_prompt([*turns, {"role": "user", "content": last}])
    text = "\n\n".join([one + answer for one, answer in demonstrations] + [last])
    return encoder.text.text_prompt(f"{system}\n\n{text}" if system else text)


def refusal(action):
    with pytest.raises(UserError) as error:
        action()
    return message_of(error)


@lru_cache
def _conversation_encoder(name):
    return _encoder(PromptTemplate(CHAT), tokenizer_for(name))


def conversation_encoder(name):
    return limited(_conversation_encoder(name), ROOMY)


def turns(roles, contents):
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def one_question(encoder, messages):
    (question,) = encoder.template.questions({"messages": messages})
    return question


def words(count, start=0):
    """As many tokens of the small WordPiece vocabulary."""
    known = [word for word in WORDS if len(tokenizer_for("bert").tokenize(word)) == 1]
    return " ".join(known[(start + number) % len(known)] for number in range(count))


def many_rows(count):
    return [
        {
            **{
                "kind": "film",
                "title": f"title {number}",
                "text": words(number % 13),
                "text_end": "",
            },
            **{"output": "yes", "reason": words(3), "label": str(number % 3)},
        }
        for number in range(count)
    ]


FORMS = st.sampled_from(list(TEMPLATES))
RENDERINGS = st.sampled_from(["text", "chat"])
