"""Tests of `recipelib.training.batches`."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for

from recipelib.training.batches import expected_padding, micro_batches
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer


def training(batch_size, accumulation=1, strategy="random", seed=0, world_size=1):
    return SimpleNamespace(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
        train_sampling_strategy=strategy,
        seed=seed,
        data_seed=None,
        dataloader_drop_last=False,
        packing=False,
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 9))
def test_expected_padding_is_that_of_random_batches_counted_one_by_one(lengths, batch_size, seed):
    share = expected_padding(lengths, training(batch_size, seed=seed))
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    padding = slots = 0
    for start in range(0, len(order), batch_size):
        batch = [lengths[place] for place in order[start : start + batch_size]]
        padding += sum(max(batch) - length for length in batch)
        slots += max(batch) * len(batch)
    assert share == pytest.approx(padding / slots)
    assert (share == 0) == (padding == 0)


@given(
    st.lists(st.integers(1, 400), min_size=16, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 2),
)
def test_parts_of_similar_length_hold_each_row_once_and_pad_less_than_whole_steps(
    lengths, batch_size, accumulation, world_size
):
    groups = accumulation * world_size
    similar = training(batch_size, accumulation, "batch_rebalance", world_size=world_size)
    batches = micro_batches(lengths, similar)
    step = batch_size * groups
    whole = len(lengths) // step * step
    kept = [index for batch in batches[: whole // step * groups] for index in batch]
    assert len(set(kept)) == len(kept) == whole
    assert {index for batch in batches for index in batch} == set(range(len(lengths)))
    if whole == len(lengths):
        steps = expected_padding(lengths, training(step, strategy="batch_rebalance", world_size=1))
        assert expected_padding(lengths, similar) <= steps + 1e-9


def test_the_batches_are_those_that_the_trainer_computes(tmp_path):
    lengths = [3, 9, 4, 30, 12, 7, 7, 25, 2, 18, 11, 5]
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    config = RecipeConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        train_sampling_strategy="batch_rebalance",
        seed=7,
        use_cpu=True,
    )
    trainer = RecipeTrainer(tiny_llama(300), config, examples_task(rows, tokenizer_for("gpt2")))
    computed = [batch["attention_mask"].sum(1).tolist() for batch in trainer.get_train_dataloader()]
    expected = [[lengths[index] for index in batch] for batch in micro_batches(lengths, config)]
    assert computed == expected
    other = [
        [lengths[i] for i in one]
        for one in micro_batches(lengths, training(2, 3, "batch_rebalance", 8))
    ]
    assert computed != other
