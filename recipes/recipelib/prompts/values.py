"""What stands in a row besides plain text: lists, conversations, tagged tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


class RowError(ValueError):
    """What is wrong with one row, and its cure; `data/rows.py` adds where the row stands."""


def as_list(value: Any) -> list:
    """A list, tuple or array as a list; anything else as a list of one element."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, text of white space, a list or mapping without
    elements.
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or (hasattr(value, "__len__") and not len(value))


def read_json(text: str, what: str) -> Any:
    """The value of JSON text.

    Args:
        what: the text is, for the error.
    Raises:
        RowError: it is no JSON.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        python = re.match(r"[\[{\s]*'", text)  # a list as Python's str writes it
        cure = "it is Python's, write it with json.dumps" if python else "mend it"
        raise RowError(f"has no JSON for {what} ({problem}); {cure}") from None
    return value


def class_name(value: Any) -> str:
    """The value of a label column as a template's verbalizer writes it: 1.0 becomes "1", and true
    what JSON calls it.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def plain(word: str) -> str:
    """A label word as it is compared: without letter case, and spaces and full stops around it."""
    return word.strip(" .\n\t").casefold()


def read_entities(
    tokens: Sequence[str], tags: Sequence[str], types: Mapping[str, Any]
) -> list[tuple[str, str, int, int]]:
    """The entities of a BIO-tagged sentence as (type, text, start, end): [start, end) characters of
    the tokens joined by spaces.

    An `I-` tag that continues no entity of its type begins one, as conlleval reads it.

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
