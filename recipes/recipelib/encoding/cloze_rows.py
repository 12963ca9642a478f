"""Encodes rows as the sequences from which a model scores every label word.

A row becomes one or several sequences. A masked model fills a word of several tokens from left to
right, one mask per token. For a causal model the words follow the prompt, or they stand where the
cloze has its mask, with the rest of the cloze behind them; a word with which a longer one begins
shares the longer one's sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from recipelib.encoding.asking import Asked, CausalAsker, Cloze, ClozeAsker, MaskedAsker, with_bar
from recipelib.encoding.examples import Encoding, Example
from recipelib.encoding.prompt_encoder import Counts
from recipelib.runtime import UserError, digest


def example_of(
    requests: Sequence[tuple],
    classes: Sequence[str],
    label: str | None,
    asked: Sequence[str] = (),
) -> Example:
    """A row as a model computes it.

    Args:
        requests: what is scored, as an asker's `requests` returns it: a prompt with its
            continuations or a `Cloze`, each with the (label, ...) of its words.
        classes: all labels, in order.
        label: the right label; None for a row without an answer.
        asked: the label that each request asks about, if the requests ask with yes or no; how much
            likelier yes is than no then takes the place of the label's word.

    Returns:
        `input_ids`: the tokens of all sequences, one sequence after another.
        `lengths`: the length of each sequence.
        `reads`: [sequence, place, token, word, sign] for each token of a word: the place whose
            output predicts the token; sign is -1 for a "no", which is subtracted.
        `word_labels`: the number of each word's label.
        `labels`: the number of the right label, or -1.
    """
    sequences: list[list[int]] = []
    reads: list[list[int]] = []
    word_labels: list[int] = []
    for number, (request, words) in enumerate(requests):
        fill = _fill_masks if isinstance(request, Cloze) else _continue
        request_sequences, request_reads = fill(*request)
        for sequence, place, token, word in request_reads:
            at, sign = len(word_labels) + (0 if asked else word), 1
            if asked and words[word][0] == "no":
                sign = -1
            reads.append([len(sequences) + sequence, place, token, at, sign])
        sequences += request_sequences
        names = [asked[number]] if asked else [name for name, *_ in words]
        word_labels += [classes.index(name) for name in names]
    return {
        "input_ids": [token for ids in sequences for token in ids],
        "lengths": [len(ids) for ids in sequences],
        "reads": reads,
        "word_labels": word_labels,
        "labels": -1 if label is None else classes.index(label),
    }


def _continue(prompt: Sequence[int], words: Sequence[Sequence[int]]) -> tuple[list, list]:
    """Sequences and reads of a causal model. A word's last token is predicted but never fed, so a
    sequence ends with the tokens before it; where those begin another word's, one sequence serves
    both.
    """
    inputs = sorted({tuple(word[:-1]) for word in words}, reverse=True)
    kept: list[tuple[int, ...]] = []
    for fed in inputs:  # of two that begin alike, the longer comes first
        if not any(longer[: len(fed)] == fed for longer in kept):
            kept.append(fed)
    reads = []
    for number, word in enumerate(words):
        fed = tuple(word[:-1])
        sequence = next(at for at, longer in enumerate(kept) if longer[: len(fed)] == fed)
        for step, token in enumerate(word):
            reads.append((sequence, len(prompt) - 1 + step, token, number))
    return [[*prompt, *fed] for fed in kept], reads


def _fill_masks(
    ids: Sequence[int], masks: Sequence[int], words: Sequence[Sequence[int]]
) -> tuple[list, list]:
    """Sequences and reads of a masked model: one sequence for each distinct beginning of the words,
    which fills the first masks; the next mask predicts the next token.
    """
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
    """The first of a row's requests, with the labels' numbers in place of their words' tokens: a
    soft verbalizer has an embedding for each label.
    """
    (request, _), *_ = requests
    tokens = [[number] for number in range(len(classes))]
    request = request._replace(words=tokens) if isinstance(request, Cloze) else (request[0], tokens)
    return [(request, [(label,) for label in classes])]


@dataclass
class ClozeRows:
    """Rows as they are computed (`examples`), and as they are asked about."""

    examples: list[Example] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def encode_cloze_rows(
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Mapping],
    *,
    soft: bool = False,
    answers: bool = True,
) -> ClozeRows:
    """Encodes rows that the room `data` has checked, to be scored.

    Args:
        soft: whether a soft verbalizer reads the cloze.
        answers: False for rows without answers.
    Raises:
        UserError: no row fits.
    """
    encoded = ClozeRows(counts=Counts(rows=len(rows)))
    for number, row in enumerate(with_bar(rows, "encoding")):
        fitting = _encode_row(asker, number, row, soft, answers, encoded.counts)
        if fitting:
            encoded.asked.append(fitting[0])
            encoded.examples.append(fitting[1])
    if not encoded.asked:
        raise UserError(_no_row_fits(asker))
    return encoded


def cloze_encoding(asker: CausalAsker | MaskedAsker, *, soft: bool = False) -> Encoding:
    """Rows as they are computed, to be trained on; `length` counts the tokens of all of an
    example's sequences.

    Args:
        soft: whether a soft verbalizer reads the cloze.
    """
    from datasets import List, Value

    number = Value("int32")

    def encode(place: int, row: Mapping, counts: Counts) -> Iterator[tuple[int, tuple]]:
        if fitting := _encode_row(asker, place, row, soft, True, counts):
            _, example, read = fitting
            yield read, (*example.values(), len(example["input_ids"]))

    return Encoding(
        digest(asker.encoder.identity, type(asker).__name__, soft),
        {
            "input_ids": List(number),
            "lengths": List(number),
            "reads": List(List(number)),
            "word_labels": List(number),
            "labels": number,
            "length": number,
        },
        encode,
        _no_row_fits(asker),
    )


def _no_row_fits(asker: CausalAsker | MaskedAsker) -> str:
    return f"--max_length {asker.encoder.max_length}: no row fits; raise it"


def _encode_row(
    asker: CausalAsker | MaskedAsker,
    number: int,
    row: Mapping,
    soft: bool,
    answers: bool,
    counts: Counts,
) -> tuple[Asked, Example, int] | None:
    """A row as it is asked about and as it is computed, and how many places of it are read; None if
    it does not fit.
    """
    fitting = asker.ask([row], answers, None)
    if not fitting:
        counts.left_out += 1
        return None
    (asked,) = fitting
    asked.row = number
    requests = []
    for question, prompt in zip(asked.questions, asked.prompts, strict=True):
        requests += asker.requests(question, prompt, ())
        counts.shortened += prompt.shortened
    pairs = [question.asked for question in asked.questions if question.asked is not None]
    pairs = [] if isinstance(asker, ClozeAsker | MaskedAsker) else pairs
    if soft and pairs:
        raise UserError(
            f"{asker.encoder.template.path}: --soft_verbalizer: a pair that is asked once per "
            "label has no label words of its own; leave it out, or pass --cloze true"
        )
    classes = list(asker.encoder.template.words(asked.questions[0]))
    if soft:
        requests = soft_requests(requests, classes)
    example = example_of(requests, classes, asked.questions[0].label, pairs)
    if asked.questions[0].options:
        example = _by_option(example)
    read = len({(read[0], read[1]) for read in example["reads"]})
    counts.examples += 1
    counts.tokens += len(example["input_ids"])
    counts.supervised_tokens += read
    return asked, example, read


def _by_option(example: Example) -> Example:
    """An example whose labels have one word each, with the words in the order of the labels, so
    that rows with options of their own can be read side by side.
    """
    labels = example["word_labels"]
    reads = [[*read[:3], labels[read[3]], read[4]] for read in example["reads"]]
    return {**example, "reads": reads, "word_labels": sorted(labels)}


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch of examples. Sequences are padded on the right, so that nothing comes between a soft
    prompt and the text.

    Returns:
        `input_ids` and `attention_mask`: [sequences, width].
        `places`: [places, 2] sequence and column of each place that is read.
        `reads`: [n, 5] row, place, token, word, sign.
        `word_labels`: [words], the same for all rows; where rows have options of their own, those
            of the row that has most.
        `words`: [rows] how many words each row has.
        `labels`: [rows] the right labels.
    """
    words = [example["word_labels"] for example in examples]
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
        "word_labels": torch.tensor(max(words, key=len)),
        "words": torch.tensor([len(row) for row in words]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
