"""What is trained is exactly the answer, what is cut is only what may be, and every row is counted:
over all forms, renderings and kinds of tokenizer.
"""

import copy
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


def budgets(least, most):
    """From a little less than what must stay to all."""
    return st.integers(max(1, min(least, most) - 2), max(1, most))


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
    max_length = data.draw(budgets(least, len(whole)))
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


@pytest.mark.parametrize("name", MASKED)
@given(data=st.data(), masks=st.integers(1, 3))
@settings(max_examples=30)
def test_a_cloze_fits_with_all_its_masks_or_is_refused(name, data, masks):
    form = data.draw(st.sampled_from(["class", "pair"]))
    texts, mask = hostile_text(tokenizer_for(name)), tokenizer_for(name).mask_token_id
    encoder = limited(encoder_for(form, name), ROOMY)
    question = data.draw(asked(form, texts, long(texts)))
    whole = encoder.cloze(question, masks)[0]
    least = len(encoder.cloze(smallest(encoder, question), masks)[0])
    max_length = data.draw(budgets(least, len(whole)))

    try:
        ids, places, prompt = limited(encoder, max_length).cloze(question, masks)
    except DoesNotFit as error:
        message_of(error)
        assert least > max_length
        return

    assert len(ids) <= max_length
    assert places == [place for place, index in enumerate(ids) if index == mask]
    assert len(places) == masks
    before, after = encoder.template.cloze(prompt.question, "\0\0mask").split("\0\0mask")
    assert ids == encoder.text.cloze(before, after, masks)[0] == prompt.ids
    check_cut(encoder, question, prompt.question)
    assert prompt.shortened == (len(whole) > max_length)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=30)
def test_a_sentence_pair_fits_with_its_frame_or_is_refused(name, data):
    form = data.draw(st.sampled_from(["pair", "each"]))
    texts = hostile_text(tokenizer_for(name))
    encoder = limited(encoder_for(form, name), ROOMY)
    question = data.draw(asked(form, texts, long(texts)))
    whole = encoder.pair(question)[0]
    least = len(encoder.pair(smallest(encoder, question))[0])
    max_length = data.draw(budgets(least, len(whole)))

    try:
        ids, types, prompt = limited(encoder, max_length).pair(question)
    except DoesNotFit as error:
        message_of(error)
        assert least > max_length
        return

    assert len(ids) == len(types) <= max_length
    first, second = encoder.template.pair(prompt.question)
    assert (ids, types) == encoder.text.pair(first, second)
    check_cut(encoder, question, prompt.question)
    assert prompt.shortened == (len(whole) > max_length)


SEVERAL = {
    "form": "generative",
    "answer": " x",
    "shorten": {"a": "right", "b": "left", "c": "right"},
}


def several(encoder_length, prompt="{{ a }}\n{{ b }}\n{{ c }}", **fields):
    fields = {"name": "several", "prompt": prompt, **SEVERAL, **fields}
    return PromptEncoder(PromptTemplate(fields), tokenizer_for("bert"), encoder_length)


def words(count, start=0):
    """As many tokens of the small WordPiece vocabulary."""
    known = [word for word in WORDS if len(tokenizer_for("bert").tokenize(word)) == 1]
    return " ".join(known[(start + number) % len(known)] for number in range(count))


def lengths(question, fields="abc"):
    return [len(question.variables[field].split()) for field in fields]


@given(st.tuples(*[st.integers(0, 40)] * 3), st.integers(4, 120))
def test_the_longest_field_is_cut_first(counts, max_length):
    encoder = several(max_length)
    row = {field: words(count, count) for field, count in zip("abc", counts, strict=True)}
    (question,) = encoder.template.questions(row)
    budget = max_length - len(encoder.text.prefix) - len(encoder.answer(" x")) - 1

    kept = lengths(encoder.training_example(question)[2].question)

    assert sum(kept) == min(sum(counts), budget)
    cut = [left for left, count in zip(kept, counts, strict=True) if left < count]
    assert all(max(kept) - left <= 1 for left in cut)


def test_long_fields_are_cut_in_a_few_steps():
    encoder = several(50)
    (question,) = encoder.template.questions({"a": words(3000), "b": words(3000), "c": words(2999)})
    rendered, asks = [], encoder.template.prompt
    encoder.template.prompt = lambda *given: rendered.append(given) or asks(*given)

    kept = encoder.training_example(question)[2]

    assert sum(lengths(kept.question)) == 50 - len(encoder.text.prefix) - 2
    assert len(rendered) < 20


