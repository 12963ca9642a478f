"""Encodes rows as the text of a question and the number of its class, for what reads classes from
states: a classification head, or a small model on features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from recipelib.encoding.asking import Asked, CausalAsker, MaskedAsker, asker_of, with_bar
from recipelib.encoding.examples import Encoding, Example
from recipelib.encoding.prompt_encoder import Counts, PromptEncoder
from recipelib.runtime import UserError, digest


def class_asker(encoder: PromptEncoder, masked: bool) -> CausalAsker | MaskedAsker:
    """How a row becomes one text: the prompt; for a masked model, or where the prompt asks once per
    label word, the cloze, of which a causal model reads what stands before the mask.

    Raises:
        UserError: the cloze that this needs is missing.
    """
    template = encoder.template
    if template.asks_each_word and not template.texts.get("cloze"):
        raise UserError(
            f"{template.path}: cloze: is missing; the prompt asks once per label word, and a class "
            "is read from one text"
        )
    return asker_of(encoder, masked, template.asks_each_word)


@dataclass
class ClassRows:
    """Rows as they are read, and as they are asked about.

    Attributes:
        ids: the tokens of each row.
        asked: its question; `counts` has those that do not fit.
    """

    ids: list[list[int]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def encode_class_rows(
    asker: CausalAsker | MaskedAsker, rows: Sequence[Mapping], *, answers: bool = True
) -> ClassRows:
    """Rows that the room `data` has checked, to be scored.

    Args:
        answers: False for rows without answers.
    Raises:
        UserError: no row fits.
    """
    encoded = ClassRows(counts=Counts(rows=len(rows)))
    for number, row in enumerate(with_bar(rows, "encoding")):
        if asked := _ask(asker, number, row, answers, encoded.counts):
            encoded.asked.append(asked)
            encoded.ids.append(asked.prompts[0].ids)
    if not encoded.asked:
        raise UserError(_no_row_fits(asker))
    return encoded


def class_encoding(asker: CausalAsker | MaskedAsker) -> Encoding:
    """Rows to be trained on: their `input_ids`, with their `length`, and as `labels` the number of
    the class among the template's.
    """
    from datasets import List, Value

    number, classes = Value("int32"), list(asker.encoder.template.verbalizer)

    def encode(place: int, row: Mapping, counts: Counts) -> Iterator[tuple[int, tuple]]:
        if asked := _ask(asker, place, row, True, counts):
            ids = asked.prompts[0].ids
            yield 1, (ids, len(ids), classes.index(asked.questions[0].label))

    return Encoding(
        digest(asker.encoder.identity, type(asker).__name__, "classes"),
        {"input_ids": List(number), "length": number, "labels": number},
        encode,
        _no_row_fits(asker),
    )


def _no_row_fits(asker: CausalAsker | MaskedAsker) -> str:
    return f"--max_length {asker.encoder.max_length}: no row fits; raise it"


def _ask(
    asker: CausalAsker | MaskedAsker, number: int, row: Mapping, answers: bool, counts: Counts
) -> Asked | None:
    """What is asked about a row; None if it does not fit."""
    asked = asker.ask([row], answers, None, number)
    if not asked:
        counts.left_out += 1
        return None
    (asked,) = asked
    prompt = asked.prompts[0]
    counts.examples += 1
    counts.shortened += prompt.shortened
    counts.tokens += len(prompt.ids)
    counts.supervised_tokens += 1
    return asked


@dataclass(frozen=True)
class ClassCollator:
    """Makes a batch of examples, padded on the right: `input_ids`, `attention_mask` and `labels`.

    Args:
        pad: the tokenizer's pad id, by which causal models find a text's last token.
    """

    pad: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = pad_texts([example["input_ids"] for example in examples], self.pad)
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}


def pad_texts(texts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, [texts, width], padded on the right."""
    ids = [torch.tensor(text) for text in texts]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
