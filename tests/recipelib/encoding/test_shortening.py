"""Over the budget only what a template allows is cut, the longest field first, and never an answer
out of its context.
"""

import pytest
from encoding_cases import (
    FORMS,
    RENDERINGS,
    ROOMY,
    asked,
    demonstrations,
    encoder_for,
    limited,
    message_of,
    prompt_ids,
    template,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import MASKED, NAMES, hostile_text, tokenizer_for

from recipelib.encoding.prompt_encoder import IGNORED, DoesNotFit, PromptEncoder
from recipelib.prompts.template import PromptTemplate


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
@settings(max_examples=12)
def test_an_example_fits_or_is_refused_and_only_shortens_what_it_may(name, data):
    form, rendering = data.draw(FORMS), data.draw(RENDERINGS)
    texts = hostile_text(tokenizer_for(name))
    encoder = limited(encoder_for(form, name, rendering), ROOMY)
    question = data.draw(asked(form, texts, long(texts)))
    shown = data.draw(demonstrations(texts))
    whole, labels, roomy = encoder.training_example(question, shown)
    target = [label for label in labels if label != IGNORED]
    # The room that any class's answer needs, else a prompt's length would tell the class.
    needed = max(len(target), encoder.longest_candidate(question) + len(roomy.end))
    least = len(prompt_ids(encoder, smallest(encoder, question), [])) + needed
    most = len(roomy.ids) + needed
    max_length = data.draw(budgets(least, most))
    room = max_length - needed

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
    if most <= max_length:
        assert (ids, prompt) == (whole, roomy)
    if prompt.dropped:
        assert len(prompt_ids(encoder, question, shown[prompt.dropped - 1 :])) > room
    if prompt.shortened:
        assert prompt.dropped == len(shown)
        assert len(prompt_ids(encoder, question, [])) > room


@pytest.mark.parametrize("name", NAMES)
def test_a_shortened_prompt_is_the_one_that_is_scored_and_does_not_tell_the_class(name):
    words = {"0": "good", "1": "not to be recommended to anybody at all"}
    template = PromptTemplate(
        {
            "name": "uneven",
            "form": "generative",
            "prompt": "Review: {{ text }}\nVerdict:",
            "answer": " {{ word }}",
            "label": "label",
            "verbalizer": words,
            "shorten": ["text"],
        }
    )
    encoder = PromptEncoder(template, tokenizer_for(name), max_length=60)
    prompts = []
    for label in words:
        (question,) = template.questions({"text": "a film " * 50, "label": label})
        prompt = encoder.training_example(question)[2]
        assert prompt.shortened
        prompts.append(prompt.ids)
        reserve = encoder.longest_candidate(question)
        assert encoder.prompt(question, reserve).ids == prompt.ids
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("name", MASKED)
@given(data=st.data(), masks=st.integers(1, 3))
@settings(max_examples=12)
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


@pytest.mark.parametrize("name", MASKED)
@given(data=st.data(), masks=st.integers(1, 3))
@settings(max_examples=12)
def test_of_a_cloze_whole_demonstrations_go_first_and_none_brings_a_mask(name, data, masks):
    form = data.draw(st.sampled_from(["class", "pair"]))
    texts, mask = hostile_text(tokenizer_for(name)), tokenizer_for(name).mask_token_id
    encoder = limited(encoder_for(form, name), ROOMY)
    question, shown = data.draw(asked(form, texts, long(texts))), data.draw(demonstrations(texts))

    def by_hand(question, shown):
        before, after = encoder.cloze_parts(question)
        before = "\n\n".join([*(one + rest for one, rest in shown), before])
        return encoder.text.cloze(before, after, masks)[0]

    whole = by_hand(question, shown)
    least = len(by_hand(smallest(encoder, question), []))
    max_length = data.draw(budgets(least, len(whole)))

    try:
        ids, places, prompt = limited(encoder, max_length).cloze(question, masks, shown)
    except DoesNotFit as error:
        message_of(error)
        assert least > max_length
        return

    assert len(ids) <= max_length
    assert ids == by_hand(prompt.question, shown[prompt.dropped :]) == prompt.ids
    assert places == [place for place, index in enumerate(ids) if index == mask]
    assert len(places) == masks
    check_cut(encoder, question, prompt.question)
    if prompt.dropped:
        assert len(by_hand(question, shown[prompt.dropped - 1 :])) > max_length
    if prompt.shortened:
        assert prompt.dropped == len(shown)
        assert len(by_hand(question, [])) > max_length


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12)
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


def test_only_text_is_cut():
    encoder = several(12, prompt="{% for one in a %}{{ one }} {% endfor %}{{ b }}\n{{ c }}")
    (question,) = encoder.template.questions({"a": ["good"] * 3, "b": 123, "c": words(40)})

    kept = encoder.training_example(question)[2].question

    assert (kept.variables["a"], kept.variables["b"]) == (["good"] * 3, 123)
    assert 0 < len(kept.variables["c"].split()) < 10


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
    ("before", "after"),
    [(" " * 500, " " + words(20)), (words(20) + " ", " " * 500)],
    ids=["before", "after"],
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
@settings(max_examples=12)
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
