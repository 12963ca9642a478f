"""Rows that are read while training: for data sets larger than the disk, or than anyone's patience.

They are shuffled by a buffer, shared out among the processes, and checked as they come. What needs
all rows at once (held-out rows, a draw, grouping by length) is refused, or left out and said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from recipelib.data.checking import describe_unread, refuse_missing_columns
from recipelib.data.places import Files
from recipelib.data.rows import Rows, load_rows, splits_of
from recipelib.data.sources import open_stream
from recipelib.prompts import PromptTemplate, RowError
from recipelib.runtime import Store, UserError, one_line, say

if TYPE_CHECKING:
    from datasets import IterableDataset

_BUFFER = 10_000  # rows among which the next one is drawn
_LOOKED_AT = 200  # rows by which the memory and the prompts of a run are judged beforehand
_SHOWN_BAD_ROWS = 5
_READ_AT_ONCE = 16


def stream_share(data: IterableDataset, seed: int, rank: int, world: int) -> IterableDataset:
    """The rows of one of `world` processes in random order, the same at every reading."""
    if data.num_shards % world == 0:  # then it reads its own files only
        own = data.shard(num_shards=world, index=rank)
        return own.shuffle(seed=seed, buffer_size=_BUFFER)
    shuffled = data.shuffle(seed=seed, buffer_size=_BUFFER)
    return shuffled.filter(lambda row, place: place % world == rank, with_indices=True)


def stream_passes(data: IterableDataset) -> IterableDataset:
    """Shuffled rows again and again, each time in another order."""
    from datasets import IterableDataset
    from datasets.iterable_dataset import ExamplesIterable

    def all_passes() -> Iterator[tuple[int, dict[str, Any]]]:
        found = True
        for epoch in count():
            if not found:  # a process without rows
                return
            data.set_epoch(epoch)
            found = False
            for place, row in enumerate(data):
                found = True
                yield place, row

    return IterableDataset(ExamplesIterable(all_passes, {}))


@dataclass
class RowStream:
    """The training rows of a run, in the place of `Rows`.

    Attributes:
        data: the rows as they come.
        read: turns a row's classes into their names.
        template: checks them.
        source: for reports.
        columns: of the first row.
        rows: the first good ones.
        available: how many are planned to be read.
        bad: what is wrong with the first bad rows that were met.
        skipped: how many bad rows were met, and left out, by this process.
        met: how many rows this process has read; those of a second pass are none, and not counted.
        unread: what rows say and nothing reads -> how many say so, of those that were met.
    """

    data: IterableDataset
    read: Callable[[dict[str, Any]], dict[str, Any] | RowError]
    template: PromptTemplate
    source: str
    columns: list[str]
    rows: Sequence[dict[str, Any]] = ()
    available: int = 0
    bad: list[str] = field(default_factory=list)
    skipped: int = 0
    met: int = 0
    _again: bool = False  # whether the row that is read now was met before
    unread: Counter[str] = field(default_factory=Counter)

    def checked(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row that the template can read; None for a bad one, which is counted."""
        try:
            row = self.read(row)
            if isinstance(row, RowError):
                raise row
            self.unread.update(self.template.questions(row)[0].unread)
        except RowError as error:
            self.leave_out(error)
            return None
        return row

    def leave_out(self, error: Exception) -> None:
        """Count a bad row, once."""
        if self._again:
            return
        self.skipped += 1
        if len(self.bad) < _SHOWN_BAD_ROWS:
            self.bad.append(one_line(error))

    def forget(self) -> None:
        """Count anew."""
        self.bad, self.skipped, self.met = [], 0, 0

    def mapped(
        self,
        data: IterableDataset,
        encode: Callable[[int, Mapping, bool], Sequence[Mapping]],
        names: Sequence[str],
    ) -> IterableDataset:
        """What `encode` makes of each good row of `data`, again and again.

        Args:
            encode: from a row's number, the row, and whether it was met before, to its examples.
            names: of the examples' columns.
        """

        def encode_all(columns: dict[str, list], places: list[int]) -> dict[str, list]:
            examples = []
            for values, place in zip(zip(*columns.values(), strict=True), places, strict=True):
                self._again, self.met = place < self.met, max(self.met, place + 1)
                row = self.checked(dict(zip(columns, values, strict=True)))
                examples += [] if row is None else encode(place, row, self._again)
            return {name: [example[name] for example in examples] for name in names}

        return stream_passes(
            data.map(
                encode_all,
                batched=True,
                batch_size=_READ_AT_ONCE,
                with_indices=True,
                remove_columns=self.columns,
            )
        )


def load_streamed(
    template: PromptTemplate, args: Any, training: Any, store: Store | None = None
) -> tuple[RowStream, Rows]:
    """The training rows as a stream, and the evaluation rows, which are loaded as usual.

    Args:
        args: as in `load_splits`.
        training: the trainer's arguments.
    Raises:
        UserError: as `load_rows`; no steps are named, or there is no evaluation split.
    """
    if training.max_steps <= 0:
        raise UserError("--streaming true: a stream has no end that is known; pass --max_steps")
    if training.dataloader_num_workers:
        raise UserError(
            "--dataloader_num_workers: a stream is read by the process that trains; leave it out"
        )
    place, train_split, eval_split = splits_of(template, args)
    name, data, first, read = open_stream(place, train_split, template, _LOOKED_AT)
    if train_split == eval_split or (isinstance(place, Files) and place.one_split):
        raise UserError(
            "--streaming true: a tenth of a stream cannot be held out; name a split with "
            "--eval_split, in a folder or on the hub"
        )
    columns = list(first[0])
    refuse_missing_columns(template, name, columns, answers=True)
    stream = RowStream(data, read, template, f"{name}, read while training", columns)
    stream.rows = [row for row in map(stream.checked, first) if row is not None]
    if not stream.rows:
        raise UserError(
            f"{name}: no good row among the first {stream.skipped:,}; the first: {stream.bad[0]}"
        )
    if note := describe_unread(stream.unread):
        say(f"warning: {name}: of the first {len(first):,} rows {note}")
    stream.forget()
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    stream.available = training.max_steps * batch * training.world_size
    evaluation = load_rows(
        template,
        args.dataset,
        eval_split,
        max_samples=args.max_eval_samples,
        skip_bad_rows=args.skip_bad_rows,
        store=store,
    )
    return stream, evaluation
