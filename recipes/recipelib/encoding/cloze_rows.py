"""Rows -> texts with a blank, as they are computed to score every label word in it.

A row is one or several sequences. A masked model fills a word of several tokens from left to right,
one mask for each (see `masked.py`). For a causal one the words follow the prompt; or they stand
where the cloze has its mask, and the rest of it follows. There, the tokens of one sequence are read
wherever they begin another word, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from recipelib.encoding.asking import Asked, CausalAsker, Cloze, ClozeAsker, MaskedAsker
from recipelib.encoding.examples import EncodedRows
from recipelib.runtime import UserError

Example = dict[str, Any]


def example_of(
    requests: Sequence[tuple],
    classes: Sequence[str],
    label: str | None,
    asked: Sequence[str] = (),
) -> Example:
    """A row as it is computed.

    Args:
        requests: what is scored, as `few_shot`'s askers give it: a prompt with its continuations or
            a `Cloze`, each with the (label, ...) of its words.
        classes: all labels, in order.
        label: the right one; None for a row without an answer.
        asked: where each request asks about one label with yes or no, these labels: by how much yes
            is likelier stands for the label's word.

    Returns:
        `input_ids`: the tokens of all sequences, one after another, and the `lengths` of these;
        `reads`: [sequence, place, token, word, sign] of each token of a word, by which place it is
        predicted; `word_labels`: the label of each word; `labels`: the right label, or -1.
    """
    sequences: list[list[int]] = []
    reads: list[list[int]] = []
    word_labels: list[int] = []
    for number, (request, words) in enumerate(requests):
        fill = _fill_masks if isinstance(request, Cloze) else _continue
        some, places = fill(*request)
        for sequence, place, token, word in places:
            at, sign = len(word_labels) + (0 if asked else word), 1
            if asked and words[word][0] == "no":
                sign = -1
            reads.append([len(sequences) + sequence, place, token, at, sign])
        sequences += some
        names = [asked[number]] if asked else [name for name, *_ in words]
        word_labels += [classes.index(name) for name in names]
    return {
        "input_ids": [token for one in sequences for token in one],
        "lengths": [len(one) for one in sequences],
        "reads": reads,
        "word_labels": word_labels,
        "labels": -1 if label is None else classes.index(label),
    }


def _continue(prompt: Sequence[int], words: Sequence[Sequence[int]]) -> tuple[list, list]:
    """Sequences of a causal model: one for each word whose beginning begins no other word."""
    beginnings = sorted({tuple(word[:-1]) for word in words}, reverse=True)
    kept: list[tuple[int, ...]] = []
    for one in beginnings:  # the longer of two that begin alike comes first
        if not any(other[: len(one)] == one for other in kept):
            kept.append(one)
    reads = []
    for number, word in enumerate(words):
        begin = tuple(word[:-1])
        sequence = next(at for at, one in enumerate(kept) if one[: len(begin)] == begin)
        for step, token in enumerate(word):
            reads.append((sequence, len(prompt) - 1 + step, token, number))
    return [[*prompt, *one] for one in kept], reads


def _fill_masks(
    ids: Sequence[int], masks: Sequence[int], words: Sequence[Sequence[int]]
) -> tuple[list, list]:
    """Sequences of a masked model: one for each distinct beginning of the words."""
    sequences: dict[tuple[int, ...], list[int]] = {}
    reads = []
    for number, word in enumerate(words):
        for step, token in enumerate(word):
            begin = tuple(word[:step])
            if begin not in sequences:
                sequences[begin] = list(ids)
                for place, filled in zip(masks, begin, strict=False):
                    sequences[begin][place] = filled
            reads.append((list(sequences).index(begin), masks[step], token, number))
    return list(sequences.values()), reads


def soft_requests(requests: Sequence[tuple], classes: Sequence[str]) -> list[tuple]:
    """The first of a row's requests, with the labels themselves in the place of their words."""
    (request, _), *_ = requests
    tokens = [[number] for number in range(len(classes))]
    request = request._replace(words=tokens) if isinstance(request, Cloze) else (request[0], tokens)
    return [(request, [(label,) for label in classes])]


@dataclass
class ClozeRows:
    """Rows as they are computed (`encoded.examples`), and as they were asked."""

    encoded: EncodedRows = field(default_factory=EncodedRows)
    asked: list[Asked] = field(default_factory=list)


def encode_cloze_rows(
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Mapping],
    *,
    soft: bool = False,
    answers: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> ClozeRows:
    """Rows that `data.load_rows` has checked, each as `example_of` describes.

    Args:
        soft: whether a soft verbalizer reads the blank.
        answers: False for rows without answers.
    Raises:
        UserError: no row fits.
    """
    classes, found = list(asker.encoder.template.verbalizer), ClozeRows()
    counts = found.encoded.counts
    for number, row in enumerate(progress(rows)):
        counts.rows += 1
        asked = asker.ask([row], answers, None)
        if not asked:
            counts.left_out += 1
            continue
        (one,) = asked
        one.row = number
        requests = []
        for question, prompt in zip(one.questions, one.prompts, strict=True):
            requests += asker.requests(question, prompt, ())
            counts.shortened += prompt.shortened
        pairs = [question.asked for question in one.questions if question.asked is not None]
        pairs = [] if isinstance(asker, ClozeAsker | MaskedAsker) else pairs
        if soft and pairs:
            raise UserError(
                f"{asker.encoder.template.path}: --soft_verbalizer: a pair that is asked once per "
                "label has no label words of its own; leave it out, or pass --cloze true"
            )
        if soft:
            requests = soft_requests(requests, classes)
        example = example_of(requests, classes, one.questions[0].label, pairs)
        found.asked.append(one)
        found.encoded.examples.append(example)
        found.encoded.rows.append(number)
        counts.examples += 1
        counts.tokens += len(example["input_ids"])
        counts.supervised_tokens += len({(read[0], read[1]) for read in example["reads"]})
    if not found.asked:
        raise UserError(f"--max_length {asker.encoder.max_length}: no row fits; raise it")
    return found


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch: the sequences of all rows, padded on the right so that nothing comes between a soft
    prompt and the text; the places that are read; and the right label of each row.

    Returns:
        `input_ids` and `attention_mask`, [sequences, width]; `places`, [places, 2] sequence and
        column of each place; `reads`, [n, 5] row, place, token, word, sign; `word_labels`, [words],
        which are the same for all rows; `labels`, [rows].
    """
    sequences: list[torch.Tensor] = []
    places: dict[tuple[int, int], int] = {}
    reads = []
    for row, example in enumerate(examples):
        for sequence, column, token, word, sign in example["reads"]:
            place = (len(sequences) + sequence, column)
            reads.append((row, places.setdefault(place, len(places)), token, word, sign))
        start = 0
        for length in example["lengths"]:
            sequences.append(torch.tensor(example["input_ids"][start : start + length]))
            start += length
    return {
        "input_ids": pad_sequence(sequences, batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones_like(sequence) for sequence in sequences], batch_first=True
        ),
        "places": torch.tensor(list(places)),
        "reads": torch.tensor(reads),
        "word_labels": torch.tensor(examples[0]["word_labels"]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
