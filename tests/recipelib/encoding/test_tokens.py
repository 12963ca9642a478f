"""Text never becomes markup, and otherwise is encoded as the tokenizer itself encodes it: over
tokenizers of every kind.
"""

import time

import pytest
from encoding_cases import refusal, text_encoder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_conversations import naively
from tokenizers_for_tests import (
    MASKED,
    NAMES,
    fresh,
    hostile_text,
    markup_of,
    plain_text,
    tokenizer_for,
)
from transformers import ByT5Tokenizer

from recipelib.encoding.tokens import TextEncoder


def encoder_for(name):
    return text_encoder(tokenizer_for(name))


# Text


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_no_text_becomes_a_control_token(name, data):
    tokenizer = tokenizer_for(name)
    text = data.draw(hostile_text(tokenizer))

    assert markup_of(tokenizer, encoder_for(name).encode(text)) == []


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_text_without_control_tokens_is_encoded_as_the_tokenizer_encodes_it(name, data):
    tokenizer = tokenizer_for(name)
    text = data.draw(st.one_of(plain_text(), hostile_text(tokenizer)))
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assume(not markup_of(tokenizer, own) and "\ufdd0\ufdd1" not in text)
    assume(not tokenizer.unk_token or tokenizer.unk_token not in text)

    assert list(encoder_for(name).encode(text)) == own


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_without_text_leaves_something_to_predict_from(name):
    encoder, tokenizer = encoder_for(name), tokenizer_for(name)
    ids = encoder.text_prompt("")
    assert ids == encoder.text_prompt("a")[: len(ids)] or ids in (
        [tokenizer.bos_token_id],
        encoder.end,
    )
    assert ids


@pytest.mark.parametrize(
    ("before", "after"), [("hi", "\n\ngood"), ("hi\n", "good"), ("hi", " good")]
)
def test_no_space_is_put_before_what_follows_where_the_tokenizer_puts_one_before_every_text(
    before, after
):
    encoder = encoder_for("llama2")
    whole = list(encoder.encode(before + after))
    assert list(encoder.encode(before)) + encoder.continuation(after) == whole


@pytest.mark.parametrize(
    ("header", "space"), [("[INST] ", " "), ("<|assistant|>\n", ""), ("Assistant:", " ")]
)
def test_an_answer_has_a_space_before_it_where_the_chat_template_writes_one(header, space):
    template = (
        "{% for one in messages %}{% if one.role == 'user' %}{{ one.content }}HEADER{% else %}"
        "SPACE{{ one.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    template = template.replace("HEADER", header.strip(" ")).replace("SPACE", space)
    tokenizer = fresh("llama2", chat_template=template)
    encoder = TextEncoder(tokenizer)
    ask = [{"role": "user", "content": "Is it good?"}]
    chat = [*ask, {"role": "assistant", "content": "really good"}]
    ids = encoder.chat_prompt(ask) + encoder.chat_answer("really good") + encoder.chat_end(ask)
    assert ids == tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=100)
def test_text_is_guarded_and_chats_are_encoded_in_pieces_as_if_all_was_encoded_at_once(name, data):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    control = st.sampled_from([token.content for token in tokenizer.added_tokens_decoder.values()])
    chat = ""
    for _ in range(3):  # each begins as the one before, as the prompts of a conversation do
        text = data.draw(hostile_text(tokenizer))
        guarded = encoder._guard(text)
        with naively(encoder):
            assert encoder._guard(text) == guarded
        chat += data.draw(control) + guarded + data.draw(control)
        assert encoder.chat_ids(chat) == encoder._ids(chat)


def test_of_long_chats_few_pieces_are_kept(monkeypatch):
    monkeypatch.setattr("recipelib.encoding.tokens._MOST_LETTERS", 10_000)
    encoder = TextEncoder(tokenizer_for("gpt2"))
    for number in range(12):
        chat = f"<|im_start|>user\n{number} {'so it goes ' * 100}<|im_end|>"
        assert encoder.chat_ids(chat) == encoder._ids(chat)
    assert 0 < sum(map(len, encoder._pieces)) <= 10_000


@given(data=st.data())
@settings(max_examples=300)
def test_whatever_looks_like_a_control_token_stays_in_the_text(data):
    tokenizer = tokenizer_for("gpt2")  # whose bytes spell any text
    text = data.draw(hostile_text(tokenizer))

    assert tokenizer.decode(encoder_for("gpt2").encode(text)) == text


@pytest.mark.parametrize(
    ("name", "token"),
    [
        *[("roberta", "<mask>"), ("xlmr", "</s>"), ("bert", "[SEP]"), ("odd", "<both>")],
        *[("gemma", "<table>"), ("t5", "<mask>"), ("t5", "＜/s＞"), ("odd", "<TOOL>")],
        *[("odd", "<<both>>"), ("odd", " spaced out"), ("bert", "<TAG>"), ("llama2", "<s>")],
    ],
)
def test_a_control_token_in_the_text_keeps_its_characters(name, token):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    read = tokenizer.decode(encoder.encode(f"a{token}b")).replace(" ", "").lower()

    assert read == f"a{token}b".replace("＜/s＞", "</s>").replace(" ", "").lower()


@pytest.mark.parametrize("name", ["gpt2", "bundled"])
def test_the_name_of_the_unknown_token_is_text_where_it_also_ends_documents(name):
    tokenizer = tokenizer_for(name)
    ids = encoder_for(name).encode(f"a {tokenizer.unk_token} b")

    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(("name", "text"), [("bert", "🎬"), ("t5", "中"), ("xlmr", "中")])
