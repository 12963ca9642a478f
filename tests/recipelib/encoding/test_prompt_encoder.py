"""What is trained is exactly the answer, data stays text, and every row is counted: over all forms,
renderings and kinds of tokenizer.
"""

import copy
from collections import Counter

import pytest
from encoding_cases import (
    CHAT,
    FORMS,
    RENDERINGS,
    ROOMY,
    asked,
    demonstrations,
    encoder_for,
    limited,
    many_rows,
    prompt_ids,
    refusal,
    template,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import NAMES, hostile_text, markup_of, plain_text, tokenizer_for

from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import IGNORED, PromptEncoder
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

# Exactly the answer


@pytest.mark.parametrize("where", ["prompt", "answer", "system", "cloze"])
def test_a_control_token_in_a_templates_own_text_is_refused(where):
    fields = {
        "name": "chatty",
        "form": "generative",
        "prompt": "Say {{ text }}",
        "answer": " {{ said }}",
    }
    fields[where] = fields.get(where, "{{ mask }}") + " [MASK] it"
    chatty = PromptTemplate(fields, "chatty.yaml")
    assert PromptEncoder(chatty, tokenizer_for("xlmr"), 64)  # which has no such token
    with pytest.raises(UserError, match=r"^chatty\.yaml: '\[MASK\]' is a control token of this"):
        PromptEncoder(chatty, tokenizer_for("bert"), 64)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12)
def test_exactly_the_answer_and_its_end_are_supervised(name, data):
    form, rendering = data.draw(FORMS), data.draw(RENDERINGS)
    tokenizer = tokenizer_for(name)
    texts = hostile_text(tokenizer)
    encoder = limited(encoder_for(form, name, rendering), ROOMY)
    question, shown = data.draw(asked(form, texts)), data.draw(demonstrations(texts))
    answer = question.target.strip() if rendering == "chat" else question.target

    ids, labels, prompt = encoder.training_example(question, shown)

    if name == "llama2":  # it puts a space before every text itself
        answer = answer.removeprefix(" ")
    expected = [*encoder.text.encode(answer), *prompt.end]
    assert labels == [IGNORED] * (len(ids) - len(expected)) + expected
    assert ids == prompt.ids + expected
    assert tokenizer.decode(expected) == tokenizer.decode(labels[-len(expected) :])
    assert prompt.ids == prompt_ids(encoder, question, shown)
    assert prompt.ids == encoder.prompt(question, len(expected), shown).ids
    assert (prompt.shortened, prompt.dropped) == (False, 0)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12)
def test_a_harmless_example_is_what_the_tokenizer_makes_of_it(name, data):
    form = data.draw(FORMS)
    tokenizer, texts = tokenizer_for(name), plain_text(min_words=1)
    question = data.draw(asked(form, texts))
    encoder = limited(encoder_for(form, name), ROOMY)
    system, asks = encoder.template.system(question), encoder.template.prompt(question)

    ids, labels, _ = encoder.training_example(question)

    own = tokenizer(f"{system}\n\n{asks}" if system else asks)["input_ids"]
    prompt = own[: len(own) - len(encoder.text.suffix)]
    said = question.target.removeprefix(" ") if name == "llama2" else question.target
    answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    target = [*answer, tokenizer.eos_token_id]
    assert ids == prompt + target
    assert labels == [IGNORED] * len(prompt) + target


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12)
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
@settings(max_examples=12)
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


# Rows


@pytest.mark.parametrize("form", ["class", "free", "pair", "each"])
def test_draws_depend_on_the_seed_and_the_number_of_the_row_only(form):
    encoder, some = limited(encoder_for(form, "gpt2"), ROOMY), many_rows(40)
    other = [{**row, "text": "something else"} for row in some[:20]] + some[20:]

    first, second = (encode_rows(encoder, rows, seed=3) for rows in (some, other))

    def of(encoded, number):
        pairs = zip(encoded.rows, encoded.examples, strict=True)
        return [example for row, example in pairs if row == number]

    assert all(of(first, number) == of(second, number) for number in range(20, 40))
    assert encode_rows(encoder, some, seed=3).examples.to_list() == first.examples.to_list()
    drawn = encode_rows(encoder, some, seed=4).examples.to_list() != first.examples.to_list()
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


def test_rows_that_do_not_fit_are_left_out_and_counted():
    encoder, some = limited(encoder_for("class", "gpt2"), ROOMY), many_rows(6)
    longest = max(len(one["input_ids"]) for one in encode_rows(encoder, some).examples)
    some[1]["kind"] = some[4]["kind"] = "much too long " * longest

    encoded = encode_rows(limited(encoder, longest), some)

    assert encoded.rows.tolist() == [0, 2, 3, 5]
    assert (encoded.counts.rows, encoded.counts.left_out) == (6, 2)


def test_rows_of_which_none_fits_are_refused():
    encoder = limited(encoder_for("class", "gpt2"), 5)

    message = refusal(lambda: encode_rows(encoder, many_rows(4)))

    assert message == "--max_length 5: no training row fits; raise it"


# What a user reads


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


def test_rows_that_all_do_not_fit_end_in_one_line_before_any_model_is_loaded():
    encoder = PromptEncoder(template("free"), tokenizer_for("gpt2"), 3)
    message = refusal(lambda: encode_rows(encoder, many_rows(2)))
    assert message.startswith("--max_length 3: no training row fits")


# Another template


def test_an_encoder_with_another_template_encodes_as_a_new_one_would():
    first, second = template("class"), template("free")
    encoder = PromptEncoder(first, tokenizer_for("gpt2"), 90, "chat")
    other = encoder.with_template(second)
    fresh = PromptEncoder(second, tokenizer_for("gpt2"), 90, "chat")
    rows = many_rows(5)
    found, wanted = (encode_rows(encoder, rows).examples for encoder in (other, fresh))
    assert found.to_list() == wanted.to_list()
    assert (other.max_length, other.chat, other.template) == (90, True, second)
    assert encoder.template is first
    assert encoder.text is other.text  # what a tokenizer can do is looked up once


def test_a_conversation_is_a_chat_whatever_the_rendering_and_a_text_is_one_again():
    encoder = PromptEncoder(template("free"), tokenizer_for("gpt2"), 90)
    chat = encoder.with_template(PromptTemplate(CHAT))
    assert [encoder.chat, chat.chat, chat.with_template(template("free")).chat] == [
        False,
        True,
        False,
    ]


def test_a_template_that_the_tokenizer_cannot_take_is_refused_in_one_line():
    tokenizer = copy.deepcopy(tokenizer_for("bert"))
    tokenizer.chat_template = None
    encoder = PromptEncoder(template("free"), tokenizer, 90)
    message = refusal(lambda: encoder.with_template(PromptTemplate(CHAT)))
    assert "messages: a conversation needs a chat template" in message
    marked = template("free", prompts=["Fill [MASK]: {{ text }}"])
    message = refusal(lambda: encoder.with_template(marked))
    assert "'[MASK]' is a control token of this model" in message
    assert encoder.template.name == "free"
