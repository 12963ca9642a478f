"""One thing that a template asks about a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipelib.prompts.values import Turn


@dataclass(frozen=True)
class Question:
    """One thing asked about a row.

    Attributes:
        variables: what the texts of the template are rendered with.
        answer: the gold answer as text, its leading space included; None where the row has none.
        rationale: the reasoning before the answer with what joins the two; empty without one.
        references: every gold answer that counts as right, without leading space.
        label: the gold class; None without a verbalizer or without an answer.
        candidates: for each class, the answers that stand for it, one per label word.
        asked: the class whose word stands in the pair, or the entity type; None otherwise.
        spans: [start, end) characters of the answers in the context, never to be cut away.
        turns, tools: of a ready conversation, as `row_values` reads them; empty otherwise.
    """

    variables: Mapping[str, Any]
    answer: str | None = None
    rationale: str = ""
    references: tuple[str, ...] = ()
    label: str | None = None
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asked: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    turns: tuple[Turn, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def target(self) -> str | None:
        """What training supervises: rationale and answer as one text."""
        return None if self.answer is None else self.rationale + self.answer

    def change(self, **variables: Any) -> Question:
        """The same question with other values of some variables (shortened ones)."""
        return dataclasses.replace(self, variables={**self.variables, **variables})
