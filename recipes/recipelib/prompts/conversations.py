"""Reads conversations in the forms that data sets hold them into turns that chat templates take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipelib.prompts.columns import MEDIA
from recipelib.prompts.values import RowError, as_list, is_empty, read_json

# A turn has role and content. An assistant's may have reasoning_content, tool_calls and weight; a
# tool's may have name and tool_call_id.
Turn = Mapping[str, Any]


# The names that roles have in data sets -> those that chat templates know.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")  # whose content is the call

# Keys of turns. Most turns have no others than these:
_PLAIN = {"role", "content", "from", "value"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Those that say whether a turn is learned -> whether a true one says so.
_FLAGS = {
    **dict.fromkeys(("weight", "loss_weight", "loss_mask", "loss", "train", "training"), True),
    **dict.fromkeys(("trainable", "trained", "learn", "supervised"), True),
    **dict.fromkeys(("mask", "masked", "is_masked", "ignore_loss", "no_loss"), False),
}
_LIKE_A_FLAG = re.compile("train|loss|weight|mask|learn|supervis")
# Those that change what the turn says, and what is wrong with them:
_REFUSED = {
    **dict.fromkeys(MEDIA, "only text is learned, leave the row out"),
    **dict.fromkeys(("tools", "functions"), "move them to a column 'tools' of the row"),
    **dict.fromkeys(("chosen", "rejected"), "no recipe learns preferences, keep one as content"),
}
# Those that say nothing about what is learned:
_HARMLESS = {
    *("id", "uuid", "name", "index", "turn", "turn_id", "turn_identifier", "message_id"),
    *("conversation_id", "parent_id", "tool_call_id", "timestamp", "time", "date", "created"),
    *("created_at", "create_time", "model", "language", "lang", "tokens", "token_count"),
    *("num_tokens", "finish_reason", "type"),
}
_READ = {*_PLAIN, *_REASONING, *_FLAGS, *_REFUSED, *_HARMLESS, "channel", "tool_calls"}
_READ.add("function_call")

# Reasoning in front of an answer, as DeepSeek-R1 and Qwen3 write it and data sets keep it.
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


_DEEPEST = 50  # levels of a tool call's arguments


def read_turns(
    columns: Mapping[str, Any],
    *,
    system: Any = None,
    learn_all: bool = False,
    learn: bool = True,
    unread: set[str] | None = None,
) -> tuple[Turn, ...]:
    """The turns of a conversation as chat templates take them: {role, content} with the roles
    system, user, assistant and tool.

    It reads OpenAI's {role, content} and ShareGPT's {from, value}, contents as lists of text parts,
    tool calls in OpenAI's forms (`tool_calls`, the older `function_call`, arguments as JSON text)
    and ShareGPT's `function_call` turns, and all of it as JSON text. A tool's turn that names no
    call answers the call in the same place: the first turn the first call, and so on. A system turn
    without text is left out. A turn that is not to be learned, by whichever flag, has OpenAI's
    `weight: 0`. The assistant's reasoning, beside the content (reasoning_content, reasoning,
    thinking) or at its beginning (<think>...</think>), becomes `reasoning_content`.

    The order must be: at most one system turn, then a user's turn, then the rest. Two turns of the
    user, or two of the assistant, never follow each other, and a tool's turn follows the
    assistant's or another tool's. The conversation may end with turns of the user or of tools;
    nothing is learned from them.

    Args:
        columns: column -> list of turns. Several columns are one conversation, of which only the
            last column's turns are learned (TRL's conversational prompt and completion).
        system: text of a system turn in front of them; empty or null for none.
        learn_all: whether the turns of all columns are learned.
        learn: False for turns that are to be answered: then they need no answer, and a last one
            of the assistant's that is empty is left out.
        unread: is added the keys of turns that have a value which nothing reads.
    Raises:
        RowError: a column holds no such list; the error names the turn, counted from 1.
    """
    turns: list[dict[str, Any]] = []
    unread = set() if unread is None else unread
    told = ""
    if not is_empty(system):
        try:
            told = _read_content(system)
        except RowError as error:
            raise RowError(f"system: {error}") from None
        turns.append({"role": "system", "content": told})
    for column, value in columns.items():
        for turn in turns:
            if turn["role"] == "assistant" and not learn_all:
                turn["weight"] = 0
        raws = read_list(value, column)
        for number, raw in enumerate(raws, start=1):
            if not learn and number == len(raws) and _is_blank_answer(raw):
                continue
            try:
                turn = _read_turn(raw, unread)
                if turn["role"] == "system" and not turn["content"].strip():
                    continue
                if told and turn["role"] == "system" and len(turns) == 1:
                    if turn["content"].strip() == told.strip():
                        continue
                    raise RowError("is a system turn beside the one in 'system'; keep one of them")
                _refuse_misplaced(turn["role"], turns[-1]["role"] if turns else None)
            except RowError as error:
                raise RowError(f"{column}: turn {number} {error}") from None
            if turn["role"] == "tool":
                _name_result(turn, turns)
            turns.append(turn)
    if not learn:
        if not turns or turns[-1]["role"] == "system":
            raise RowError(f"{column}: no turn of the user, so nothing to answer; add one")
        return tuple(turns)
    if not any(turn["role"] == "assistant" and turn.get("weight") != 0 for turn in turns):
        raise RowError(f"{column}: no assistant turn, so nothing to learn; leave the row out")
    return tuple(turns)


def _is_blank_answer(raw: Any) -> bool:
    """Whether a turn is an assistant's that says nothing: room for an answer."""
    if not _is_map(raw) or _ROLES.get(str(raw.get("role", raw.get("from")))) != "assistant":
        return False
    says = ("content", "value", "tool_calls", "function_call", *_REASONING)
    return all(is_empty(raw.get(key)) for key in says)


