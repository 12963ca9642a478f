"""Reasoning of assistant turns is trained as the chat template writes it, and never as letters."""

import pytest
from conversation_cases import supervised_runs, targets
from encoding_cases import (
    ROOMY,
    chat_encoder,
    conversation_encoder,
    limited,
    message_of,
    one_question,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import TRL_TEMPLATES, chat_tokenizer, hostile_text, markup_of

from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import Counts, PromptEncoder
from recipelib.runtime.errors import UserError

ASK = {"role": "user", "content": "What is 2+2?"}
# Whose templates write it behind their generation prompts.
WRITES = [
    *("diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer"),
    *("nemotron_3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
]


def writes(chat_template):
    return chat_template.startswith(tuple(WRITES)) or chat_template in ("qwen3", "qwen3_training")


@pytest.mark.parametrize("way", ["beside", "inside"])
@pytest.mark.parametrize("chat_template", TRL_TEMPLATES)
def test_it_is_trained_as_the_tokenizer_itself_renders_it_or_refused(chat_template, way):
    encoder, tokenizer = limited(chat_encoder(chat_template), ROOMY), chat_tokenizer(chat_template)
    answer = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}
    row = {"messages": [ASK, answer]}
    if way == "inside":
        text = "<think>\nTwo and two.\n</think>\n\nIt is 4."
        row = {"messages": [ASK, {"role": "assistant", "content": text}]}
    if not writes(chat_template):
        with pytest.raises(UserError) as error:
            encode_rows(encoder, [row])
        message = message_of(error.value)
        assert message.startswith("training row 1 ('What is 2+2?'): chat template of ")
        assert (
            "it does not write reasoning behind its generation prompt; remove the reasoning"
            in message
        )
        return

    ((ids, labels),) = encoder.conversation(one_question(encoder, row["messages"]), Counts())

    whole = tokenizer.apply_chat_template([ASK, answer], tokenize=False)
    start = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    ((first, _),) = supervised_runs(labels)
    assert tokenizer.decode(ids[:first]) == start
    written = tokenizer.decode(ids[first:])
    assert "Two and two." in written
    assert written.endswith(tokenizer.decode(encoder.text.chat_end([ASK])))
    ends = len(tokenizer.decode(encoder.text.end))
    assert whole[len(start) :].startswith((written.rstrip(), written[:-ends]))
    if "<think>" in whole:  # one token, not its letters
        assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1


@pytest.mark.parametrize("chat_template", ["qwen3", "gptoss", "nemotron_3_nano"])
@given(data=st.data())
@settings(max_examples=10)
def test_nothing_in_it_becomes_a_control_token(chat_template, data):
    encoder, tokenizer = limited(chat_encoder(chat_template), ROOMY), chat_tokenizer(chat_template)
    texts = hostile_text(tokenizer).filter(str.strip)

    def markup(thought, said):
        turn = {"role": "assistant", "content": said, "reasoning_content": thought}
        ((ids, _),) = encoder.conversation(one_question(encoder, [ASK, turn]), Counts())
        return markup_of(tokenizer, ids)

    assert markup(data.draw(texts), data.draw(texts)) == markup("Two and two.", "It is 4.")


def test_an_earlier_thought_stands_in_the_history_as_the_template_has_it():
    encoder, tokenizer = limited(chat_encoder("qwen3"), ROOMY), chat_tokenizer("qwen3")
    answer = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}
    last = {**answer, "content": "It is 6.", "reasoning_content": "Four and two."}

    examples = encoder.conversation(one_question(encoder, [ASK, answer, ASK, last]), Counts())

    # Qwen 3 leaves earlier thoughts out, so each answer is an example of its own.
    assert [tokenizer.decode(one) for one in targets(examples)] == [
        "<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>",
        "<think>\nFour and two.\n</think>\n\nIt is 6.<|im_end|>",
    ]
    turns = [ASK, answer, ASK]
    assert tokenizer.decode(examples[1][0]).startswith(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    )


def test_it_is_turned_on_by_the_argument_that_the_error_names():
    encoder = chat_encoder("qwen3_5_nothink")
    options = {"enable_thinking": True}
    encoder = PromptEncoder(
        encoder.template, chat_tokenizer("qwen3_5_nothink"), ROOMY, "chat", options
    )
    turn = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}

    ((ids, _),) = encoder.conversation(one_question(encoder, [ASK, turn]), Counts())

    assert "<think>\nTwo and two.\n</think>\n\nIt is 4." in encoder.text.tokenizer.decode(ids)


def test_a_model_without_tokens_for_it_learns_it_as_text_before_the_answer():
    encoder = limited(conversation_encoder("xlmr"), ROOMY)
    tokenizer = encoder.text.tokenizer
    turn = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two.\n"}

    examples = encoder.conversation(one_question(encoder, [ASK, turn]), Counts())

    (target,) = targets(examples)
    text = "<think>\nTwo and two.\n</think>\n\nIt is 4."
    assert tokenizer.decode(target) == text + tokenizer.decode(encoder.text.chat_end([ASK]))


def test_an_empty_thought_is_none():
    encoder = chat_encoder("qwen3")
    said = "<think>\n\n</think>\n\nIt is 4."
    question = one_question(encoder, [ASK, {"role": "assistant", "content": said}])
    assert question.turns[1] == {"role": "assistant", "content": "It is 4."}
