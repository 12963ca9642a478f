"""Columns of a row that change what should be learned although no text of the template names them:
they are read, refused, or counted, but not passed over.
"""

from collections.abc import Collection, Mapping
from typing import Any

from recipelib.prompts.values import RowError, is_empty

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Parts of the prompt; a guessed template reads those that it was guessed with.
BESIDE = ("system", "system_prompt", "history", "tools", "functions")
PREFERENCES = ("chosen", "rejected")
_WEIGHTS = ("weight", "loss_weight", "sample_weight", "mask", "loss_mask")
_FLAGS = ("train", "training", "trainable", "learn", "loss", "kto_tag", "label")
_TELLING = {*MEDIA, *BESIDE, *_WEIGHTS, "kto_tag"}
_EMPTY_JSON = ("[]", "{}", "null")  # of a column of JSON text


def check_columns(
    row: Mapping[str, Any],
    read: Collection[str],
    guessed: Collection[str] | None,
    conversation: bool,
) -> list[str]:
    """What a row says in columns that the template does not read.

    Args:
        read: the columns that the template reads.
        guessed: the columns that it was guessed by; None for a template that a person wrote, who
            may have left a column out on purpose.
        conversation: whether the row is turns.
    Returns:
        Names of what is passed over, to be counted: "the column 'system'".
    Raises:
        RowError: a column that cannot be passed over.
    """
    found = row if guessed is not None else _TELLING & row.keys()
    unread = []
    for column in found:
        value = row[column]
        if column in read or is_empty(value) or value in _EMPTY_JSON:
            continue
        refused = guessed is not None or (conversation and column in MEDIA)
        if refused and (problem := _problem(column, value)):
            raise RowError(f"{column}: {problem}")
        if guessed is None or column not in guessed:
            unread.append(f"the column {column!r}")
    return unread


def _problem(column: str, value: Any) -> str | None:
    """Why a value of a column that nothing reads cannot be passed over."""
    text = str(value).strip().casefold() if isinstance(value, str | int | float) else None
    if column in MEDIA:
        return "only text is learned; leave the row out, or remove the column"
    if column in BESIDE:
        return (
            "the template that was guessed from the first rows does not read it; put a row with it "
            "first, move it into the turns, or pass --template"
        )
    if column in PREFERENCES:
        return (
            "no recipe learns preferences; rename the column of the answers to learn, or pass "
            "--template"
        )
    if column in _FLAGS and text == "false":  # of KTO's answers those to avoid
        return "is false, so the answer is not to be learned; leave the row out"
    if column == "mask" and text in ("user", "human"):  # NeMo's: whose turns are not learned
        return None
    if column in _WEIGHTS and text not in ("1", "1.0", "true"):
        return f"{value!r:.60}: rows are learned or not; leave the row out, or remove the column"
    return None