def read_history(value: Any, column: str = "history") -> list[Turn]:
    """The turns of a conversation's beginning: a list of [question, answer] pairs, as
    LLaMA-Factory's Alpaca format has it, or of turns; or JSON text of either. Null, "" and [] are
    no turns.

    Raises:
        RowError: `value` is no such list.
    """
    turns: list[Turn] = []
    for number, item in enumerate(read_list(value, column), start=1):
        if _is_map(item):
            turns.append(item)
            continue
        pair = as_list(item)
        if len(pair) != 2:
            raise RowError(f"{column}: item {number} is no [question, answer]; mend it")
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def read_list(value: Any, column: str) -> list:
    """The list in a column, which may be JSON text.

    Raises:
        RowError: it begins like JSON and is none.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        if value.lstrip()[0] in "[{":
            try:
                value = read_json(value, "the list")
            except RowError as error:
                raise RowError(f"{column}: {error}") from None
    return [] if value is None else as_list(value)


def _read_turn(raw: Any, unread: set[str]) -> dict[str, Any]:
    if isinstance(raw, str) and raw.lstrip().startswith("{"):
        raw = read_json(raw, "the turn")
    given = {key: value for key, value in raw.items() if value is not None} if _is_map(raw) else {}
    name = given.get("role", given.get("from"))
    if name is None:
        raise RowError("is no {role, content} or {from, value}; convert the conversation")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None and isinstance(name, str):
        name = name.strip().casefold().replace("-", "_")
        role = _ROLES.get(name)
    if role is None:
        raise RowError(
            f"has the role {given.get('role', given.get('from'))!r}; use system, user, assistant "
            "or tool"
        )
    content = given.get("content", given.get("value", ""))
    if "value" in given and content != given["value"] != "":
        raise RowError("has both content and value; keep one of them")
    turn = {"role": role, "content": _read_content(content)}
    if role == "assistant" and (thought := _THOUGHT.fullmatch(turn["content"])):
        turn |= {"content": thought[2].lstrip(), "reasoning_content": thought[1].strip()}
    calls = None
    if given.keys() - _PLAIN:
        calls = given.get("tool_calls") or given.get("function_call")
        _read_more(given, turn)
        unread.update(key for key in given.keys() - _READ if _says_something(given[key]))
    if not turn.get("reasoning_content"):
        turn.pop("reasoning_content", None)
    if name in _CALLS:  # ShareGPT's: the content is the call
        calls, turn["content"] = calls or read_json(turn["content"], "the call"), ""
    if calls:
        if role != "assistant":
            raise RowError(f"calls a tool as {role}; only the assistant does")
        if isinstance(calls, str) and calls.lstrip()[:1] in ("[", "{"):
            calls = read_json(calls, "its calls")
        turn["tool_calls"] = [_read_call(call) for call in as_list(calls)]
    elif role != "system" and not turn["content"].strip():
        raise RowError("is empty; fill it or leave the row out")
    return turn


def _read_more(given: Mapping[str, Any], turn: dict[str, Any]) -> None:
    """Read the keys of a turn besides its role and text."""
    role, said = turn["role"], {}
    for key, value in given.items():
        if key in _PLAIN or is_empty(value):
            continue
        if key in _REASONING:
            if not isinstance(value, str):
                raise RowError(f"has {key} that is no text; write the text alone")
            if role != "assistant":
                raise RowError(f"has {key} as {role}; only the assistant's is learned, remove it")
            if (turn.get("reasoning_content") or value.strip()) != value.strip():
                raise RowError(f"has {key} beside another reasoning; keep one of them")
            turn["reasoning_content"] = value.strip()
        elif key in _FLAGS:
            said[_read_flag(key, value) == _FLAGS[key]] = key
        elif key in _REFUSED:
            raise RowError(f"has {key}: {_REFUSED[key]}")
        elif key == "channel" and value != "final":
            raise RowError(f"has the channel {value!r}; write reasoning as reasoning_content")
        elif _LIKE_A_FLAG.search(key.casefold()):
            raise RowError(
                f"has {key}, which may say what of it is learned; write weight: 1 or 0 for the "
                "whole turn instead"
            )
    if len(said) == 2:
        raise RowError(f"is learned by {said[True]} and not by {said[False]}; keep one of them")
    if True in said and role != "assistant":
        raise RowError(
            f"is to be learned as {role} ({said[True]}); only the assistant's turns are, remove it"
        )
    if False in said and role == "assistant":
        turn["weight"] = 0
    if role == "tool":
        turn |= {key: str(given[key]) for key in ("name", "tool_call_id") if key in given}


def _says_something(value: Any) -> bool:
    return value is not False and value != 0 and not is_empty(value)


def _read_flag(key: str, value: Any) -> bool:
    text = str(value).strip().casefold()
    if key == "mask" and text not in ("true", "false"):  # of the loss, or from the loss?
        raise RowError(f"has mask {value!r:.60}, which may mean either; write weight: 1 or 0")
    if text in ("1", "1.0", "true", "yes"):
        return True
    if text in ("0", "0.0", "false", "no"):
        return False
    raise RowError(f"has {key} {value!r:.60}; a turn is learned or not, so write 1 or 0")


def _read_content(content: Any) -> str:
    """The text of a turn's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(map(_read_part, as_list(content)))


def _read_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind, text, flag = type(part).__name__, None, None
    if _is_map(part):
        kind, text = str(part.get("type") or "text"), part.get("text", part.get("value"))
        flag = next((key for key in part if _LIKE_A_FLAG.search(key) and part[key] is not None), "")
    if not isinstance(text, str) or "text" not in kind:
        raise RowError(f"holds a part that is no text ({kind}); only text is learned")
    if flag:
        raise RowError(
            f"holds a part with {flag}; only whole turns are learned or not, so write weight: 1 or "
            "0 beside the content"
        )
    return text


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
        arguments = read_json(arguments or "{}", f"the arguments of {name}")
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
            value = read_json(value, "the list") if value.strip() else None
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
