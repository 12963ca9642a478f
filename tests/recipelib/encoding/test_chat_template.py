"""A model without a chat template gets a plain one: no new tokens, turns told apart by headers, the
eos token behind each of the assistant's, and it is saved with the tokenizer.
"""

from functools import cache

import pytest
from conversation_cases import TOOL, arguments, call, conversations, supervised_runs
from encoding_cases import CHAT, ROOMY, refusal
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, fresh, hostile_text, markup_of, plain_text, tokenizer_for
from transformers import AutoTokenizer

from recipelib.encoding.chat_template import PLAIN_CHAT_TEMPLATE, ensure_chat_template
from recipelib.encoding.prompt_encoder import Counts, PromptEncoder
from recipelib.prompts.template import PromptTemplate


def plain(name, **changes):
    """A tokenizer with the plain chat template."""
    tokenizer = fresh(name, **changes)
    assert ensure_chat_template(tokenizer)
    return tokenizer


@cache
def encoder_of(name):
    return PromptEncoder(PromptTemplate(CHAT), plain(name), ROOMY)


TALK = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [call("weather", town="Rom\nü")] * 2},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather")]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "  Rain. "},
]


def test_the_plain_template_writes_every_kind_of_turn():
    written = plain("gpt2").apply_chat_template(
        TALK, tools=[TOOL], add_generation_prompt=True, tokenize=False
    )
    rome = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rom\\nü"}}\n</tool_call>'
    assert written == (
        '### Tools:\n[{"type": "function", "function": {"name": "weather", "description": '
        '"Tells the weather of a town.", "parameters": {"type": "object", "properties": {"town": '
        '{"type": "string", "description": "Which town."}}, "required": ["town"]}}}]\n\n'
        "### System:\nBe brief.\n\n"
        "### User:\nRome?\n\n"
        f"### Assistant:\nI look.\n{rome}\n{rome}<|endoftext|>\n\n"
        "### Tool:\nsunny\n\n"
        '### Assistant:\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
        "<|endoftext|>\n\n"
        "### Tool:\nrain\n\n"
        "### Assistant:\nRain.<|endoftext|>\n\n"
        "### Assistant:\n"
    )


def spelled(turn):
    """What is learned of an assistant's turn, from its rendering alone."""
    written = encoder_of("gpt2").text.tokenizer.apply_chat_template([turn], tokenize=False)
    return written.removeprefix("### Assistant:\n").removesuffix("<|endoftext|>\n\n")


@pytest.mark.parametrize("name", ["gpt2", "bundled"])
@given(data=st.data())
def test_exactly_the_assistants_turns_and_eos_are_supervised(name, data):
    encoder = encoder_of(name)
    tokenizer = encoder.text.tokenizer
    texts = hostile_text(tokenizer).filter(str.strip)
    messages = data.draw(conversations(texts, calls=arguments(texts)))
    row = {"messages": messages, "tools": data.draw(st.sampled_from([[], [TOOL]]))}

    examples = encoder.conversation(encoder.template.questions(row)[0], Counts())

    learned = [one for one in messages if one["role"] == "assistant"]
    targets = [labels[a:b] for _, labels in examples for a, b in supervised_runs(labels)]
    assert [tokenizer.decode(one[:-1]) for one in targets] == [
        tokenizer.decode(encoder.text.encode(spelled(one))) for one in learned
    ]
    assert {one[-1] for one in targets} == {tokenizer.eos_token_id}
    ids = examples[-1][0]
    assert set(markup_of(tokenizer, ids)) <= {tokenizer.eos_token_id}
    assert ids.count(tokenizer.eos_token_id) == len(learned)


@pytest.mark.parametrize("name", ["gpt2", "bundled"])
@given(texts=st.lists(plain_text(min_words=1), min_size=4, max_size=4))
def test_the_ids_are_those_of_the_whole_rendering(name, texts):
    encoder = encoder_of(name)
    tokenizer = encoder.text.tokenizer
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, texts, strict=True)
    ]

    ((ids, _),) = encoder.conversation(
        encoder.template.questions({"messages": messages})[0], Counts()
    )

    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]) == "\n\n"


@pytest.mark.parametrize("name", ["gpt2", "llama2", "bundled", "odd", "xlmr"])
def test_no_token_is_added_and_a_chat_begins_as_every_text_does(name):
    tokenizer = plain(name)
    assert len(tokenizer) == len(tokenizer_for(name))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    first = tokenizer("a")["input_ids"][:1]
    expected = first if first == [tokenizer.bos_token_id] else []
    assert ids[: len(expected) + 1].count(tokenizer.bos_token_id) == len(expected)
    assert ids[: len(expected)] == expected


def test_the_plain_template_is_saved_with_the_tokenizer(tmp_path):
    plain("gpt2").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == PLAIN_CHAT_TEMPLATE
    assert not ensure_chat_template(loaded)


def test_a_template_of_the_models_own_stays():
    tokenizer = fresh("gpt2")
    tokenizer.chat_template = CHATML
    assert not ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_a_tokenizer_without_an_end_token_is_refused():
    message = refusal(lambda: ensure_chat_template(fresh("gpt2", eos_token=None)))
    assert "neither a chat template nor an eos_token" in message
