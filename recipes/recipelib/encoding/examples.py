"""Encodes rows as training examples, and counts what became of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipelib.data import RowStream, StoredRows, stream_share
from recipelib.encoding.asking import beginning
from recipelib.encoding.prompt_encoder import (
    Counts,
    DoesNotFit,
    PromptEncoder,
    TrainingExample,
)
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import (
    ArrowFile,
    Store,
    UserError,
    cut,
    digest,
    read_arrow,
    write_json,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Example = dict[str, Any]


@dataclass(frozen=True)
class EncodedRows:
    """Training examples in Arrow files.

    Attributes:
        examples: those of `encode_rows` have `input_ids` and `labels` of equal length, and that
            `length`. None where there are none.
        rows: [examples] the number of each one's row.
        counts: what became of the rows.
        longest_target: the most supervised tokens of an example.
        parts: how many examples each of several tasks gave; empty for one.
        stream: the examples that are trained, where they are encoded meanwhile; `examples` are then
            the first few.
    """

    examples: Dataset | None = None
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: Counts = field(default_factory=Counts)
    longest_target: int = 0
    parts: tuple[int, ...] = ()
    stream: IterableDataset | None = None

    @property
    def lengths(self) -> np.ndarray:
        """[examples] the tokens of each."""
        return self.examples.with_format("numpy")["length"][:]

    @classmethod
    def of(cls, examples: Iterable[tuple[list[int], list[int]]]) -> EncodedRows:
        """Examples in memory, one a row, from the ids and labels of each."""
        from datasets import Dataset

        records, counts, longest = [], Counts(), 0
        for ids, labels in examples:
            records.append({"input_ids": ids, "labels": labels, "length": len(ids)})
            longest = max(longest, counts.add_example(labels))
            counts.rows += 1
        return cls(Dataset.from_list(records), np.arange(len(records)), counts, longest)

    @classmethod
    def join(cls, parts: Sequence[EncodedRows], *, same_rows: bool = False) -> EncodedRows:
        """The examples of several tasks, one after the other; rows are numbered after those of the
        tasks before. With `same_rows` the parts are examples of the same rows, each counted once.
        """
        from datasets import concatenate_datasets

        rows = [part.counts.rows for part in parts]
        before = [0] * len(parts) if same_rows else np.cumsum([0, *rows[:-1]])
        counts = reduce(Counts.__add__, (part.counts for part in parts))
        return cls(
            concatenate_datasets([part.examples for part in parts]),
            np.concatenate([part.rows + first for part, first in zip(parts, before, strict=True)]),
            replace(counts, rows=rows[0]) if same_rows else counts,
            max(part.longest_target for part in parts),
            tuple(len(part.examples) for part in parts),
        )


@dataclass(frozen=True)
class Encoding:
    """How rows become examples.

    Attributes:
        key: for all that the examples depend on besides the rows.
        features: of an example.
        encode: from a row's number and the row to how many tokens of each of its examples are
            supervised, and the values of the features; it counts what becomes of the row.
        refusal: what is said if there is no example.
    """

    key: str
    features: Mapping[str, Any]
    encode: Callable[[int, Mapping, Counts], Iterable[tuple[int, Sequence]]]
    refusal: str


def training_encoding(encoder: PromptEncoder, seed: int = 0, kind: str = "training") -> Encoding:
    """Examples with the ids and labels of rows; `kind` is what errors call those.

    A row's phrasing, and its wrong candidates if it asks about pairs, are drawn by the seed and the
    row's number, so that they depend neither on the process nor on the rows before.
    """
    from datasets import List, Value

    tokens = List(Value("int32"))

    def encode(number: int, row: Mapping, counts: Counts) -> Iterator[tuple[int, tuple]]:
        for example in training_examples(encoder, number, row, seed, counts, kind):
            ids, labels = example.ids, example.labels
            yield counts.add_example(labels), (ids, labels, len(ids))

    return Encoding(
        digest(encoder.identity, seed),
        {"input_ids": tokens, "labels": tokens, "length": Value("int32")},
        encode,
        f"--max_length {encoder.max_length}: no {kind} row fits; raise it",
    )


def encode_rows(
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    *,
    seed: int = 0,
    store: Store | None = None,
    kind: str = "training",
) -> EncodedRows:
    """`training_encoding` of rows that the room `data` has checked.

    Args:
        store: where they are kept, and by how many processes they are made.
        kind: what errors call the rows.
    Raises:
        UserError: no row fits, or the chat template rejects a conversation.
    """
    return encode_into(store or Store(), rows, training_encoding(encoder, seed, kind))


def encode_into(store: Store, rows: Sequence[Mapping], encoding: Encoding) -> EncodedRows:
    """Encode rows in the store's processes, unless that was done before.

    Raises:
        UserError: no row fits; and what encoding raises.
    """
    from datasets import Features, Value

    features = Features(**encoding.features, row=Value("int64"))

    def make(folder: Path) -> None:
        def work(number: int, piece: range, tick: Callable[[], None]) -> tuple[Counts, int]:
            counts, longest = Counts(), 0
            own = rows[piece.start : piece.stop]
            own = own.mapped_anew() if isinstance(own, StoredRows) else own
            with ArrowFile(folder / f"examples-{number:05}.arrow", features) as file:
                for place, row in zip(piece, own, strict=True):
                    counts.rows += 1
                    for supervised, example in encoding.encode(place, row, counts):
                        longest = max(longest, supervised)
                        file.add(*example, place)
                    tick()
            return counts, longest

        pieces = cut(len(rows), store.processes)
        done = store.fill(folder, work, pieces, total=len(rows), description="encoding")
        counts = reduce(Counts.__add__, (counts for counts, _ in done), Counts())
        if not counts.examples:
            raise UserError(encoding.refusal)
        longest = max(longest for _, longest in done)
        write_json(folder / "counts.json", {"counts": asdict(counts), "longest": longest})

    identity = rows.identity if isinstance(rows, StoredRows) else digest(list(rows))
    folder = store.get("examples", digest(identity, encoding.key), make)
    said = json.loads((folder / "counts.json").read_text("utf-8"))
    stored = read_arrow(sorted(folder.glob("examples-*.arrow")))
    return EncodedRows(
        stored.remove_columns("row"),
        stored.with_format("numpy")["row"][:],
        Counts(**said["counts"]),
        said["longest"],
    )


def encode_stream(stream: RowStream, encodings: Sequence[Encoding], training) -> EncodedRows:
    """Rows that are encoded while training, each in all of these ways.

    Args:
        training: the trainer's arguments: a seed orders the rows, and each of its processes has
            its own share.
    Returns:
        The first rows' examples, and `stream`: those that are trained. The counts are of the
        latter, by this process, and grow meanwhile.
    Raises:
        UserError: of the first rows none fits.
    """
    from datasets import Dataset, Features

    names, first, longest = list(encodings[0].features), [], 0
    for number, row in enumerate(stream.rows):
        for encoding in encodings:
            for supervised, example in encoding.encode(number, row, Counts()):
                longest = max(longest, supervised)
                first.append(dict(zip(names, example, strict=True)))
    if not first:
        raise UserError(encodings[0].refusal)
    counts, rank, world = Counts(), training.process_index, training.world_size
    seed = training.seed if training.data_seed is None else training.data_seed
    own = stream_share(stream.data, seed, rank, world)

    def encode(place: int, row: Mapping, again: bool) -> list[dict[str, Any]]:
        into = Counts() if again else counts
        into.rows += 1
        examples = []
        try:
            for encoding in encodings:
                found = encoding.encode(place * world + rank, row, into)
                examples += [dict(zip(names, example, strict=True)) for _, example in found]
        except UserError as error:  # the chat template rejects the turns
            stream.leave_out(error)
        return examples

    return EncodedRows(
        Dataset.from_list(first, features=Features(encodings[0].features)),
        np.arange(len(first)),
        counts,
        longest,
        stream=stream.mapped(own, encode, names),
    )


def training_examples(
    encoder: PromptEncoder,
    number: int,
    row: Mapping,
    seed: int,
    counts: Counts,
    kind: str = "training",
) -> Iterator[TrainingExample]:
    """What is trained of a row, see `encode_rows`.

    Args:
        number: the row's.
        counts: is added to: what was shortened, dropped or left out.
    Raises:
        UserError: the chat template rejects the conversation.
    """
    for question, phrasing in drawn_questions(encoder.template, number, row, seed):
        if question.turns:
            try:
                yield from encoder.conversation_examples(question, counts)
            except UserError as error:  # the chat template rejects the turns
                raise UserError(f"{kind} row {number + 1}{beginning(question)}: {error}") from None
            continue
        try:
            ids, labels, prompt = encoder.training_example(question, phrasing=phrasing)
        except DoesNotFit:
            counts.left_out += 1
            continue
        counts.shortened += prompt.shortened
        counts.dropped_demonstrations += prompt.dropped
        yield TrainingExample(ids, labels, prompt.question, phrasing)


def drawn_questions(
    template: PromptTemplate, number: int, row: Mapping, seed: int
) -> list[tuple[Question, int]]:
    """The questions of a row to train on, each with its phrasing. Of a pair's wrong candidates, as
    many are drawn as the template's `negatives` says, and of several phrasings one for each
    question, by the seed and the row's number.
    """
    questions, phrasings = template.questions(row, checked=True), len(template.prompts)
    if not template.asks_each_word and phrasings < 2:
        return [(question, 0) for question in questions]
    draw = random.Random(f"{seed}-{number}")
    if template.asks_each_word:
        right = [question for question in questions if question.asked == question.label]
        wrong = [question for question in questions if question.asked != question.label]
        questions = right + draw.sample(wrong, min(template.negatives, len(wrong)))
    return [(question, draw.randrange(phrasings)) for question in questions]
