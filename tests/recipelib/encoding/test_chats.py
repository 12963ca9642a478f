"""A chat is what the tokenizer makes of it, and its texts stay text: over tokenizers of every kind
and all chat templates that TRL ships.
"""

import pytest
from encoding_cases import refusal, text_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import (
    NAMES,
    TRL_TEMPLATES,
    chat_tokenizer,
    fresh,
    hostile_text,
    markup_of,
    plain_text,
    tokenizer_for,
)

from recipelib.encoding.tokens import TextEncoder


def encoder_for(name):
    return text_encoder(tokenizer_for(name))


def chat_encoder(template):
    return text_encoder(chat_tokenizer(template))


def visible(text):
    """Whether a chat template sees a text as more than white space."""
    return bool(text.strip())


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
@settings(max_examples=15)
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
@settings(max_examples=3)
def test_no_text_becomes_a_control_token_in_any_chat_template(template, data):
    tokenizer, encoder = chat_tokenizer(template), chat_encoder(template)
    messages = drawn(data, hostile_text(tokenizer))

    ids = encoder.chat_prompt(messages)

    assert markup_of(tokenizer, ids) == markup_of(
        tokenizer, encoder.chat_prompt(harmless(messages))
    )


@pytest.mark.parametrize("template", TRL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=3)
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
@settings(max_examples=3)
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


def test_a_tokenizer_without_a_chat_template_is_refused_in_a_chat():
    encoder = TextEncoder(fresh("gpt2"))

    message = refusal(lambda: encoder.chat_prompt([{"role": "user", "content": "a"}]))

    assert "no chat template" in message


def test_turns_that_a_chat_template_rejects_are_refused_with_its_reason():
    turns = conversation(("user", "user"), iter("ab"))

    message = refusal(lambda: chat_encoder("gemma").chat_prompt(turns))

    assert "roles must alternate" in message
