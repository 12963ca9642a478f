"""Every answer of a conversation is trained as it will be asked, whatever the chat template does to
earlier turns, and over the budget the oldest turns go first.
"""

import json
import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
from conversation_cases import (
    TAKES_CALLS,
    TOOL,
    answered,
    arguments,
    call,
    conversations,
    supervised_runs,
    targets,
)
from encoding_cases import (
    CHAT,
    ROOMY,
    chat_encoder,
    conversation_encoder,
    limited,
    message_of,
    one_question,
    refusal,
    turns,
    words,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_conversations import naive_conversation
from tokenizers_for_tests import (
    NAMES,
    TRL_TEMPLATES,
    chat_tokenizer,
    hostile_text,
    markup_of,
    plain_text,
    tokenizer_for,
)

from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import Counts, DoesNotFit, PromptEncoder
from recipelib.evaluation.losses import score_loss
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*(</think>)?\s*$")


def asked(examples):
    """The ids before each stretch that is supervised."""
    return [ids[:a] for ids, labels in examples for a, _ in supervised_runs(labels)]


def assistant_places(messages):
    return [place for place, one in enumerate(messages) if one["role"] == "assistant"]


# The next turn


@pytest.mark.parametrize("chat_template", TAKES_CALLS[::7])
@given(data=st.data())
@settings(max_examples=2)
def test_a_turn_is_asked_for_behind_what_stood_before_it_in_training(chat_template, data):
    """Whether the row has it or ends before it; what the row has is the reference, as trained."""
    encoder = limited(chat_encoder(chat_template), ROOMY)
    texts = plain_text(min_words=2)
    messages = data.draw(conversations(texts, calls=arguments(texts)))
    whole, bare = (
        encoder.template.questions({"messages": some, "tools": [TOOL]}, answers=False)[0]
        for some in (messages, messages[:-1])
    )
    examples = encoder.conversation(whole, Counts())
    answered, unanswered = (encoder.prompt(question, 4) for question in (whole, bare))
    assert answered.ids == unanswered.ids == asked(examples)[-1]
    target = targets(examples)[-1]
    assert answered.end[-1] == unanswered.end[-1]
    said = chat_tokenizer(chat_template).decode(target[:-1], skip_special_tokens=True)
    assert answered.question.references == (said.strip(),)
    assert unanswered.question.references == ()


def test_a_long_conversation_is_asked_without_its_oldest_turns_and_with_room_for_the_answer():
    encoder = conversation_encoder("gpt2")
    roles = ["system", *["user", "assistant"] * 6, "user"]
    messages = turns(roles, [f"text {number}" for number in range(14)])
    question, kept = (
        encoder.template.questions({"messages": some}, answers=False)[0]
        for some in (messages, [messages[0], *messages[3:]])
    )
    whole, later = encoder.prompt(question, 0), encoder.prompt(kept, 0)
    assert not whole.shortened
    limited(encoder, len(whole.ids) + len(whole.end))
    assert encoder.prompt(question, 0).ids == whole.ids
    cut = encoder.prompt(question, 9)
    assert (cut.shortened, cut.ids) == (True, later.ids)
    with pytest.raises(DoesNotFit, match="its last turns are longer than"):
        encoder.prompt(question, len(whole.ids))


# Exactly the assistant's turns


@pytest.mark.parametrize("chat_template", TRL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=3)
def test_exactly_the_assistants_turns_and_their_end_markers_are_supervised(chat_template, data):
    encoder = limited(chat_encoder(chat_template), ROOMY)
    tokenizer, text = chat_tokenizer(chat_template), encoder.text
    texts = hostile_text(tokenizer).filter(str.strip)
    messages = data.draw(conversations(texts, tools=False))
    turns = answered(messages)
    places = assistant_places(messages)

    examples = encoder.conversation(one_question(encoder, messages), Counts())

    ends = [tokenizer.decode(text.chat_end(turns[:place])) for place in places]
    assert [tokenizer.decode(ids) for ids in targets(examples)] == [
        turns[place]["content"] + end for place, end in zip(places, ends, strict=True)
    ]
    assert asked(examples) == [text.chat_prompt(turns[:place]) for place in places]
    assert examples[-1][0][-1] == examples[-1][1][-1]


@pytest.mark.parametrize("chat_template", TAKES_CALLS)
@given(data=st.data())
@settings(max_examples=2)
def test_calls_of_tools_are_supervised_as_the_tokenizer_itself_renders_them(chat_template, data):
    encoder = limited(chat_encoder(chat_template), ROOMY)
    tokenizer, tools = chat_tokenizer(chat_template), data.draw(st.sampled_from([(), (TOOL,)]))
    texts = plain_text(min_words=2)
    messages = data.draw(conversations(texts, calls=arguments(texts)))
    (question,) = encoder.template.questions({"messages": messages, "tools": list(tools)})

    examples = encoder.conversation(question, Counts())

    turns = answered(question.turns)  # which also name results
    for place, prompt, target in zip(
        assistant_places(turns), asked(examples), targets(examples), strict=True
    ):
        render = partial(tokenizer.apply_chat_template, tools=list(tools) or None, tokenize=False)
        before = render(turns[:place], add_generation_prompt=True)
        assert tokenizer.decode(prompt) == before
        if "tool_calls" in turns[place]:
            whole, written = render(turns[: place + 1]), tokenizer.decode(target)
            if chat_template == "glm4moe":  # it ends no turn
                assert written.endswith(tokenizer.eos_token)
                written = written.removesuffix(tokenizer.eos_token)
            assert whole.rstrip("\n").endswith(written)
            assert "think>" not in written
            # Before it stands the generation prompt, an empty thought aside. Gemma's templates
            # write earlier calls anew.
            head = whole.rstrip("\n").removesuffix(written)
            if "gemma" not in chat_template:
                assert EMPTY_THOUGHT.sub("", head) == EMPTY_THOUGHT.sub("", before)
            if not chat_template.startswith(("llama3", "muse")):  # they write the call only
                assert turns[place]["content"].strip() in written


def spelled(message):
    """A turn of the assistant as Qwen 2.5 writes it."""
    parts = [message["content"].strip()] if message["content"] else []
    for one in message.get("tool_calls", ()):
        inside = json.dumps(one["function"]["arguments"], ensure_ascii=False)
        name = one["function"]["name"]
        parts.append(f'<tool_call>\n{{"name": "{name}", "arguments": {inside}}}\n</tool_call>')
    return "\n".join(parts) + "<|im_end|>"


@given(data=st.data())
def test_a_call_is_supervised_letter_by_letter_whatever_its_arguments_hold(data):
    tokenizer, encoder = chat_tokenizer("qwen2_5"), limited(chat_encoder("qwen2_5"), ROOMY)
    texts = hostile_text(tokenizer).filter(str.strip)
    inside = st.recursive(
        st.one_of(texts, st.booleans(), st.integers(-9, 9)),
        lambda part: st.one_of(
            st.lists(part, max_size=2), st.dictionaries(texts, part, max_size=2)
        ),
        max_leaves=4,
    )
    calls = [call(data.draw(texts), **{data.draw(texts): data.draw(inside)}) for _ in "12"]
    content = data.draw(st.one_of(st.just(""), texts))
    messages = [
        *turns(["user"], ["Hi"]),
        {**turns(["assistant"], [content])[0], "tool_calls": calls},
    ]
    tool = {**TOOL, "function": {**TOOL["function"], "description": data.draw(texts)}}
    row = {"messages": messages, "tools": [tool]}

    ((ids, labels),) = encoder.conversation(encoder.template.questions(row)[0], Counts())

    ((start, end),) = supervised_runs(labels)
    assert tokenizer.decode(ids[start:end]) == spelled(messages[1])
    assert end == len(ids)
    assert json.dumps(tool, ensure_ascii=False) in tokenizer.decode(ids[:start])
    system = ["<tools>", "</tools>", "<tool_call>", "<function-name>", "<args-json-object>"]
    ours = {*system, "</tool_call>", "<|im_start|>", "<|im_end|>"}
    names = tokenizer.convert_ids_to_tokens(markup_of(tokenizer, ids[start:]))
    assert names == [*["<tool_call>", "</tool_call>"] * 2, "<|im_end|>"]
    assert set(tokenizer.convert_ids_to_tokens(markup_of(tokenizer, ids))) == ours


@pytest.mark.parametrize("chat_template", TAKES_CALLS)
@given(data=st.data())
@settings(max_examples=2)
def test_nothing_in_calls_and_descriptions_becomes_a_control_token(chat_template, data):
    tokenizer, encoder = chat_tokenizer(chat_template), limited(chat_encoder(chat_template), ROOMY)
    texts = hostile_text(tokenizer).filter(lambda text: bool(re.search(r"\w", text)))

    def markup(text):
        tool = {**TOOL["function"], "name": text(), "description": text()}
        row = {
            "messages": [
                {"role": "user", "content": text()},
                {**turns(["assistant"], [""])[0], "tool_calls": [call(text(), **{text(): text()})]},
                {"role": "tool", "content": text(), "name": text(), "tool_call_id": text()},
                {"role": "assistant", "content": text()},
            ],
            "tools": [{"type": "function", "function": tool}],
        }
        examples = encoder.conversation(encoder.template.questions(row)[0], Counts())
        return [markup_of(tokenizer, ids) for ids, _ in examples]

    assert markup(lambda: data.draw(texts)) == markup(lambda: "text")


# What is not learned


def test_white_space_around_an_answer_makes_no_second_example():
    encoder = conversation_encoder("bundled")
    messages = turns(
        ["user", "assistant"] * 3, [" a ", " one\n", " b ", "\ttwo ", " c ", " three "]
    )

    assert len(encoder.conversation(one_question(encoder, messages), Counts())) == 1


def test_turns_of_weight_zero_and_those_behind_the_last_answer_are_not_supervised():
    encoder, tokenizer = conversation_encoder("gpt2"), tokenizer_for("gpt2")
    roles = ["user", "assistant", "user", "assistant", "user", "assistant", "user"]
    messages = turns(roles, ["a", "one", "b", "two", "c", "three", "d"])
    messages[3]["weight"] = 0

    ((ids, labels),) = encoder.conversation(one_question(encoder, messages), Counts())

    assert [tokenizer.decode(one) for one in targets([(ids, labels)])] == [
        "one<|im_end|>",
        "three<|im_end|>",
    ]
    assert ids[-1] == labels[-1]
    assert tokenizer.decode(ids).count("two<|im_end|>") == 1


def test_of_two_columns_only_the_completion_is_supervised():
    template = PromptTemplate({**CHAT, "messages": "prompt", "completion": "completion"})
    tokenizer = chat_tokenizer("qwen2_5")
    encoder = PromptEncoder(template, tokenizer, ROOMY)
    row = {
        "prompt": turns(["user", "assistant", "user"], ["a", "one", "b"]),
        "completion": turns(["assistant"], ["two"]),
    }

    encoded = encode_rows(encoder, [row])

    pairs = [(one["input_ids"], one["labels"]) for one in encoded.examples]
    assert [tokenizer.decode(one) for one in targets(pairs)] == ["two<|im_end|>"]


# Nothing is lost in silence


@pytest.mark.parametrize("chat_template", TRL_TEMPLATES)
@pytest.mark.parametrize("what", ["a result", "a call", "a description"])
def test_what_a_chat_template_would_leave_out_is_refused_with_its_row(chat_template, what):
    encoder = limited(chat_encoder(chat_template), ROOMY)
    row = {"messages": turns(["user", "assistant"], ["Hi", "Hello"])}
    if what == "a result":
        row["messages"] += turns(["tool", "assistant"], ["Silberfisch", "Yes"])
    if what == "a call":
        row["messages"][1]["tool_calls"] = [call("weather", town="Silberfisch")]
    if what == "a description":
        row["tools"] = [{"name": "Silberfisch", "description": "Swims.", "parameters": {}}]
    good = {"messages": turns(["user", "assistant"], ["Hi", "Hello"])}
    more = {"a call": ["deepseekv3"], "a description": ["lfm2"]}

    try:
        encoded = encode_rows(encoder, [good, row])
    except UserError as error:
        message = message_of(error)
        assert message.startswith("training row 2 ('Hi'): chat template of ")
        assert what == "a result" or chat_template not in TAKES_CALLS
    else:
        read = chat_tokenizer(chat_template).decode(encoded.examples[-1]["input_ids"])
        assert "Silberfisch" in read
        assert what == "a result" or chat_template.startswith((*TAKES_CALLS, *more[what]))


def test_deepseeks_template_is_given_arguments_as_text_and_one_call_as_it_can_write_no_more():
    encoder, tokenizer = limited(chat_encoder("deepseekv3"), ROOMY), chat_tokenizer("deepseekv3")
    calling = {**turns(["assistant"], [""])[0], "tool_calls": [call("weather", town="Fürth")]}
    once = [*turns(["user"], ["Hi"]), calling, *turns(["tool", "assistant"], ["sunny", "Sunny."])]
    twice = [*once, *turns(["user"], ["And now?"]), calling]

    examples = encoder.conversation(one_question(encoder, once), Counts())

    assert '\n```json\n{"town": "Fürth"}\n```' in tokenizer.decode(targets(examples)[0])
    message = refusal(lambda: encode_rows(encoder, [{"messages": twice}]))
    assert "it does not write calls of tools behind its generation prompt" in message


# One example or several, and whole turns


@pytest.mark.parametrize("chat_template", TRL_TEMPLATES)
@given(contents=st.lists(plain_text(min_words=3), min_size=4, max_size=4))
@settings(max_examples=2)
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


def assert_as_naively(data, encoder, question):
    """With any budget a conversation is encoded as the naive way does."""
    found = limited(encoder, ROOMY).conversation(question, Counts())
    lengths = [len(ids) for ids, _ in found]
    for budget in (ROOMY, data.draw(st.integers(min(lengths) // 2, max(lengths)))):
        counts, naive = Counts(), Counts()
        examples = limited(encoder, budget).conversation(question, counts)
        assert examples == naive_conversation(encoder, question, naive)
        assert counts == naive


@pytest.mark.parametrize("chat_template", TRL_TEMPLATES)
@given(data=st.data())
@settings(max_examples=3)
def test_a_turn_that_is_encoded_once_has_the_ids_of_one_that_is_encoded_again_for_each_answer(
    chat_template, data
):
    encoder, tokenizer = chat_encoder(chat_template), chat_tokenizer(chat_template)
    texts = st.one_of(hostile_text(tokenizer), plain_text(min_words=2)).filter(str.strip)
    messages = data.draw(conversations(texts, tools=False, longest=20))

    assert_as_naively(data, encoder, one_question(encoder, messages))


@pytest.mark.parametrize("chat_template", TAKES_CALLS)
@given(data=st.data())
@settings(max_examples=2)
def test_calls_and_reasons_are_encoded_as_if_each_turn_was_encoded_again_for_each_answer(
    chat_template, data
):
    encoder, texts = chat_encoder(chat_template), plain_text(min_words=2)
    messages = data.draw(conversations(texts, calls=arguments(texts), longest=20))
    if encoder.text.chat.writes_reasoning:
        for turn in messages:
            if turn["role"] == "assistant" and data.draw(st.booleans()):
                turn["reasoning_content"] = data.draw(texts)
    try:
        encoder.conversation(one_question(encoder, messages), Counts())
    except UserError:  # a template that does not write what is reasoned before a call
        assume(False)

    assert_as_naively(data, encoder, one_question(encoder, messages))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=10)
def test_every_kind_of_tokenizer_encodes_a_turn_once_as_if_it_was_encoded_for_each_answer(
    name, data
):
    encoder, texts = conversation_encoder(name), hostile_text(tokenizer_for(name))
    messages = data.draw(conversations(texts.filter(str.strip), tools=False, longest=9))

    assert_as_naively(data, encoder, one_question(encoder, messages))


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

    assert encoded.rows.tolist() == [0, 1]
    counts = encoded.counts
    assert (counts.rows, counts.examples, counts.shortened, counts.left_out) == (2, 2, 1, 1)


# The work that it takes


@pytest.mark.parametrize(
    ("chat_template", "rendered"),
    [("qwen2_5", 4), ("llama3_1", 4), ("phi3", 4), ("cohere", 4), ("qwen3", 32)],
)
def test_templates_that_append_render_a_long_conversation_a_few_times(chat_template, rendered):
    encoder = limited(chat_encoder(chat_template), ROOMY)
    texts = [f"{word} {number}" for number in range(30) for word in ("What is", "It is")]
    question = one_question(encoder, turns(["user", "assistant"] * 30, texts))
    encoder.conversation(question, Counts())  # asks what the template does
    chat = encoder.text.chat

    with mock.patch.object(chat, "_apply", wraps=chat._apply) as apply:
        encoder.conversation(question, Counts())

    assert apply.call_count == rendered


def long_turns(kind, count):
    """A conversation of so many questions, of a kind that costs much."""
    made = []
    for number in range(count):
        made += turns(["user", "assistant"], [f"What is {number}?", f"It is {number}."])
        if kind == "one learned" and number < count - 1:
            made[-1]["weight"] = 0
        if kind == "calls":
            made[-1:-1] = [
                {"role": "assistant", "content": "", "tool_calls": [call("weather", town="x")]},
                {"role": "tool", "content": f"result {number}"},
            ]
        if kind == "reasons":
            made[-1]["reasoning_content"] = f"think of {number}"
        if kind == "too long":
            made[-1]["content"] = words(300)
    return made


@pytest.mark.parametrize("kind", ["answers", "one learned", "calls", "reasons", "too long"])
def test_twice_as_many_turns_are_twice_the_work_over_a_budget(kind):
    work = []
    for count in (40, 80):
        encoder = PromptEncoder(PromptTemplate(CHAT), chat_tokenizer("qwen3"), 200, "chat")
        question = one_question(encoder, long_turns(kind, count))
        chat, rendered = encoder.text.chat, []
        apply = chat._apply

        def count_turns(turns, *more, apply=apply, rendered=rendered):
            rendered.append(len(turns))
            return apply(turns, *more)

        with mock.patch.object(chat, "_apply", count_turns):
            encoder.conversation(question, Counts())
        work.append(sum(rendered))
    assert work[1] < 2.6 * work[0]  # twice, and a step more where the window is looked for


def test_every_text_of_a_conversation_is_encoded_once():
    encoder = limited(chat_encoder("qwen2_5"), ROOMY)
    texts = [f"{word} {number}." for number in range(30) for word in ("Where is", "There is")]
    question, seen = one_question(encoder, turns(["user", "assistant"] * 30, texts)), []
    backend = encoder.text._backend
    spy = SimpleNamespace(encode=lambda text, **kw: seen.append(text) or backend.encode(text, **kw))
    spy.pre_tokenizer = backend.pre_tokenizer

    with mock.patch.object(encoder.text, "_backend", spy):
        encoder.conversation(question, Counts())

    assert {text: sum(text in part for part in seen) for text in texts} == dict.fromkeys(texts, 1)