def test_a_field_that_a_phrasing_lacks_does_not_slow_the_cutting_of_the_others():
    encoder = several(50, prompt="{{ a }}{% if not b %}{{ c }}{% endif %}")
    (question,) = encoder.template.questions({"a": words(60), "b": words(3000), "c": ""})
    rendered, asks = [], encoder.template.prompt
    encoder.template.prompt = lambda *given: rendered.append(given) or asks(*given)

    kept = encoder.training_example(question)[2]

    assert lengths(kept.question, "a") == [50 - len(encoder.text.prefix) - 2]
    assert len(rendered) < 30


# Extractive contexts


def span_question(before, answer, after, title="who"):
    row = {"context": before + answer + after, "title": title}
    row["answers"] = {"text": [answer], "start": [len(before)]}
    (question,) = template("span").questions(row)
    return question


def span_encoder(room, name="bert"):
    """An encoder with room for as many tokens of context, beside an empty title and the answer."""
    encoder = PromptEncoder(template("span"), tokenizer_for(name), ROOMY)
    rest = encoder.training_example(span_question("", "x", "", ""))[0]
    return limited(encoder, len(rest) - 2 + room)  # less the x of context and answer


def test_training_keeps_a_window_of_equal_sides_around_the_answer():
    question = span_question(words(50) + " ", "old town", " " + words(30), "")

    kept = span_encoder(20 + 2).training_example(question)[2].question

    (start, end) = kept.spans[0]
    context = kept.variables["context"]
    assert context[start:end] == "old town"
    assert lengths(kept, ["context"]) == [20]
    assert abs(len(context[:start].split()) - len(context[end:].split())) <= 1


@pytest.mark.parametrize(
    ("before", "after"), [(" " * 90, " " + words(20)), (words(20) + " ", " " * 90)]
)
def test_white_space_on_one_side_does_not_keep_the_other_from_being_cut(before, after):
    question = span_question(before, "town", after, "")

    kept = span_encoder(5 + 1).training_example(question)[2].question

    assert lengths(kept, ["context"]) == [5]
    assert "town" in kept.variables["context"]


def test_where_a_context_is_cut_to_its_answer_the_other_fields_are_cut_on():
    question = span_question(words(3) + " ", words(12), " " + words(3), words(10))

    kept = span_encoder(12 + 12 + 4).training_example(question)[2].question

    assert kept.variables["context"].strip() == words(12)
    assert lengths(kept, ["title"]) == [4]


def test_an_answer_longer_than_the_budget_is_refused():
    question = span_question("", words(12), "", "")

    with pytest.raises(DoesNotFit) as error:
        span_encoder(12 + 11).training_example(question)

    assert "--max_length" in message_of(error)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=30)
