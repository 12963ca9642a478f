"""What a template asks about a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipelib.prompts.conversations import Turn
from recipelib.prompts.options import Options

Demonstration = tuple[str, str]  # a prompt and its answer, as text


@dataclass(frozen=True)
class Question:
    """One thing asked about a row.

    Attributes:
        variables: what the texts of the template are rendered with.
        answer: the gold answer as text, its leading space included; None where the row has none.
        rationale: the reasoning before the answer, with the text that joins the two; empty if the
            template has none.
        references: every gold answer that counts as right, without leading space.
        label: the gold class; None without a verbalizer or without an answer.
        candidates: for each class, the answers that stand for it, one per label word; or for each
            of the row's own options, by name, the one that stands for it.
        options: the row's own; None where all rows share the template's classes.
        asked: the class whose word stands in the pair, or the entity type; None otherwise.
        spans: [start, end) characters of the answers in the context, which must not be cut away.
        turns, tools: of a ready conversation, as `conversations` reads them; empty otherwise.
        unread: what the row says and nothing reads: "the column 'system'".
    """

    variables: Mapping[str, Any]
    answer: str | None = None
    rationale: str = ""
    references: tuple[str, ...] = ()
    label: str | None = None
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Options | None = None
    asked: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    turns: tuple[Turn, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def target(self) -> str | None:
        """What training supervises: rationale and answer as one text."""
        return None if self.answer is None else self.rationale + self.answer

    def change(self, **variables: Any) -> Question:
        """The same question with other values of some variables (shortened ones)."""
        return dataclasses.replace(self, variables={**self.variables, **variables})
