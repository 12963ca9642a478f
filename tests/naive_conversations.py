"""Conversations encoded the slow way, with which the tests compare: for every answer all turns
before it are guarded, rendered and encoded anew, and turns are dropped one by one.
"""

from contextlib import contextmanager
from unittest import mock

from recipelib.encoding.prompt_encoder import IGNORED, Counts
from recipelib.encoding.tokens import TextEncoder


@contextmanager
def naively(encoder: TextEncoder):
    """Meanwhile every text is guarded by encoding it, and every chat is encoded whole."""
    with (
        mock.patch.object(encoder, "_looks_controlled", return_value=True),
        mock.patch.object(encoder, "chat_ids", encoder._ids),
    ):
        yield


def naive_conversation(encoder, question, counts: Counts):
    """What `PromptEncoder.conversation` gives."""
    with naively(encoder.text):
        return _conversation(encoder, question, counts)


def _conversation(encoder, question, counts):
    examples = []
    turns = [
        {**turn, "content": turn["content"].strip()} if turn["role"] == "assistant" else turn
        for turn in encoder.text.with_reasoning(question.turns)
    ]
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant" or turn.get("weight") == 0:
            continue
        before, whole = turns[:place], True
        prompt = encoder.text.chat_prompt(before, question.tools)
        if "tool_calls" in turn or "reasoning_content" in turn:
            guarded, tools = encoder.text.guard_turns(turns, question.tools)
            target = encoder.text.chat_written(guarded[:place], guarded[place], tools)
        else:
            target = encoder.text.chat_answer(turn["content"]) + encoder.text.chat_end(before)
        if len(prompt) + len(target) > encoder.max_length:
            prompt = _shorter(encoder, before, question.tools, encoder.max_length - len(target))
            if prompt is None:
                counts.left_out += 1
                continue
            counts.shortened += 1
            whole = False
        ids, labels = prompt + target, [IGNORED] * len(prompt) + target
        if whole and examples and ids[: len(examples[-1][0])] == examples[-1][0]:
            _, earlier = examples.pop()
            labels[: len(earlier)] = earlier
        examples.append((ids, labels))
    return examples


def _shorter(encoder, turns, tools, budget):
    system = turns[:1] if turns[0]["role"] == "system" else []
    rest = turns[len(system) :]
    for start, turn in enumerate(rest):
        if turn["role"] == "user" and start > 0:
            ids = encoder.text.chat_prompt([*system, *rest[start:]], tools)
            if len(ids) <= budget:
                return ids
    return None
