"""Text never becomes markup, and otherwise is encoded as the tokenizer itself encodes it: over
tokenizers of every kind and all chat templates that TRL ships.
"""

import copy
import time
from functools import lru_cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import (
    MASKED,
    NAMES,
    TRL_TEMPLATES,
    chat_tokenizer,
    hostile_text,
    markup_of,
    plain_text,
    tokenizer_for,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from common.errors import UserError
from common.tokens import TextEncoder


@lru_cache
def encoder_for(name):
    return TextEncoder(tokenizer_for(name))


@lru_cache
def chat_encoder(template):
    return TextEncoder(chat_tokenizer(template))


def fresh(name, **changes):
    """A tokenizer without a chat template that a test may change."""
    tokenizer = tokenizer_for(name)
    special = {**tokenizer.special_tokens_map, **changes}
    special = {key: token for key, token in special.items() if token is not None}
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def visible(text):
    """Whether a chat template sees a text as more than white space."""
    return bool(text.strip())


def refusal(action):
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


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


# Chat

ROLES = st.sampled_from(
    [
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
        ("system", "user", "assistant", "user", "assistant", "user"),
    ]
)


def conversation(roles, contents):
    return [{"role": role, "content": next(contents)} for role in roles]


def drawn(data, texts, roles=None):
    roles = roles or data.draw(ROLES)
    return conversation(roles, iter(lambda: data.draw(texts), None))


def harmless(messages):
    """The same turns with a word for every text that a template sees."""
    return [{**one, "content": "text"} if visible(one["content"]) else one for one in messages]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25)
def test_no_text_in_a_chat_becomes_a_control_token(name, data):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    messages = drawn(data, hostile_text(tokenizer))

    found = markup_of(tokenizer, encoder.chat_prompt(messages))

    assert found == markup_of(tokenizer, encoder.chat_prompt(harmless(messages)))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gemma"}))
@given(data=st.data())
@settings(max_examples=25)
def test_a_chat_is_what_the_tokenizer_makes_of_it(name, data):
    tokenizer, encoder = tokenizer_for(name), encoder_for(name)
    messages = drawn(data, plain_text(min_words=1))

    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    assert encoder.chat_prompt(messages) == own


@pytest.mark.parametrize("template", TRL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=6)
def test_no_text_becomes_a_control_token_in_any_chat_template(template, data):
    tokenizer, encoder = chat_tokenizer(template), chat_encoder(template)
    messages = drawn(data, hostile_text(tokenizer))

    ids = encoder.chat_prompt(messages)

    assert markup_of(tokenizer, ids) == markup_of(
        tokenizer, encoder.chat_prompt(harmless(messages))
    )


@pytest.mark.parametrize("template", TRL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=6)
def test_every_chat_template_keeps_the_instruction_and_the_question(template, data):
    tokenizer, encoder = chat_tokenizer(template), chat_encoder(template)
    texts = hostile_text(tokenizer).filter(visible)
    messages = drawn(data, texts, roles=("system", "user", "assistant", "user"))

    read = tokenizer.decode(encoder.chat_prompt(messages))

    for message in messages:
        if message["role"] != "assistant":  # earlier answers are the template's to rewrite
            assert message["content"].strip() in read


# Templates of models that also read images, which want a list of parts.
READS_PARTS = [
    text
    for name, text in TRL_TEMPLATES.items()
    if name.startswith(("idefics3", "llava_next", "smolvlm"))
]
TAKES_NO_SYSTEM = [TRL_TEMPLATES["gemma"], TRL_TEMPLATES["gemma_training"]]


