"""A conversation becomes one example or several and loses whole turns where it is too long; a turn
that cannot be written is named by its row.
"""

import pytest
from conversation_cases import (
    TOOL,
    answered,
    call,
    conversations,
    targets,
)
from encoding_cases import (
    ROOMY,
    chat_encoder,
    conversation_encoder,
    limited,
    one_question,
    refusal,
    turns,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import (
    TRL_TEMPLATES,
    chat_tokenizer,
    hostile_text,
    plain_text,
    tokenizer_for,
)

from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import Counts
from recipelib.evaluation.losses import score_loss


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
    wanted = [
        text.chat_answer(messages[place]["content"]) + text.chat_end(messages[:place])
        for place in (1, 3)
    ]

    examples = encoder.conversation(one_question(encoder, messages), counts)

    assert targets(examples) == wanted
    assert examples[-1][0] == prompts[1] + wanted[1]
    first, second = (tokenizer.decode(ids) for ids in (prompts[0] + wanted[0], prompts[1]))
    if not second.startswith(first):
        assert [ids for ids, _ in examples] == [
            prompt + target for prompt, target in zip(prompts, wanted, strict=True)
        ]
    elif prompts[1][: len(prompts[0] + wanted[0])] == prompts[0] + wanted[0]:
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
    messages = answered(messages)
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
    messages = data.draw(conversations(hostile_text(tokenizer_for(name)).filter(str.strip)))
    question = one_question(encoder, messages)
    found = encoder.conversation(question, Counts())
    longest = max((len(ids) for ids, _ in found), default=10)
    encoder.max_length = data.draw(st.integers(longest // 3, longest))
    counts = Counts()

    examples = encoder.conversation(question, counts)

    expected = list(expected_conversation(encoder, messages))
    kept = [one for one in expected if one]
    assert counts.left_out == len(expected) - len(kept)
    assert counts.shortened == sum(dropped for _, _, dropped in kept)
    assert all(len(ids) == len(labels) <= encoder.max_length for ids, labels in examples)
    assert targets(examples) == [target for _, target, _ in kept]
    wholes = [prompt + target for prompt, target, _ in kept]
    assert [ids for ids, _ in examples] == [
        ids
        for place, ids in enumerate(wholes)
        if place + 1 == len(wholes) or kept[place + 1][2] or wholes[place + 1][: len(ids)] != ids
    ]


def test_over_the_budget_a_call_goes_with_its_result_and_descriptions_of_tools_stay():
    encoder, tokenizer = chat_encoder("qwen2_5"), chat_tokenizer("qwen2_5")
    calling = {**turns(["assistant"], [""])[0], "tool_calls": [call("weather", town="Oslo")]}
    result = turns(["tool", "assistant", "user", "assistant"], ["rain", "Rain.", "Thanks", "Bye"])
    row = {"messages": [*turns(["user"], ["Oslo?"]), calling, *result], "tools": [TOOL]}
    (question,) = encoder.template.questions(row)
    ((ids, _),) = limited(encoder, ROOMY).conversation(question, Counts())
    counts = Counts()

    *_, (ids, labels) = limited(encoder, len(ids) - 1).conversation(question, counts)

    read = tokenizer.decode(ids)
    assert "Tells the weather of a town." in read
    assert "Oslo" not in read
    assert "rain" not in read
    assert tokenizer.decode(targets([(ids, labels)])[0]) == "Bye<|im_end|>"
    assert (counts.shortened, counts.left_out) == (1, 0)


def test_turns_that_the_chat_template_rejects_are_named_by_their_row():
    encoder = limited(chat_encoder("gemma"), ROOMY)
    good = {"messages": turns(["user", "assistant"], ["Hi", "Hello"])}
    roles = ["user", "assistant", "tool", "assistant"]
    bad = {"messages": turns(roles, ["Hi", "Wait", "nothing", "Hello"])}

    message = refusal(lambda: encode_rows(encoder, [good, bad]))

    assert message.startswith("training row 2 ('Hi'): chat template of ")
    assert "roles must alternate" in message
    message = refusal(lambda: score_loss(None, encoder, [good, bad]))
    assert message.startswith("evaluation row 2 ('Hi'): chat template of ")


def test_conversations_count_examples_and_answers():
    encoder = conversation_encoder("gpt2")
    short = turns(["user", "assistant"] * 2, ["Hi", "Hello", "Bye", "So long"])
    far = turns(["user", "assistant", "user", "assistant"], [words(400), "one", "Hi", "two"])
    encoder.max_length = 100

    encoded = encode_rows(encoder, [{"messages": short}, {"messages": far}])

    assert encoded.rows == [0, 1]
    counts = encoded.counts
    assert (counts.rows, counts.examples, counts.shortened, counts.left_out) == (2, 2, 1, 1)
