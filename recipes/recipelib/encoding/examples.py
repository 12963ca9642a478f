"""Encodes rows as training examples, and counts what became of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields

from recipelib.encoding.prompt_encoder import IGNORED, Counts, DoesNotFit, PromptEncoder
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import UserError


@dataclass
class EncodedRows:
    """Training examples (`input_ids` and `labels` of equal length), the number of each one's row,
    counts, and how many examples came from each `extend`.
    """

    examples: list[dict[str, list[int]]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def add(self, row: int, input_ids: list[int], labels: list[int]) -> None:
        """Append one example and count it."""
        self.examples.append({"input_ids": input_ids, "labels": labels})
        self.rows.append(row)
        self.counts.examples += 1
        self.counts.tokens += len(input_ids)
        self.counts.supervised_tokens += sum(label != IGNORED for label in labels)

    @property
    def longest_target(self) -> int:
        """The most supervised tokens of an example."""
        return max(
            sum(label != IGNORED for label in example["labels"]) for example in self.examples
        )

    def extend(self, other: EncodedRows) -> None:
        """Append another task's examples and add its counts; its rows are numbered after ours."""
        self.examples += other.examples
        self.parts.append(len(other.examples))
        self.rows += [self.counts.rows + row for row in other.rows]
        for count in fields(Counts):
            total = getattr(self.counts, count.name) + getattr(other.counts, count.name)
            setattr(self.counts, count.name, total)


def encode_rows(
    encoder: PromptEncoder,
    rows: Iterable[Mapping],
    *,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> EncodedRows:
    """Training examples of rows that the room `data` has checked.

    A row's phrasing, and its wrong candidates if it asks about pairs, are drawn by the seed and the
    row's number, so that they depend neither on the process nor on the rows before.

    Raises:
        UserError: no row fits, or the chat template rejects a conversation.
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
    """How a conversation's first question begins, by which it can be found in its file."""
    text = next(turn["content"] for turn in question.turns if turn["role"] == "user")
    words = " ".join(text.split())
    return f" ({words[:40]!r}{'...' if len(words) > 40 else ''})"


def drawn_questions(template: PromptTemplate, row: Mapping, draw: random.Random) -> list[Question]:
    """The questions of a row to train on. Of a pair's wrong candidates, as many are drawn as the
    template's `negatives` says.
    """
    questions = template.questions(row)
    if not template.asks_each_word:
        return questions
    right = [question for question in questions if question.asked == question.label]
    wrong = [question for question in questions if question.asked != question.label]
    return right + draw.sample(wrong, min(template.negatives, len(wrong)))