def test_an_unknown_character_stays_unknown(name, text):
    assert tokenizer_for(name).unk_token_id in encoder_for(name).encode(f"a {text} b")


@pytest.mark.parametrize(
    ("name", "text", "token"),
    [("gemma", "a\n\nb", "\n\n"), ("gemma", "x    y", "▁▁▁▁"), ("odd", "für", "ü")],
)
def test_plain_added_tokens_keep_their_ids(name, text, token):
    tokenizer = tokenizer_for(name)

    assert tokenizer.convert_tokens_to_ids(token) in encoder_for(name).encode(text)


def test_a_special_token_of_one_character_is_left_out():
    encoder = encoder_for("odd")

    assert encoder.encode("a¤b") == encoder.encode("a") + encoder.encode("b")


def test_the_characters_of_the_break_stay_text():
    tokenizer = tokenizer_for("gpt2")
    text = "\ufdd0\ufdd1 <|endof\ufdd0\ufdd1text|> \ufdd0\ufdd0\ufdd1\ufdd1"

    assert tokenizer.decode(encoder_for("gpt2").encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "odd", "t5", "bert"])
def test_long_hostile_text_is_encoded_in_no_time(name):
    tokenizer = tokenizer_for(name)
    text = "".join(tokenizer.all_special_tokens) * 1000
    start = time.perf_counter()

    assert markup_of(tokenizer, encoder_for(name).encode(text)) == []
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_follows_its_prompt_behind_one_space(name):
    # Llama 2's kind of tokenizer puts a space before every text, one with a space included.
    encoder = TextEncoder(tokenizer_for(name))
    prompt, answer = "a letter", " after"
    ids = [*encoder.encode(prompt), *encoder.continuation(answer)]
    assert encoder.tokenizer.decode(ids).strip() == prompt + answer
    if name == "bundled":  # it knows the words, so that no merge crosses the seam
        assert ids == list(encoder.encode(prompt + answer))


# The tokenizer's frame


@pytest.mark.parametrize("name", NAMES)
@given(text=plain_text(min_words=1))
def test_a_prompt_has_the_frame_in_front_and_nothing_behind(name, text):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)

    assert encoder.text_prompt(text) + encoder.suffix == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
@given(first=plain_text(), second=plain_text(min_words=1))
def test_a_pair_is_what_the_tokenizer_makes_of_it(name, first, second):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    own = tokenizer(first, second, return_token_type_ids=True)

    ids, types = encoder.pair(first, second)

    assert ids == own["input_ids"]
    assert types == own["token_type_ids"]
    assert encoder.has_token_types == (name == "bert")


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_a_hostile_pair_has_no_markup_but_its_frame(name, data):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    first, second = data.draw(hostile_text(tokenizer)), data.draw(hostile_text(tokenizer))
    left, right = list(encoder.encode(first)), list(encoder.encode(second))

    ids, types = encoder.pair(first, second)

    assert ids == encoder.prefix + left + encoder.middle + right + encoder.suffix
    assert markup_of(tokenizer, ids) == markup_of(tokenizer, tokenizer("a", "a")["input_ids"])
    assert len(types) == len(ids)
    behind = len(right) + len(encoder.suffix)
    assert types == sorted(types)
    if name == "bert":
        assert types == [0] * (len(ids) - behind) + [1] * behind


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_text_is_the_end_token(name):
    assert encoder_for(name).end == [tokenizer_for(name).eos_token_id]


# The cloze


@pytest.mark.parametrize("name", MASKED)
@given(before=plain_text(), after=plain_text(), masks=st.integers(1, 4), gap=st.booleans())
def test_a_cloze_is_what_the_tokenizer_makes_of_it(name, before, after, masks, gap):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    before += " " * gap

    ids, places = encoder.cloze(before, after, masks)

    assert ids == tokenizer(before + tokenizer.mask_token * masks + after)["input_ids"]
    assert [ids[place] for place in places] == [tokenizer.mask_token_id] * masks


@pytest.mark.parametrize("name", MASKED)
@given(data=st.data(), masks=st.integers(1, 4))
def test_a_hostile_cloze_has_exactly_its_masks(name, data, masks):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    before, after = data.draw(hostile_text(tokenizer)), data.draw(hostile_text(tokenizer))

    ids, places = encoder.cloze(before, after, masks)

    mask = tokenizer.mask_token_id
    assert places == [place for place, index in enumerate(ids) if index == mask]
    assert len(places) == masks
    frame = markup_of(tokenizer, encoder.prefix) + [mask] * masks
    assert markup_of(tokenizer, ids) == frame + markup_of(tokenizer, encoder.suffix)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(("before", "word"), [("It was ", " good"), ("It (", "good"), ("", "good")])
def test_a_label_word_has_a_space_where_one_stands_before_the_mask(name, before, word):
    own = tokenizer_for(name)(word, add_special_tokens=False)["input_ids"]

    assert encoder_for(name).word("good", before) == own


# What a user reads


def test_a_slow_tokenizer_is_refused():
    assert "slow tokenizer" in refusal(lambda: TextEncoder(ByT5Tokenizer()))


def test_a_tokenizer_without_an_end_token_is_refused_where_an_answer_must_end():
    encoder = TextEncoder(fresh("t5", eos_token=None))

    assert "no eos_token" in refusal(lambda: encoder.end)


def test_a_tokenizer_without_a_mask_is_refused_for_a_cloze():
    assert "no mask token" in refusal(lambda: encoder_for("gpt2").cloze("a", "b", 1))
