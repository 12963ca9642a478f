"""What is trained is exactly the answer, what is cut is only what may be, and every row is counted:
over all forms, renderings and kinds of tokenizer.
"""

import dataclasses
import math
import time
from collections import Counter
from functools import lru_cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import (
    MASKED,
    NAMES,
    TRL_TEMPLATES,
    WORDS,
    chat_tokenizer,
    hostile_text,
    markup_of,
    plain_text,
    tokenizer_for,
)

from common.encoding import IGNORED, Counts, DoesNotFit, PromptEncoder, encode_rows
from common.errors import UserError
from common.template import PromptTemplate

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
def encoder_for(form, name, rendering="text"):
    return PromptEncoder(template(form), tokenizer_for(name), ROOMY, rendering)


@lru_cache
def chat_encoder(chat_template):
    return PromptEncoder(PromptTemplate(CHAT), chat_tokenizer(chat_template), ROOMY)


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
        return template(form).questions(row)
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


FORMS = st.sampled_from(list(TEMPLATES))
RENDERINGS = st.sampled_from(["text", "chat"])


# Exactly the answer


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_exactly_the_answer_and_its_end_are_supervised(name, data):
    form, rendering = data.draw(FORMS), data.draw(RENDERINGS)
    tokenizer = tokenizer_for(name)
    texts = hostile_text(tokenizer)
    encoder = limited(encoder_for(form, name, rendering), ROOMY)
    question, shown = data.draw(asked(form, texts)), data.draw(demonstrations(texts))
    answer = question.target.strip() if rendering == "chat" else question.target

    ids, labels, prompt = encoder.training_example(question, shown)

    expected = [*encoder.text.encode(answer), *prompt.end]
    assert labels == [IGNORED] * (len(ids) - len(expected)) + expected
    assert ids == prompt.ids + expected
    assert tokenizer.decode(expected) == tokenizer.decode(labels[-len(expected) :])
    assert prompt.ids == prompt_ids(encoder, question, shown)
    assert prompt.ids == encoder.prompt(question, len(expected), shown).ids
    assert (prompt.shortened, prompt.dropped) == (False, 0)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25)
def test_a_harmless_example_is_what_the_tokenizer_makes_of_it(name, data):
    form = data.draw(FORMS)
    tokenizer, texts = tokenizer_for(name), plain_text(min_words=1)
    question = data.draw(asked(form, texts))
    encoder = limited(encoder_for(form, name), ROOMY)
    system, asks = encoder.template.system(question), encoder.template.prompt(question)

    ids, labels, _ = encoder.training_example(question)

    own = tokenizer(f"{system}\n\n{asks}" if system else asks)["input_ids"]
    prompt = own[: len(own) - len(encoder.text.suffix)]
    answer = tokenizer(question.target, add_special_tokens=False)["input_ids"]
    target = [*answer, tokenizer.eos_token_id]
    assert ids == prompt + target
    assert labels == [IGNORED] * len(prompt) + target


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_no_row_brings_markup(name, data):
    form, rendering = data.draw(FORMS), data.draw(RENDERINGS)
    tokenizer = tokenizer_for(name)
    texts = hostile_text(tokenizer)
    encoder = limited(encoder_for(form, name, rendering), ROOMY)
    question, shown = data.draw(asked(form, texts)), data.draw(demonstrations(texts))

    ids, _, prompt = encoder.training_example(question, shown)

    frame = encoder.text.prefix
    if rendering == "chat":
        roles = ["system"] if encoder.template.system(question) else []
        roles += ["user", "assistant"] * len(shown) + ["user"]
        frame = encoder.text.chat_prompt([{"role": role, "content": "a"} for role in roles])
    assert markup_of(tokenizer, ids) == markup_of(tokenizer, frame + prompt.end)


# Nothing but what may be cut

SHORT = ("title", "text", "context", "sentence")


def check_cut(encoder, question, kept):
    """What is left of each field is a part of it, from the side that the template says; a context
    keeps the answers.
    """
    for field, value in question.variables.items():
        left = kept.variables[field]
        side = encoder.template.shorten.get(field)
        if side is None or left == value:
            assert left == value
        elif field == encoder.template.context and question.spans:
            assert left in value
        elif side == "left":
            assert value.endswith(left)
        else:
            assert value.startswith(left)
    context = encoder.template.context
    for before, after in zip(question.spans, kept.spans, strict=True):
        whole, left = question.variables[context], kept.variables[context]
        assert left[slice(*after)] == whole[slice(*before)]


def smallest(encoder, question):
    """The question with everything cut that may be: a context down to its answers."""
    fields = dict.fromkeys(encoder.template.shorten, "")
    if question.spans:
        first, last = min(question.spans)[0], max(end for _, end in question.spans)
        text = question.variables[encoder.template.context]
        fields[encoder.template.context] = text[first:last]
    return question.change(**fields)


def long(texts):
    """Now and then a text that is far over any budget."""
    many = st.tuples(texts, st.integers(5, 60)).map(lambda drawn: drawn[0] * drawn[1])
    return st.one_of(texts, many, many)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_an_example_fits_or_is_refused_and_only_shortens_what_it_may(name, data):
    form, rendering = data.draw(FORMS), data.draw(RENDERINGS)
    texts = hostile_text(tokenizer_for(name))
    encoder = limited(encoder_for(form, name, rendering), ROOMY)
    question = data.draw(asked(form, texts, long(texts)))
    shown = data.draw(demonstrations(texts))
    whole, labels, roomy = encoder.training_example(question, shown)
    target = [label for label in labels if label != IGNORED]
    least = len(prompt_ids(encoder, smallest(encoder, question), [])) + len(target)
    max_length = data.draw(st.integers(max(1, min(least, len(whole)) - 2), len(whole)))
    room = max_length - len(target)

    try:
        ids, labels, prompt = limited(encoder, max_length).training_example(question, shown)
    except DoesNotFit as error:
        message_of(error)
        slack = 8 if question.spans else 0  # of words that the answer begins or ends in
        assert least + slack > max_length
        return

    assert len(ids) == len(labels) <= max_length
    assert labels == [IGNORED] * len(prompt.ids) + target
    assert ids == prompt_ids(encoder, prompt.question, shown[prompt.dropped :]) + target
    check_cut(encoder, question, prompt.question)
    assert prompt.shortened == (prompt.question != question)
    if len(whole) <= max_length:
        assert (ids, prompt) == (whole, roomy)
    if prompt.dropped:
        assert len(prompt_ids(encoder, question, shown[prompt.dropped - 1 :])) > room
    if prompt.shortened:
        assert prompt.dropped == len(shown)
        assert len(prompt_ids(encoder, question, [])) > room
