"""Which examples are computed together, and by which process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

_LOOKED_AT = 20_000  # examples, by which the padding of an epoch is estimated


def sampling_seed(training) -> int:
    """The seed with which the trainer draws the order of the rows."""
    return training.seed if training.data_seed is None else training.data_seed


class ByLength(Sampler):
    """Rows of similar length one after the other, in an order that each epoch draws anew, the same
    in all processes; transformers' own would draw it from each process's random numbers.

    Args:
        lengths: tokens of each row.
        rows_of_step: among some times so many, rows are put in order.
        seed: of the first epoch.
    """

    def __init__(self, lengths: list[int], rows_of_step: int, seed: int):
        self.lengths, self.rows_of_step, self.seed, self.epoch = lengths, rows_of_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(LengthGroupedSampler(self.rows_of_step, lengths=self.lengths, generator=draw))


def _sampler(lengths: list[int], training, size: int, processes: int, process: int) -> Sampler:
    """Draws the rows of an epoch; "batch_rebalance" those of one process's batches."""
    strategy, seed = training.train_sampling_strategy, sampling_seed(training)
    rows_of_step = size * training.gradient_accumulation_steps * processes
    if strategy == "batch_rebalance":
        return BatchRebalanceSampler(
            lengths,
            effective_batch_size=rows_of_step,
            dp_size=processes,
            grad_accum=training.gradient_accumulation_steps,
            rank=process,
            seed=seed,
            drop_last=training.dataloader_drop_last,
        )
    if strategy == "group_by_length":
        return ByLength(lengths, rows_of_step, seed)
    rows = range(len(lengths))
    return SequentialSampler(rows) if strategy == "sequential" else RandomSampler(rows)


def training_batches(
    rows: Any,
    lengths: Sequence[int],
    training,
    collate: Callable[[list], Any],
    *,
    size: int,
    processes: int = 1,
    process: int = 0,
    device: torch.device | None = None,
    **sharing,
) -> DataLoader:
    """The batches of one process in each epoch: of a random order that the seed and the epoch
    draw, the same in all processes, process p takes batches p, p + processes, ...; where the last
    ones are missing or short, rows from the epoch's beginning make them even.

    Args:
        rows: what is trained, as many as `lengths`, which are their tokens.
        training: the trainer's arguments.
        size: the rows of a batch.
        sharing: further options of accelerate's `prepare_data_loader`.
    Returns:
        A `DataLoader` with `set_epoch`.
    """
    lengths = np.asarray(lengths).tolist()
    sampler = _sampler(lengths, training, size, processes, process)
    if isinstance(sampler, BatchRebalanceSampler):  # its batches are this process's already
        order = {"batch_sampler": sampler}
        processes, process = 1, 0
    else:
        drop_last = training.dataloader_drop_last
        order = {"sampler": sampler, "batch_size": size, "drop_last": drop_last}
    batches = prepare_data_loader(
        DataLoader(rows, collate_fn=collate, **order, **_loading(training)),
        device,
        num_processes=processes,
        process_index=process,
        put_on_device=device is not None,
        **{"use_seedable_sampler": True, "data_seed": sampling_seed(training), **sharing},
    )
    if isinstance(sampler, ByLength):  # or a resumed epoch would have the order of the first
        batches.set_sampler(sampler)
    return batches


def _loading(training) -> dict[str, Any]:
    """The options of a `DataLoader` that do not decide who gets which rows."""
    names = ("num_workers", "persistent_workers", "multiprocessing_context", "prefetch_factor")
    names = (*names, "in_order", "pin_memory")
    return {name: getattr(training, f"dataloader_{name}") for name in names}


def evaluation_batches(
    rows: Any,
    training,
    collate: Callable[[list], Any],
    *,
    size: int,
    processes: int = 1,
    process: int = 0,
    device: torch.device | None = None,
    even_batches: bool = True,
) -> DataLoader:
    """The batches of one process, in the order of the rows; `even_batches` fills up the last ones
    with the first rows, which then do not count.
    """
    return prepare_data_loader(
        DataLoader(rows, batch_size=size, collate_fn=collate, **_loading(training)),
        device,
        num_processes=processes,
        process_index=process,
        put_on_device=device is not None,
        even_batches=even_batches,
    )


def micro_batches(lengths: Sequence[int], training) -> list[list[int]]:
    """One epoch as it will be cut into forward passes, those of all processes.

    Args:
        lengths: tokens of each example.
        training: the trainer's arguments. Of its sampling strategies "batch_rebalance" (parts of
            a step with similar lengths) is followed exactly, any other is taken as random.

    Returns:
        The examples' indices, batch by batch.
    """
    seed = sampling_seed(training)
    groups = training.gradient_accumulation_steps * training.world_size
    if training.train_sampling_strategy == "batch_rebalance":
        sampler = BatchRebalanceSampler(
            lengths=np.asarray(lengths).tolist(),
            effective_batch_size=training.per_device_train_batch_size * groups,
            dp_size=1,  # `grad_accum` counts the groups of all processes
            grad_accum=groups,
            seed=seed,
            drop_last=training.dataloader_drop_last,
        )
        return list(sampler)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    return [batch.tolist() for batch in order.split(training.per_device_train_batch_size)]


def expected_padding(lengths: Sequence[int], training) -> float:
    """The share of padding in an epoch: padding tokens over all tokens; of more than 20,000
    examples some tell for all.
    """
    if training.packing:
        return 0.0
    lengths = np.asarray(lengths)
    lengths = lengths[:: max(1, len(lengths) // _LOOKED_AT)]
    batches = [lengths[batch] for batch in micro_batches(lengths, training)]
    slots = sum(len(batch) * int(batch.max()) for batch in batches)
    return 1 - sum(int(batch.sum()) for batch in batches) / slots if slots else 0.0
