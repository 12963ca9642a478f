"""Conversations, calls and tools are read in every form in which data sets have them, and what
cannot be learned says where it is wrong.
"""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_fields import make, one_line

from recipelib.prompts.conversations import read_tools, read_turns
from recipelib.prompts.values import RowError

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}

SHARED = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(turns):
    return list(read_turns({"chat": turns}))


def refused(turns):
    with pytest.raises(RowError) as error:
        read(turns)
    return one_line(error)


def conversation(letters):
    return [{"role": ROLES[one], "content": f"text {n}"} for n, one in enumerate(letters)]


def in_order(letters):
    return re.fullmatch("(?!.*(uu|aa|ut|.s))s?u[uat]*", letters)


@given(st.text("suat", min_size=1, max_size=7))
@settings(max_examples=500)
def test_turns_are_read_as_they_stand_and_out_of_order_named_by_their_number(letters):
    turns = conversation(letters)
    good = [letters[:end] for end in range(len(letters) + 1) if in_order(letters[:end])]
    if in_order(letters) and "a" in letters:
        assert read(turns) == turns
    elif in_order(letters) or letters == "s":
        assert refused(turns) == "chat: no assistant turn, so nothing to learn; leave the row out"
    else:
        first_bad = len(good[-1]) + 1 if good else 1 + (letters[0] == "s")
        assert refused(turns).startswith(f"chat: turn {first_bad} is ")


@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=6, max_size=6),
    st.sampled_from(["suatau", "uaua", "uatta", "sua"]),
    st.sampled_from(["ShareGPT", "ShareGPT's roles", "parts", "array", "nulls"]),
)
def test_every_way_of_writing_a_conversation_reads_the_same(texts, letters, way):
    turns = [{"role": ROLES[a], "content": b} for a, b in zip(letters, texts, strict=False)]
    write = {
        "ShareGPT": lambda one: {"from": SHARED[one["role"]], "value": one["content"]},
        "ShareGPT's roles": lambda one: {**one, "role": SHARED[one["role"]]},
        "parts": lambda one: {
            "role": one["role"],
            "content": [
                {"type": "text", "text": one["content"][:2]},
                {"type": "text", "text": one["content"][2:]},
            ],
        },
        "array": lambda one: one,
        "nulls": lambda one: {**one, "from": None, "tool_calls": None, "weight": None},
    }[way]
    written = [write(one) for one in turns]
    assert read(np.array(written) if way == "array" else written) == turns


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("hello", "turn 1 is no {role, content} or {from, value}; convert the conversation"),
        ([{"role": "bot", "content": "x"}], "turn 1 has the role 'bot'; use system, user"),
        ([{"role": ["user"], "content": "x"}], "turn 1 has the role ['user']; use system, user"),
        ([HI[0], {"role": "assistant", "content": " "}], "turn 2 is empty"),
        ([{"role": "user", "content": None}], "turn 1 is empty"),
        ([{"from": "human", "value": []}], "turn 1 is empty"),
        ([{"role": "user", "content": "x"}], "no assistant turn, so nothing to learn"),
        ([], "no assistant turn, so nothing to learn"),
        ([HI[0], {**HI[1], "weight": 0}], "no assistant turn, so nothing to learn"),
        (
            [{"role": "system", "content": "x"}, HI[1]],
            "turn 2 is the assistant's, who speaks first; begin with the user's turn",
        ),
        ([*HI, {"role": "system", "content": "x"}], "turn 3 is a system turn; move it"),
        ([HI[0], HI[0], HI[1]], "turn 2 is the user's like the one before; join the two"),
        ([HI[0], {"role": "tool", "content": "x"}], "turn 2 is a tool's but follows no assistant"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "turn 1 holds a part that is no text (image_url); only text is learned",
        ),
        (
            [{**HI[0], "reasoning_content": "It is a greeting."}, HI[1]],
            "turn 1 has reasoning_content as user; only the assistant's is learned, remove it",
        ),
    ],
)
def test_a_conversation_that_cannot_be_learned_says_why(turns, problem):
    template = make({"name": "task", "form": "generative", "messages": "chat"})
    with pytest.raises(RowError, match=re.escape(problem)) as error:
        template.questions({"chat": turns})
    assert one_line(error).startswith("chat: ")


