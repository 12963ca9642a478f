"""Makes a template for a data set whose columns say how it is meant.

These are conversations as OpenAI or ShareGPT writes them, instructions as Alpaca or Dolly does, and
prompts with completions or responses. The template is like any other and is saved with the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipelib.data.places import Hub, find
from recipelib.data.sources import first_rows
from recipelib.prompts import PREFERENCES, PromptTemplate, RowError, is_empty, read_list
from recipelib.runtime import UserError

_LOOKED_AT = 100  # rows
_KNOWN = (
    "messages, conversations, instruction with output or response, prompt or query with "
    "completion or response"
)
# Parts of a prompt that may stand beside it -> the columns that have them.
_BESIDE = {
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
}


def template_for(
    dataset: str,
    split: str | None = None,
    streaming: bool = False,
    encoding: str | None = None,
    field: str | None = None,
) -> tuple[PromptTemplate, str]:
    """A template for a data set, guessed from its first 100 rows; no other row is read.

    Args:
        dataset: a file, a folder with a file per split, or a hub id.
        split: the split whose rows are read; by default "train". A file has one split.
        encoding, field: how files are read, see `places.Files`.
    Returns:
        The template, named after the data set, and a line that says what the data was taken for.
    Raises:
        UserError: no such data, or columns that say nothing.
    """
    place = find(None, dataset, encoding=encoding, field=field)
    rows = first_rows(place, split or "train", _LOOKED_AT, streaming)
    if isinstance(place, Hub):
        name = place.path.rpartition("/")[2]
    else:
        path = place.path.resolve()
        name = path.stem if path.is_file() else path.name
    return guess_template(_typical(rows), dataset, name)


def _typical(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row with all columns of those rows that are of the commonest kind, each with its first
    value that is not empty: the first row may be unlike the others.
    """
    kinds: dict[str, list[Mapping]] = {}
    for row in rows:
        if guess := _guess(row):
            kinds.setdefault(guess[0], []).append(row)
    typical: dict[str, Any] = {}
    for row in max(kinds.values(), key=len, default=rows):
        for column, value in row.items():
            if is_empty(typical.setdefault(column, value)):
                typical[column] = value
    return typical


def guess_template(
    row: Mapping[str, Any], source: str, name: str = "instructions"
) -> tuple[PromptTemplate, str]:
    """A template for rows like this one, and a line that says what they were taken for.

    Args:
        source: what an error calls the data.
        name: the template's name.
    Raises:
        UserError: the columns are of no known kind, or preferences.
    """
    if preferences := [column for column in PREFERENCES if not is_empty(row.get(column))]:
        raise UserError(
            f"{source}: {' and '.join(preferences)}: no recipe learns preferences; to learn the "
            "chosen answers, leave 'rejected' out and rename 'chosen' to 'messages', or to "
            "'completion' where it follows a 'prompt'; or pass --template"
        )
    guess = _guess(row)
    if guess is None:
        columns = ", ".join(map(repr, row)) or "none"
        raise UserError(
            f"{source}: the columns {columns} do not tell what is asked and what is answered; "
            f"pass --template, or name them {_KNOWN}"
        )
    kind, used, fields = guess
    description = f"taken for {kind} ({', '.join(column for column in used if column in row)})"
    if others := [column for column in row if column not in used]:
        description += f"; not used: {', '.join(others)}"
    fields = {
        "name": name,
        "description": description,
        "form": "generative",
        **fields,
        "metric": "loss",
        "guessed": list(row),
    }
    return PromptTemplate(fields, "guessed.yaml"), description


# What the rows are taken for, the columns that are used, the fields of the template.
_Guess = tuple[str, list[str], dict[str, Any]]


def _guess(row: Mapping[str, Any]) -> _Guess | None:
    return _conversation(row) or _instruction(row) or _completion(row)


