"""What stands in a row besides plain text: lists, conversations, tagged tokens."""

from collections.abc import Mapping, Sequence
from typing import Any


class RowError(ValueError):
    """What is wrong with one row, and its cure; `data.py` adds the file and the row's number."""


def as_list(value: Any) -> list:
    """A list, tuple or array as a list; anything else as the only element of one."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def read_turns(value: Any, column: str) -> tuple[Mapping[str, str], ...]:
    """The turns of a conversation: a list of {role, content} with an assistant's turn, which does
    not begin with it.

    Raises:
        RowError: it is no such list.
    """
    turns = as_list(value)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise RowError(
                f"{column}: turn {number} is no {{role, content}}; convert the conversation"
            )
        if turn["role"] not in ("system", "user", "assistant", "tool"):
            raise RowError(
                f"{column}: turn {number} has the role {turn['role']!r}; "
                "use system, user, assistant or tool"
            )
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise RowError(f"{column}: turn {number} is empty; fill it or leave the row out")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(f"{column}: no assistant turn, so nothing to learn; leave the row out")
    if next(turn["role"] for turn in turns if turn["role"] != "system") == "assistant":
        raise RowError(f"{column}: the assistant speaks first; begin with the user's turn")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def read_entities(
    tokens: Sequence[str], tags: Sequence[str], types: Mapping[str, Any]
) -> list[tuple[str, str, int, int]]:
    """The entities of a BIO-tagged sentence as (type, text, start, end), characters of the tokens
    joined by spaces.

    An `I-` that continues nothing begins an entity, as conlleval reads it.

    Raises:
        RowError: not as many tags as tokens, or a type that the template does not name.
    """
    if len(tokens) != len(tags):
        raise RowError(f"{len(tokens)} tokens but {len(tags)} tags; they must be equally many")
    entities: list[tuple[str, str, int, int]] = []
    start, open_type = 0, None
    for token, tag in zip(tokens, tags, strict=True):
        prefix, _, kind = str(tag).partition("-")
        if prefix not in ("O", "B", "I") or (prefix != "O" and kind not in types):
            raise RowError(
                f"the tag {tag!r} is none of O, B-TYPE, I-TYPE with a TYPE of spans.types; "
                "add the type"
            )
        end = start + len(token)
        if prefix == "I" and open_type == kind:
            _, text, first, _ = entities.pop()
            entities.append((kind, f"{text} {token}", first, end))
        elif prefix != "O":
            entities.append((kind, token, start, end))
        open_type = None if prefix == "O" else kind
        start = end + 1
    return entities