def test_turns_to_answer_need_a_question_and_no_answer():
    template = make({"name": "task", "form": "generative", "messages": "chat", "completion": "end"})

    def asked(turns, **more):
        (question,) = template.questions({"chat": turns, **more}, answers=False)
        return list(question.turns)

    blank = {"role": "assistant", "content": ""}
    assert asked(HI[:1]) == asked([*HI[:1], blank]) == asked(HI[:1], end=None) == HI[:1]
    assert asked(HI[:1], end=[HI[1]])[-1]["content"] == HI[1]["content"]
    for turns in ([{"role": "system", "content": "x"}], []):
        with pytest.raises(RowError, match="no turn of the user, so nothing to answer; add"):
            asked(turns)


def test_a_system_turn_without_text_is_none():
    assert read([{"from": "system", "value": ""}, *HI]) == HI
    assert refused([{"from": "system", "value": ""}, HI[1]]).startswith("chat: turn 2 is the ")


def test_a_turn_that_is_not_to_be_learned_keeps_its_weight():
    turns = [HI[0], {**HI[1], "weight": 0}, HI[0], {**HI[1], "weight": 1}]
    assert [one.get("weight") for one in read(turns)] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("flag", "learned"),
    [
        *(({key: no}, False) for key in ("weight", "loss_weight") for no in (0, 0.0, "0")),
        *(({key: False}, False) for key in ("train", "training", "loss", "trainable")),
        *(({key: True}, False) for key in ("mask", "masked", "ignore_loss")),
        *(({key: yes}, True) for key in ("weight", "train", "loss") for yes in (1, True, "true")),
        ({"mask": False, "train_detail": []}, True),
    ],
)
def test_every_flag_that_says_whether_a_turn_is_learned_is_obeyed(flag, learned):
    first, second = [turn for turn in read([HI[0], {**HI[1], **flag}, *HI]) if turn != HI[0]]
    assert (first.get("weight") != 0, second) == (learned, HI[1])
    off = {key: not value if isinstance(value, bool) else 0 for key, value in flag.items()}
    if learned and len(flag) == 1:  # of the user nothing is learned
        assert read([{**HI[0], **off}, HI[1]]) == HI
        assert "is to be learned as user" in refused([{**HI[0], **flag}, HI[1]])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"weight": 0.5}, "has weight 0.5; a turn is learned or not, so write 1 or 0"),
        ({"weight": "high"}, "has weight 'high'; a turn is learned or not"),
        ({"mask": 1}, "has mask 1, which may mean either; write weight: 1 or 0"),
        ({"weight": 1, "train": False}, "is learned by weight and not by train; keep one"),
        ({"train_detail": [{"train": False}]}, "has train_detail, which may say what of it is"),
        ({"loss_multiplier": 2}, "has loss_multiplier, which may say what of it is learned"),
        ({"content": [{"type": "text", "text": "x", "train": False}]}, "holds a part with train"),
        ({"content": [{"type": "image_url", "text": "x"}]}, "holds a part that is no text (image"),
        ({"images": ["a.png"]}, "has images: only text is learned, leave the row out"),
        ({"tools": ["look"]}, "has tools: move them to a column 'tools' of the row"),
        ({"channel": "analysis"}, "has the channel 'analysis'; write reasoning as reasoning_co"),
        ({"reasoning": {"text": "x"}}, "has reasoning that is no text; write the text alone"),
        ({"reasoning": "x", "thinking": "y"}, "has thinking beside another reasoning; keep one"),
        ({"value": "y"}, "has both content and value; keep one of them"),
        ({"role": "critic"}, "has the role 'critic'; use system, user, assistant or tool"),
    ],
)
def test_what_changes_a_turn_and_cannot_be_done_is_refused(more, problem):
    assert refused([HI[0], {**HI[1], **more}]).startswith(f"chat: turn 2 {problem}")


