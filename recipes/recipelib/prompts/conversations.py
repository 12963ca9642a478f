"""Reads conversations in the forms that data sets hold them into turns that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipelib.prompts.values import RowError, as_list

# A turn has role and content. An assistant's may have reasoning_content, tool_calls and weight; a
# tool's may have name and tool_call_id.
Turn = Mapping[str, Any]


# OpenAI's and ShareGPT's names of roles -> those that chat templates know.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}


# Reasoning in front of an answer, as DeepSeek-R1 and Qwen3 write it and data sets keep it.
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


_DEEPEST = 50  # levels of a tool call's arguments


def read_turns(columns: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a conversation as chat templates take them: {role, content} with the roles
    system, user, assistant and tool.

    It reads OpenAI's {role, content} and ShareGPT's {from, value}, contents as lists of text parts,
    tool calls in OpenAI's forms (`tool_calls`, the older `function_call`, arguments as JSON text)
    and ShareGPT's `function_call` turns. A tool's turn that names no call answers the call in the
    same place: the first turn the first call, and so on. A system turn without text is left out. A
    turn that is not to be learned keeps OpenAI's `weight: 0`. The assistant's reasoning, beside the
    content (reasoning_content, reasoning, thinking) or at its beginning (<think>...</think>),
    becomes `reasoning_content`. Other keys are dropped.

    The order must be: at most one system turn, then a user's turn, then the rest. Two turns of the
    user, or two of the assistant, never follow each other, and a tool's turn follows the
    assistant's or another tool's. The conversation may end with turns of the user or of tools;
    nothing is learned from them.

    Args:
        columns: column -> list of turns. Several columns are one conversation, of which only the
            last column's turns are learned (TRL's conversational prompt and completion).
    Raises:
        RowError: a column holds no such list; the error names the turn, counted from 1.
    """
    turns: list[dict[str, Any]] = []
    for column, value in columns.items():
        for turn in turns:
            if turn["role"] == "assistant":
                turn["weight"] = 0
        for number, raw in enumerate(as_list(value), start=1):
            try:
                turn = _read_turn(raw)
                if turn["role"] == "system" and not turn["content"].strip():
                    continue
                _refuse_misplaced(turn["role"], turns[-1]["role"] if turns else None)
            except RowError as error:
                raise RowError(f"{column}: turn {number} {error}") from None
            if turn["role"] == "tool":
                _name_result(turn, turns)
            turns.append(turn)
    if not any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in turns):
        raise RowError(f"{column}: no assistant turn, so nothing to learn; leave the row out")
    return tuple(turns)


def _read_turn(raw: Any) -> dict[str, Any]:
    given = {key: value for key, value in raw.items() if value is not None} if _is_map(raw) else {}
    name = given.get("role", given.get("from"))
    if name is None:
        raise RowError("is no {role, content} or {from, value}; convert the conversation")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"has the role {name!r}; use system, user, assistant or tool")
    turn = {"role": role, "content": _read_content(given.get("content", given.get("value", "")))}
    if role == "assistant" and (thought := _THOUGHT.fullmatch(turn["content"])):
        turn |= {"content": thought[2].lstrip(), "reasoning_content": thought[1].strip()}
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(given.get(key), str) and given[key].strip():
            if role != "assistant":
                raise RowError(f"has {key} as {role}; only the assistant's is learned, remove it")
            turn["reasoning_content"] = given[key].strip()
    if not turn.get("reasoning_content"):
        turn.pop("reasoning_content", None)
    calls = given.get("tool_calls") or given.get("function_call")
    if name == "function_call":  # ShareGPT's: the content is the call
        calls, turn["content"] = calls or _read_json(turn["content"], "the call"), ""
    if calls:
        if role != "assistant":
            raise RowError(f"calls a tool as {role}; only the assistant does")
        turn["tool_calls"] = [_read_call(call) for call in as_list(calls)]
    elif role != "system" and not turn["content"].strip():
        raise RowError("is empty; fill it or leave the row out")
    if role == "tool":
        turn |= {key: str(given[key]) for key in ("name", "tool_call_id") if key in given}
    if role == "assistant" and given.get("weight") == 0:
        turn["weight"] = 0
    return turn