def _conversation(row: Mapping[str, Any]) -> _Guess | None:
    for column in ("messages", "conversations"):
        if turn := _first_turn(row.get(column)):
            kind = "ShareGPT's conversations" if "from" in turn else "OpenAI's messages"
            return _with_turns(kind, {"messages": column}, row)
    if _first_turn(row.get("prompt")) and _first_turn(row.get("completion")):
        fields = {"messages": "prompt", "completion": "completion"}
        return _with_turns("TRL's conversational prompts and completions", fields, row)
    return None


def _with_turns(kind: str, fields: dict[str, Any], row: Mapping[str, Any]) -> _Guess:
    """The guess of columns with turns, and of what stands beside them."""
    beside = {name: column for name, column in _beside(row).items() if name != "history"}
    renamed = {name: column for name, column in beside.items() if name != column}
    used = [*fields.values(), *beside.values()]
    return kind, used, {**({"columns": renamed} if renamed else {}), **fields}


def _beside(row: Mapping[str, Any]) -> dict[str, str]:
    """The parts of the prompt that stand in columns of their own -> these columns; a column counts
    where its first value is empty, too.
    """
    found = {}
    for name, columns in _BESIDE.items():
        for column in reversed(columns):
            if column in row and (name not in found or not is_empty(row[column])):
                found[name] = column
    return found


def _first_turn(value: Any) -> Mapping[str, Any] | None:
    try:
        turn = next(iter(read_list(value, "")), None)
    except RowError:
        return None
    return turn if isinstance(turn, Mapping) and ("role" in turn or "from" in turn) else None


def _instruction(row: Mapping[str, Any]) -> _Guess | None:
    """Alpaca's columns (Taori et al. 2023), or Dolly's (Conover et al. 2023)."""
    inputs = [column for column in ("input", "context") if column in row]
    outputs = [column for column in ("output", "response") if column in row]
    if "instruction" not in row or len(inputs) > 1 or len(outputs) != 1:
        return None
    columns = {"input": (inputs or ["input"])[0], "output": outputs[0]}
    kind = "Alpaca's instructions" if outputs == ["output"] else "Dolly's instructions"
    fields = {
        "columns": columns,
        "optional": ["input"],
        "prompt": "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}",
        "answer": "\n\n{{ output }}",
        "shorten": ["input"],
    }
    return _with_texts(kind, ["instruction", *columns.values()], fields, row)


def _completion(row: Mapping[str, Any]) -> _Guess | None:
    """A prompt with a completion, which follows it directly, as TRL joins them; or with a response,
    which follows after an empty line.
    """
    asked = "prompt" if "prompt" in row else "query"
    answers = [column for column in ("completion", "response") if column in row]
    texts = [row.get(column) for column in (asked, *answers)]
    if len(answers) != 1 or not all(isinstance(text, str) for text in texts):
        return None
    joined = {"completion": "{{ completion }}", "response": "\n\n{{ response }}"}
    fields = {"prompt": f"{{{{ {asked} }}}}", "answer": joined[answers[0]]}
    plural = "queries" if asked == "query" else "prompts"
    return _with_texts(f"{plural} and {answers[0]}s", [asked, *answers], fields, row)


def _with_texts(
    kind: str, used: list[str], fields: dict[str, Any], row: Mapping[str, Any]
) -> _Guess:
    """The guess of columns with a prompt and an answer, and of what stands beside them. Earlier
    turns or tools make a conversation of them, which loses whole turns where it is too long.
    """
    beside = _beside(row)
    columns = {**fields.pop("columns", {}), **beside}
    columns = {name: column for name, column in columns.items() if name != column}
    optional = [*fields.pop("optional", []), *(beside.keys() & {"system"})]
    if "system" in beside:
        fields["system"] = "{{ system }}"
    if beside.keys() & {"history", "tools"}:
        fields["history"] = "history"
        optional.append("history")
        fields.pop("shorten", None)
    given = {"columns": columns, "optional": optional}
    given = {key: value for key, value in given.items() if value}
    return kind, [*used, *beside.values()], {**given, **fields}