def test_turns_may_be_json_text_and_their_roles_be_written_otherwise():
    call = '{"name": "look", "arguments": {}}'
    turns = [
        {"from": "User", "value": "Hi"},
        {"from": "tool-call", "value": call},
        {"role": "ipython", "content": "there"},
        json.dumps({"role": "Assistant", "content": "Hello", "tool_calls": f"[{call}]"}),
    ]
    for written in (turns, json.dumps(turns)):
        roles = [turn["role"] for turn in read(written)]
        assert roles == ["user", "assistant", "tool", "assistant"]
        assert [turn["tool_calls"][0]["function"] for turn in read(written)[1::2]] == [
            {"name": "look", "arguments": {}}
        ] * 2
    assert refused('[{"role": "user"').startswith("chat: has no JSON for the list (Expecting ','")
    assert refused(str(HI)).endswith("it is Python's, write it with json.dumps")


def test_a_system_column_goes_before_the_turns_and_a_second_instruction_is_refused():
    template = make({"name": "task", "form": "generative", "messages": "chat"})
    told = {"role": "system", "content": "Be."}
    assert list(template.questions({"chat": HI, "system": "Be."})[0].turns) == [told, *HI]
    assert list(template.questions({"chat": [told, *HI], "system": "Be. "})[0].turns)[1:] == HI
    with pytest.raises(RowError, match="chat: turn 1 is a system turn beside the one in 'system'"):
        template.questions({"chat": [told, *HI], "system": "Be not."})
    own = make({**template.fields, "system": "In {{ tongue }}."})
    row = {"chat": HI, "tongue": "French", "system": "Be."}
    (question,) = own.questions(row)
    assert question.turns[0] == {"role": "system", "content": "In French."}
    assert question.unread == ("the column 'system'",)
    assert own.missing_columns(["chat"]) == ["tongue"]


def test_a_history_goes_before_prompt_and_answer_and_all_of_it_is_learned():
    fields = {"name": "t", "form": "generative", "prompt": "{{ ask }}", "answer": " {{ gold }}"}
    template = make({**fields, "history": "earlier", "system": "Be."})
    row = {"ask": "Hi", "gold": "Hello", "earlier": [["a", "b"], ["c", "d"]]}
    (question,) = template.questions(row)
    said = ["Be.", "a", "b", "c", "d", "Hi", "Hello"]
    assert [turn["content"] for turn in question.turns] == said
    assert template.metric == "loss"
    for history, problem in [
        ([["a"]], "earlier: item 1 is no [question, answer]; mend it"),
        ([["a", "b"], "c"], "earlier: item 2 is no [question, answer]"),
        ([["a", ""]], "earlier: turn 2 is empty"),
        ("[[", "earlier: has no JSON for the list"),
    ]:
        with pytest.raises(RowError, match=re.escape(problem)):
            template.questions({**row, "earlier": history})
    with pytest.raises(RowError, match="gold is empty"):
        template.questions({**row, "gold": ""})


def test_of_a_prompt_and_its_completion_only_the_completion_is_learned():
    template = make(
        {"name": "task", "form": "generative", "messages": "ask", "completion": "answer"},
        columns={"ask": "prompt"},
    )
    row = {"prompt": [*HI, HI[0]], "answer": [HI[1], HI[0], HI[1]]}
    (question,) = template.questions(row)
    assert list(question.turns) == [HI[0], {**HI[1], "weight": 0}, HI[0], HI[1], HI[0], HI[1]]
    assert template.missing_columns(["answer"]) == ["prompt"]
    with pytest.raises(RowError, match="answer: turn 1 is the user's like the one before"):
        template.questions({**row, "answer": [HI[0]]})


# Calls of tools

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "ü", "n": [1]}}}

CALLING = [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]

CALL_TEXT = '{"name": "look", "arguments": {"at": "ü", "n": [1]}}'


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": np.array([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "content": [], "function_call": CALL["function"]},
        {"from": "function_call", "value": CALL_TEXT},
        {"from": "function_call", "value": f"[{CALL_TEXT}]"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "ü", "n": [1]}'}}],
        },
        {  # as Parquet has it
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": None,
                    "function": {
                        "name": "look",
                        "arguments": {"at": "ü", "n": np.array([1]), "other": None},
                    },
                }
            ],
        },
    ],
)
def test_every_way_of_writing_a_call_reads_the_same(turn):
    assert read([HI[0], turn]) == CALLING