def _read_content(content: Any) -> str:
    """The text of a turn's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    texts = []
    for part in as_list(content):
        if isinstance(part, str):
            texts.append(part)
        elif _is_map(part) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if _is_map(part) else type(part).__name__
            raise RowError(f"holds a part that is no text ({kind}); only text is learned")
    return "".join(texts)


def _refuse_misplaced(role: str, before: str | None) -> None:
    """Refuse a turn of `role` behind one of `before`, which is None at the beginning."""
    if role == "system" and before is not None:
        raise RowError("is a system turn; move it to the beginning or leave the row out")
    if role == "assistant" and before in (None, "system"):
        raise RowError("is the assistant's, who speaks first; begin with the user's turn")
    if role == "tool" and before not in ("assistant", "tool"):
        raise RowError("is a tool's but follows no assistant turn; mend the order")
    if role == before and role != "tool":
        raise RowError(f"is the {role}'s like the one before; join the two or mend the order")


def _name_result(result: dict[str, Any], turns: Sequence[Turn]) -> None:
    """Give a tool's turn the name and id of the call it answers, which some templates want."""
    place = 0
    while turns[-1 - place]["role"] == "tool":
        place += 1
    calls = turns[-1 - place].get("tool_calls", ())
    identity = result.get("tool_call_id")
    answered = [call for call in calls if call.get("id") == identity] if identity else calls[place:]
    for call in answered[:1]:
        result.setdefault("name", call["function"]["name"])
        if "id" in call:
            result["tool_call_id"] = call["id"]


def _read_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if _is_map(call) else None
    function = function if _is_map(function) else call
    name = function.get("name") if _is_map(function) else None
    if not isinstance(name, str) or not name:
        raise RowError("calls a tool without {name, arguments}; mend the call")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _read_json(arguments or "{}", f"the arguments of {name}")
    arguments = {} if arguments is None else _without_nulls(arguments, f"the arguments of {name}")
    if not _is_map(arguments):
        raise RowError(f"calls {name} with arguments that are no {{name: value}}; mend the call")
    identity = {"id": str(call["id"])} if call.get("id") is not None else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def read_tools(value: Any, column: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The functions that a row lets the assistant call, each as {type: function, function: {name,
    description, parameters}}.

    Args:
        value: a list of such functions, or of their inner {name, ...} only, or that list as JSON
            text; null, "" and [] mean no functions.
    Raises:
        RowError: `value` is not such a list.
    """
    try:
        if isinstance(value, str):
            value = _read_json(value, "the list") if value.strip() else None
        tools = []
        for number, tool in enumerate([] if value is None else as_list(value), start=1):
            tool = _without_nulls(tool, f"tool {number}")
            function = tool.get("function", tool) if _is_map(tool) else None
            if not _is_map(function) or not isinstance(function.get("name"), str):
                raise RowError(
                    f"tool {number} is no {{name, description, parameters}}; mend it, or rename a "
                    "column that holds something else"
                )
            tools.append({"type": "function", "function": function})
    except RowError as error:
        raise RowError(f"{column}: {error}") from None
    return tuple(tools)


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _read_json(text: str, what: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise RowError(f"has no JSON for {what} ({problem}); mend it") from None
    return value


def _without_nulls(value: Any, what: str, depth: int = 0) -> Any:
    """The value without keys whose value is null: Arrow's tables, and so Parquet, give every row
    the keys of all rows.
    """
    if depth > _DEEPEST:
        raise RowError(f"nests {what} more than {_DEEPEST} levels deep; flatten it")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {
            str(key): _without_nulls(inner, what, depth + 1)
            for key, inner in value.items()
            if inner is not None
        }
    if isinstance(value, list | tuple):
        return [_without_nulls(inner, what, depth + 1) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)  # dates and other types that JSON lacks
