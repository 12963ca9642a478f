"""Which examples are computed together."""

from collections.abc import Sequence

import numpy as np
import torch

_LOOKED_AT = 20_000  # examples, by which the padding of an epoch is estimated


def sampling_seed(training) -> int:
    """The seed with which the trainer draws the order of the rows."""
    return training.seed if training.data_seed is None else training.data_seed


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
        from transformers.trainer_pt_utils import BatchRebalanceSampler

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