def test_a_result_keeps_its_name_or_has_that_of_the_call_that_it_answers():
    first = {**CALL, "id": "call_1"}
    second = {"type": "function", "function": {"name": "ask", "arguments": {}}}
    turns = [
        HI[0],
        {"role": "assistant", "content": "I look.", "tool_calls": [first, second]},
        {"role": "function", "content": "there"},
        {"role": "tool", "content": "nothing"},
        {"role": "tool", "content": "again", "tool_call_id": "call_1"},
        {"role": "tool", "content": "and", "name": "mine", "tool_call_id": "call_2"},
        {"role": "tool", "content": "so on"},
        HI[1],
        {"role": "tool", "content": "uncalled"},
    ]
    named = [
        {"name": "look", "tool_call_id": "call_1"},
        {"name": "ask"},
        {"name": "look", "tool_call_id": "call_1"},
        *({}, {}, {}, {}),
    ]
    expected = [*turns[:2], *({**a, **b} for a, b in zip(turns[2:], named, strict=True))]
    expected[2]["role"] = "tool"
    assert read([{**one, "other": 1} for one in turns]) == expected


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        (
            {"from": "function_call", "value": "look(1)"},
            "has no JSON for the call (Expecting value",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "calls a tool without {name, arg"),
        ({"role": "assistant", "tool_calls": ["look"]}, "calls a tool without {name, arguments}"),
        (
            {"role": "assistant", "tool_calls": [{"name": "look", "arguments": "{"}]},
            "has no JSON for the arguments of look (",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "look", "arguments": '"\\ud800"'}]},
            "has no JSON for the arguments of look ('utf-8' codec can't encode",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "look", "arguments": [1]}]},
            "calls look with arguments that are no {name: value}; mend the call",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "look", "arguments": '{"a":' * 9999}]},
            "has no JSON for the arguments of look (",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"name": "look", "arguments": '{"a":' * 60 + "1" + "}" * 60}],
            },
            "nests the arguments of look more than 50 levels deep",
        ),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "calls a tool as user; only"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(turn, problem):
    assert refused([HI[0], HI[1], turn]).startswith(f"chat: turn 3 {problem}")


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        np.array([TOOL]),
        [TOOL["function"]],
        json.dumps([TOOL]),
        json.dumps(TOOL["function"]),
        [{"type": "function", "function": {**TOOL["function"], "strict": None}, "x": None}],
    ],
)
def test_every_way_of_describing_tools_reads_the_same(value):
    assert read_tools(value) == (TOOL,)


@pytest.mark.parametrize("value", [None, "", " ", [], "[]"])
def test_no_tools_are_none(value):
    assert read_tools(value) == ()


def test_tools_stand_in_a_column_of_their_own():
    template = make({"name": "task", "form": "generative", "messages": "chat"})
    assert template.questions({"chat": HI, "tools": [TOOL]})[0].tools == (TOOL,)
    assert template.questions({"chat": HI, "tools": None})[0].tools == ()
    named = make({"name": "t", "form": "generative", "messages": "chat"}, columns={"tools": "api"})
    assert named.questions({"chat": HI, "api": json.dumps([TOOL])})[0].tools == (TOOL,)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (["hammer"], "tool 1 is no {name, description, parameters}; mend it, or rename a column"),
        ([TOOL, {"type": "function"}], "tool 2 is no {name, description, parameters}"),
        ("hammer", "has no JSON for the list (Expecting value"),
        ([{"name": "x", "parameters": json.loads('{"a":' * 60 + "1" + "}" * 60)}], "nests tool 1"),
    ],
)
def test_tools_that_are_none_say_why(value, problem):
    with pytest.raises(RowError) as error:
        read_tools(value)
    assert one_line(error).startswith(f"tools: {problem}")