def rendered(tokenizer, messages, **options):
    """The text that the tokenizer itself renders, system turns and lists of parts as the template
    wants them.
    """
    template = tokenizer.chat_template
    if template in TAKES_NO_SYSTEM and messages[0]["role"] == "system":
        system, first, *rest = messages
        content = f"{system['content']}\n\n{first['content']}"
        messages = [{**first, "content": content}, *rest]
    if template in READS_PARTS:
        messages = [
            {**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages
        ]
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def own_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", TRL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=4)
def test_a_chat_is_trained_as_its_template_renders_it(template, data):
    tokenizer, encoder = chat_tokenizer(template), chat_encoder(template)
    messages = drawn(data, plain_text(min_words=1))
    answer = data.draw(plain_text(min_words=3))
    asked = rendered(tokenizer, messages, add_generation_prompt=True)
    whole = rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    before, _, behind = whole.rpartition(answer)

    prompt, end = encoder.chat_prompt(messages), encoder.chat_end(messages)
    ids = prompt + encoder.chat_answer(f" {answer}\n") + end

    assert prompt == own_ids(tokenizer, asked)
    assert tokenizer.decode(ids) == asked + answer + tokenizer.decode(end)
    assert markup_of(tokenizer, end) == end[-1:]
    if markup_of(tokenizer, own_ids(tokenizer, behind)):
        assert behind.startswith(tokenizer.decode(end))
    else:
        assert end == [tokenizer.eos_token_id]
    together = own_ids(tokenizer, whole)
    if before == asked and together[: len(prompt)] == prompt:  # no token across the seam
        assert ids == together[: len(ids)]


@pytest.mark.parametrize("template", ["qwen2_5", "gemma3", "llama3", "smolvlm"])
def test_a_system_turn_that_a_template_takes_is_given_to_it(template):
    tokenizer, encoder = chat_tokenizer(template), chat_encoder(template)
    messages = conversation(("system", "user"), iter(["Be brief.", "Hello"]))

    own = rendered(tokenizer, messages, add_generation_prompt=True)

    assert tokenizer.decode(encoder.chat_prompt(messages)) == own


@pytest.mark.parametrize("template", ["rejects", "swallows"])
def test_a_system_turn_that_a_template_does_not_take_joins_the_first_user_turn(template):
    rejects = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    skips = "{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}"
    each = "{% for m in messages %}" + skips + "{% endfor %}"
    tokenizer = fresh("gpt2")
    tokenizer.chat_template = rejects + each if template == "rejects" else each
    messages = conversation(("system", "user", "assistant", "user"), iter("ABCD"))

    read = tokenizer.decode(TextEncoder(tokenizer).chat_prompt(messages))

    assert read == "user: A\n\nB\nassistant: C\nuser: D\n"


def test_a_template_that_wants_a_system_turn_first_is_not_taken_for_one_that_wants_parts():
    tokenizer = fresh("gpt2")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    encoder = TextEncoder(tokenizer)
    messages = conversation(("system", "user"), iter("AB"))

    assert tokenizer.decode(encoder.chat_prompt(messages)) == "A\nB\n"
    assert "no system turn" in refusal(lambda: encoder.chat_prompt(messages[1:]))


def test_options_of_a_chat_template_reach_it():
    encoder = TextEncoder(chat_tokenizer("qwen3"), {"enable_thinking": False})
    read = encoder.tokenizer.decode(encoder.chat_prompt([{"role": "user", "content": "Hi"}]))

    assert read.endswith("<think>\n\n</think>\n\n")


# What a user reads


def test_a_slow_tokenizer_is_refused():
    assert "slow tokenizer" in refusal(lambda: TextEncoder(ByT5Tokenizer()))


def test_a_tokenizer_without_an_end_token_is_refused_where_an_answer_must_end():
    encoder = TextEncoder(fresh("t5", eos_token=None))

    assert "no eos_token" in refusal(lambda: encoder.end)


def test_a_tokenizer_without_a_mask_is_refused_for_a_cloze():
    assert "no mask token" in refusal(lambda: encoder_for("gpt2").cloze("a", "b", 1))


def test_a_tokenizer_without_a_chat_template_is_refused_in_a_chat():
    encoder = TextEncoder(fresh("gpt2"))

    message = refusal(lambda: encoder.chat_prompt([{"role": "user", "content": "a"}]))

    assert "no chat template" in message


def test_turns_that_a_chat_template_rejects_are_refused_with_its_reason():
    turns = conversation(("user", "user"), iter("ab"))

    message = refusal(lambda: chat_encoder("gemma").chat_prompt(turns))

    assert "roles must alternate" in message


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_follows_its_prompt_behind_one_space(name):
    # Llama 2's kind of tokenizer puts a space before every text, one with a space included.
    encoder = TextEncoder(tokenizer_for(name))
    prompt, answer = "a letter", " after"
    ids = [*encoder.encode(prompt), *encoder.continuation(answer)]
    assert encoder.tokenizer.decode(ids).strip() == prompt + answer
    if name == "bundled":  # it knows the words, so that no merge crosses the seam
        assert ids == list(encoder.encode(prompt + answer))
