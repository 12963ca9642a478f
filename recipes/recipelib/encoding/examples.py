"""Rows -> training examples, with counts of what became of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from recipelib.encoding.prompt_encoder import IGNORED, Counts, DoesNotFit, PromptEncoder
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import UserError


@dataclass
class EncodedRows:
    """Training examples, each `input_ids` and `labels` of equal length, the row of each, and how
    many came from each `extend`.
    """

    examples: list[dict[str, list[int]]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def add(self, row: int, input_ids: list[int], labels: list[int]) -> None:
        """Append one example; its counts too."""
        self.examples.append({"input_ids": input_ids, "labels": labels})
        self.rows.append(row)
        self.counts.examples += 1
        self.counts.tokens += len(input_ids)
        self.counts.supervised_tokens += sum(label != IGNORED for label in labels)

    @property
    def longest_target(self) -> int:
        """The most supervised tokens of an example."""
        labels = (example["labels"] for example in self.examples)
        return max(sum(label != IGNORED for label in some) for some in labels)

    def extend(self, other: EncodedRows) -> None:
        """Append another task's examples, whose rows then follow this one's; its counts too."""
        self.examples += other.examples
        self.parts.append(len(other.examples))
        self.rows += [self.counts.rows + row for row in other.rows]
        for one in fields(Counts):
            total = getattr(self.counts, one.name) + getattr(other.counts, one.name)
            setattr(self.counts, one.name, total)


def encode_rows(
    encoder: PromptEncoder,
    rows: Iterable[Mapping],
    *,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> EncodedRows:
    """Training examples of rows that `data.load_rows` has checked.

    Several phrasings, and the wrong candidates of pairs, are drawn by the seed and the row's
    number, so that they do not depend on the process or on the rows before.
    """
    template, encoded = encoder.template, EncodedRows()
    for number, row in enumerate(progress(rows)):
        encoded.counts.rows += 1
        draw = random.Random(f"{seed}-{number}")
        for question in drawn_questions(template, row, draw):
            if template.messages:
                try:
                    for example in encoder.conversation(question, encoded.counts):
                        encoded.add(number, *example)
                except UserError as error:  # the chat template rejects the turns
                    raise UserError(
                        f"training row {number + 1}{beginning(question)}: {error}"
                    ) from None
                continue
            phrasing = draw.randrange(len(template.prompts))
            try:
                ids, labels, prompt = encoder.training_example(question, phrasing=phrasing)
            except DoesNotFit:
                encoded.counts.left_out += 1
                continue
            encoded.add(number, ids, labels)
            encoded.counts.shortened += prompt.shortened
            encoded.counts.dropped_demonstrations += prompt.dropped
    if not encoded.examples:
        raise UserError(f"--max_length {encoder.max_length}: no training row fits; raise it")
    return encoded


def beginning(question: Question) -> str:
    """By what a conversation is found in its file: how its first question begins."""
    text = next(turn["content"] for turn in question.turns if turn["role"] == "user")
    words = " ".join(text.split())
    return f" ({words[:40]!r}{'...' if len(words) > 40 else ''})"


def drawn_questions(template: PromptTemplate, row: Mapping, draw: random.Random) -> list[Question]:
    """The questions of a row that are trained: of the wrong candidates of a pair, only `negatives`
    many.
    """
    questions = template.questions(row)
    if not template.asks_each_word:
        return questions
    right = [one for one in questions if one.asked == one.label]
    wrong = [one for one in questions if one.asked != one.label]
    return right + draw.sample(wrong, min(template.negatives, len(wrong)))