def test_scoring_cuts_the_side_that_the_template_names_or_leaves_the_row_out(name, data):
    texts = hostile_text(tokenizer_for(name))
    encoder = limited(encoder_for(data.draw(st.sampled_from(["span", "entities"])), name), ROOMY)
    question = data.draw(asked(encoder.template.name, texts, long(texts)))
    field = encoder.template.context
    side, whole = encoder.template.shorten[field], question.variables[field]
    length = len(encoder.prompt(question, 5).ids)
    max_length = data.draw(st.integers(max(1, length // 2), length + 6))

    try:
        prompt = limited(encoder, max_length).prompt(question, 5)
    except DoesNotFit as error:
        message_of(error)
        return

    left = prompt.question.variables[field]
    assert whole.endswith(left) if side == "left" else whole.startswith(left)
    assert len(prompt.ids) + 5 + len(prompt.end) <= max_length
    check_cut(encoder, question, prompt.question)


def test_scoring_does_not_know_where_the_answer_is():
    end, start = (
        span_question(words(40) + " ", "town", "", ""),
        span_question("town", " ", words(40), ""),
    )

    assert lengths(span_encoder(9 + 5).prompt(start, 5).question, ["context"]) == [9]
    with pytest.raises(DoesNotFit) as error:
        span_encoder(9 + 5).prompt(end, 5)
    assert "cut out of the context" in message_of(error)


# Candidates

CANDIDATES = st.lists(
    st.lists(
        st.sampled_from(["insurance", "change", "a", "good", "12"]), min_size=1, max_size=3
    ).map(" ".join),
    min_size=2,
    max_size=6,
    unique=True,
)


@pytest.mark.parametrize("name", NAMES)
@given(texts=CANDIDATES, rendering=RENDERINGS)
@settings(max_examples=30)
def test_candidates_all_end_with_the_end_marker_where_one_begins_another(name, texts, rendering):
    verbalizer = {str(number): [text] for number, text in enumerate(texts)}
    encoder = encoder_for("class", name, rendering)
    (question,) = template("class", verbalizer=verbalizer).questions(
        {"kind": "", "title": "", "text": "", "text_end": "", "label": "0"}
    )
    plain = {
        label: [encoder.answer(f" {one}") for one in ones] for label, ones in verbalizer.items()
    }
    every = [ids for found in plain.values() for ids in found]
    begins = any(
        other[: len(one)] == one
        for place, one in enumerate(every)
        for other in every[:place] + every[place + 1 :]
    )

    found = encoder.candidates(question, [7, 8])

    ended = {label: [[*ids, 7, 8] for ids in ones] for label, ones in plain.items()}
    assert found == (ended if begins else plain)


def test_insurance_and_insurance_change_are_told_apart_by_their_end():
    encoder = limited(encoder_for("class", "bundled"), ROOMY)
    row = {"kind": "", "title": "", "text": "", "text_end": "", "label": "2"}
    (question,) = encoder.template.questions(row)

    found = encoder.candidates(question, encoder.text.end)

    tokenizer = tokenizer_for("bundled")
    read = {label: [tokenizer.decode(ids) for ids in words] for label, words in found.items()}
    assert read["2"] == [" insurance<|im_end|>", " insurance change<|im_end|>"]
    assert read["1"] == [" great<|im_end|>"]


# Conversations


def turns(roles, contents):
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def one_question(encoder, messages):
    (question,) = encoder.template.questions({"messages": messages})
    return question


def supervised_runs(labels):
    """The labels of each unbroken stretch that is supervised."""
    runs, before = [], IGNORED
    for label in labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


@pytest.mark.parametrize("chat_template", TRL_TEMPLATES)
@given(contents=st.lists(plain_text(min_words=3), min_size=4, max_size=4))
@settings(max_examples=3)
def test_every_answer_is_trained_in_one_example_unless_the_template_rewrites(
    chat_template, contents
):
    encoder = limited(chat_encoder(chat_template), ROOMY)
    messages, counts = turns(["user", "assistant"] * 2, contents), Counts()
    text, tokenizer = encoder.text, chat_tokenizer(chat_template)
    prompts = [text.chat_prompt(messages[:place]) for place in (1, 3)]
    targets = [
        text.chat_answer(messages[place]["content"]) + text.chat_end(messages[:place])
        for place in (1, 3)
    ]

    examples = encoder.conversation(one_question(encoder, messages), counts)

    assert [run for _, labels in examples for run in supervised_runs(labels)] == targets
    assert examples[-1][0] == prompts[1] + targets[1]
    first, second = (tokenizer.decode(ids) for ids in (prompts[0] + targets[0], prompts[1]))
    if not second.startswith(first):
        assert [ids for ids, _ in examples] == [
            prompt + target for prompt, target in zip(prompts, targets, strict=True)
        ]
    elif prompts[1][: len(prompts[0] + targets[0])] == prompts[0] + targets[0]:
        assert len(examples) == 1
    assert (counts.left_out, counts.shortened) == (0, 0)


@pytest.mark.parametrize(
    ("chat_template", "examples"),
    [
        *(("qwen2_5", 1), ("gemma4", 1), ("phi3", 1), ("cohere", 1), ("gemma", 1), ("lfm2", 1)),
        *(("qwen3_5_nothink", 2), ("gptoss", 2), ("glm4moe", 2), ("deepseekv3", 2)),
    ],
)
def test_templates_that_append_need_one_example_and_those_that_rewrite_one_per_answer(
    chat_template, examples
):
    encoder = limited(chat_encoder(chat_template), ROOMY)
    messages = turns(["user", "assistant"] * 2, ["Who wrote it?", "She did.", "When?", "In May."])

    found = encoder.conversation(one_question(encoder, messages), Counts())

    assert len(found) == examples


def expected_conversation(encoder, messages):
    """Each answer's (prompt, target, whether turns were dropped); None where it does not fit."""
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = messages[:place]
        system = [one for one in before[:1] if one["role"] == "system"]
        asks = [start for start, one in enumerate(before) if one["role"] == "user"]
        if not asks:
            yield None
            continue
        target = encoder.text.chat_answer(turn["content"]) + encoder.text.chat_end(before)
        windows = [before] + [system + before[start:] for start in asks]
        for window in windows:
            prompt = encoder.text.chat_prompt(window)
            if len(prompt) + len(target) <= encoder.max_length:
                yield prompt, target, window != before
                break
        else:
            yield None


@pytest.mark.parametrize("name", ["gpt2", "bundled", "xlmr"])
@given(data=st.data())
def test_a_conversation_drops_its_oldest_turns_and_keeps_its_system_turn(name, data):
    encoder = conversation_encoder(name)
    texts = hostile_text(tokenizer_for(name)).filter(str.strip)
    roles = data.draw(st.sampled_from([[], ["system"]]))
    some = st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=5)
    roles = [*roles, "user", *data.draw(some), "assistant"]
    messages = turns(roles, [data.draw(texts) for _ in roles])
    question = one_question(encoder, messages)
    found = encoder.conversation(question, Counts())
    longest = max((len(ids) for ids, _ in found), default=10)
    encoder.max_length = data.draw(st.integers(longest // 3, longest))
    counts = Counts()

    examples = encoder.conversation(question, counts)

    encoder, expected = encoder, list(expected_conversation(encoder, messages))
    kept = [one for one in expected if one]
    assert counts.left_out == len(expected) - len(kept)
    assert counts.shortened == sum(dropped for _, _, dropped in kept)
    assert all(len(ids) == len(labels) <= encoder.max_length for ids, labels in examples)
    assert [run for _, labels in examples for run in supervised_runs(labels)] == [
        target for _, target, _ in kept
    ]
    wholes = [prompt + target for prompt, target, _ in kept]
    assert [ids for ids, _ in examples] == [
        ids
        for place, ids in enumerate(wholes)
        if place + 1 == len(wholes) or kept[place + 1][2] or wholes[place + 1][: len(ids)] != ids
    ]


def conversation_encoder(name):
    return limited(_conversation_encoder(name), ROOMY)


@lru_cache
def _conversation_encoder(name):
    return PromptEncoder(PromptTemplate(CHAT), tokenizer_for(name), ROOMY)


# Rows


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


@pytest.mark.parametrize("form", ["class", "free", "pair", "each"])
def test_draws_depend_on_the_seed_and_the_number_of_the_row_only(form):
    encoder, some = limited(encoder_for(form, "gpt2"), ROOMY), many_rows(40)
    other = [{**row, "text": "something else"} for row in some[:20]] + some[20:]

    first, second = (encode_rows(encoder, rows, seed=3) for rows in (some, other))

    def of(encoded, number):
        pairs = zip(encoded.rows, encoded.examples, strict=True)
        return [example for row, example in pairs if row == number]

    assert all(of(first, number) == of(second, number) for number in range(20, 40))
    assert encode_rows(encoder, some, seed=3).examples == first.examples
    drawn = encode_rows(encoder, some, seed=4).examples != first.examples
    assert drawn == (form in ("free", "each"))


def test_every_phrasing_is_drawn():
    encoder, tokenizer = limited(encoder_for("free", "gpt2"), ROOMY), tokenizer_for("gpt2")
    encoded = encode_rows(encoder, many_rows(40))

    starts = Counter(tokenizer.decode(one["input_ids"])[:3] for one in encoded.examples)

    assert set(starts) == {"Do:", "tit"}
    assert min(starts.values()) > 8


def test_of_a_pair_per_candidate_the_right_one_and_as_many_wrong_ones_as_asked_are_trained():
    encoder, tokenizer = limited(encoder_for("each", "gpt2"), ROOMY), tokenizer_for("gpt2")
    encoded = encode_rows(encoder, many_rows(30))

    wrong = Counter()
    for number in range(30):
        pairs = zip(encoded.rows, encoded.examples, strict=True)
        texts = [tokenizer.decode(one["input_ids"]) for row, one in pairs if row == number]
        right = encoder.template.verbalizer[str(number % 3)][0]
        assert [f"about {right}." in text for text in texts] == [True, False, False]
        assert [" yes<" in text for text in texts] == [True, False, False]
        wrong.update(text.partition("about ")[2].partition(".")[0] for text in texts[1:])
        assert len(set(texts)) == 3
    assert len(wrong) == 4


@pytest.mark.parametrize("form", ["class", "free", "pair", "each"])
def test_counts_add_up(form):
    encoder, some = encoder_for(form, "gpt2"), many_rows(26)
    size = sorted(
        len(one["input_ids"]) for one in encode_rows(limited(encoder, ROOMY), some).examples
    )
    encoder.max_length = size[len(size) // 2]

    encoded = encode_rows(encoder, some)

    counts, examples = encoded.counts, encoded.examples
    assert counts.rows == 26
    assert counts.examples == len(examples) == len(encoded.rows)
    assert counts.examples + counts.left_out == 26 * (3 if form == "each" else 1)
    assert counts.tokens == sum(len(one["input_ids"]) for one in examples)
    labels = [label for one in examples for label in one["labels"]]
    assert len(labels) == counts.tokens
    assert counts.supervised_tokens == sum(label != IGNORED for label in labels)
    assert 0 < counts.shortened < counts.examples
    assert counts.dropped_demonstrations == 0


def test_rows_of_which_none_fits_are_refused():
    encoder = limited(encoder_for("class", "gpt2"), 5)

    message = refusal(lambda: encode_rows(encoder, many_rows(4)))

    assert message == "--max_length 5: no training row fits; raise it"


def test_conversations_count_examples_and_answers():
    encoder = conversation_encoder("gpt2")
    short = turns(["user", "assistant"] * 2, ["Hi", "Hello", "Bye", "So long"])
    far = turns(["user", "assistant", "user", "assistant"], [words(400), "one", "Hi", "two"])
    encoder.max_length = 100

    encoded = encode_rows(encoder, [{"messages": short}, {"messages": far}])

    assert encoded.rows == [0, 1]
    counts = encoded.counts
    assert (counts.rows, counts.examples, counts.shortened, counts.left_out) == (2, 2, 1, 1)


def test_progress_is_told_of_every_row():
    seen = []
    encode_rows(
        limited(encoder_for("class", "gpt2"), ROOMY),
        many_rows(3),
        progress=lambda rows: (seen.append(row) or row for row in rows),
    )

    assert seen == many_rows(3)


# What a user reads


def refusal(action):
    with pytest.raises(UserError) as error:
        action()
    return message_of(error)


def test_an_unknown_rendering_is_refused():
    message = refusal(lambda: PromptEncoder(template("class"), tokenizer_for("gpt2"), 9, "audio"))

    assert "--rendering audio" in message


def test_conversations_need_a_chat_template():
    tokenizer = copy.deepcopy(tokenizer_for("gpt2"))
    tokenizer.chat_template = None

    assert "chat template" in refusal(lambda: PromptEncoder(PromptTemplate(CHAT), tokenizer, 9))


def test_a_cloze_needs_its_text_and_one_mask():
    (question,) = template("free").questions(many_rows(1)[0])
    assert "cloze" in refusal(lambda: encoder_for("free", "bert").cloze(question, 1))

    twice = template("class", cloze="{{ mask }} {{ text }} {{ mask }}")
    encoder = PromptEncoder(twice, tokenizer_for("bert"), ROOMY)
    (question,) = twice.questions(many_rows(1)[0])
    assert "{{ mask }} once" in refusal(lambda: encoder.cloze(question, 1))


def test_data_cannot_pass_for_the_place_of_the_mask():
    row = {**many_rows(1)[0], "title": "\ufdd20\ufdd3", "text": "\ufdd21\ufdd3"}
    encoder = limited(encoder_for("class", "bert"), ROOMY)
    (question,) = encoder.template.questions(row)

    before, after = encoder.cloze_parts(question)

    assert (before, after) == ("\ufdd20\ufdd3 - \ufdd21\ufdd3 It was ", ", truly.")
