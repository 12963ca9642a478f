"""Which rows each process trains and evaluates, in each epoch and after a resumption; all processes
are simulated in this one.
"""

import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import TOKENIZER, VOCABULARY, tiny_llama
from tiny_task import encoded_from, examples_task
from transformers import TrainerState

from recipelib.training.batches import evaluation_batches, training_batches
from recipelib.training.config import RecipeConfig
from recipelib.training.resuming import note_split, taken_up
from recipelib.training.trainer import RecipeTrainer

STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance"]
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))


def training_of(shape, strategy="random", **options) -> SimpleNamespace:
    """Arguments by (rows of a batch, processes, batches of a step)."""
    size, processes, accumulated = shape
    loading = {
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_multiprocessing_context": None,
        "dataloader_prefetch_factor": None,
        "dataloader_in_order": True,
        "dataloader_pin_memory": False,
        "dataloader_drop_last": False,
    }
    settings = {
        "per_device_train_batch_size": size,
        "world_size": processes,
        "gradient_accumulation_steps": accumulated,
        "train_sampling_strategy": strategy,
        "seed": 3,
        "data_seed": None,
        "max_steps": -1,
    }
    return SimpleNamespace(**{**loading, **settings, **options})


def loaders(rows: int, training) -> list:
    """That of each process."""
    lengths = [5 + 7 * row % 31 for row in range(rows)]
    size, processes = training.per_device_train_batch_size, training.world_size
    return [
        training_batches(
            range(rows), lengths, training, list, size=size, processes=processes, process=rank
        )
        for rank in range(processes)
    ]


def epoch_of(loaders, epoch: int, skipped: int = 0) -> list[list[list[int]]]:
    """[processes] the batches of an epoch, as transformers' training loop takes them."""
    found = []
    for loader in loaders:
        rest = skip_first_batches(loader, skipped) if skipped else loader
        rest.set_epoch(epoch)
        below = getattr(rest.batch_sampler, "batch_sampler", None)
        if hasattr(below, "set_epoch"):
            below.set_epoch(epoch)
        found.append(list(rest))
    return found


def counted(processes) -> Counter:
    return Counter(row for batches in processes for batch in batches for row in batch)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), SHAPES, st.sampled_from(STRATEGIES), st.booleans())
def test_an_epoch_is_all_rows_and_repeats_only_what_makes_shares_even(
    rows, shape, strategy, drop_last
):
    size, processes, accumulated = shape
    training = training_of(shape, strategy, dataloader_drop_last=drop_last)
    found = epoch_of(loaders(rows, training), 0)
    seen, batch = counted(found), size * processes
    assert len({len(batches) for batches in found}) == 1
    if drop_last:
        unit = batch * accumulated if strategy == "batch_rebalance" else batch
        assert sorted(seen.values()) == [1] * (rows // unit * unit)
        return
    if strategy == "batch_rebalance":  # a row for each part of a step, and no more
        rest = rows % (batch * accumulated)
        repeated = max(0, processes * accumulated - rest) if rest else 0
    else:
        repeated = -rows % batch
    assert set(seen) == set(range(rows))
    assert seen.total() - rows == repeated
    if strategy in ("random", "batch_rebalance"):  # of the epoch's first rows
        assert max(seen.values()) <= 1 + -(-repeated // rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_epoch_has_another_order_and_each_seed_that_is_the_same_again(strategy):
    def epochs(**options):
        own = loaders(23, training_of((2, 3, 2), strategy, **options))
        return [epoch_of(own, epoch) for epoch in (0, 1)]

    first, second = epochs()
    assert (first != second) == (strategy != "sequential")
    assert epochs() == [first, second] == epochs(seed=0, data_seed=3)
    assert (epochs(seed=4)[0] != first) == (strategy != "sequential")


def values_of(loaders, training, passes: int) -> tuple:
    """As the trainer counts them."""
    batches = len(loaders[0])
    steps = -(-batches // training.gradient_accumulation_steps)
    shape = ("per_device_train_batch_size", "world_size", "gradient_accumulation_steps")
    rows_of_step = 1
    for name in shape:
        rows_of_step *= getattr(training, name)
    return passes, steps, 0, 0, rows_of_step, batches, passes * steps


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 40),
    SHAPES,
    SHAPES,
    st.sampled_from(STRATEGIES),
    st.integers(0, 2),
    st.floats(0, 0.99),
)
@example(23, (2, 3, 1), (3, 2, 1), "group_by_length", 1, 0.5)
@example(23, (2, 2, 2), (2, 4, 1), "batch_rebalance", 1, 0.5)
def test_a_resumed_run_goes_on_with_the_rows_that_were_not_seen(
    rows, before, after, strategy, passes, share
):
    old, new = (training_of(shape, strategy) for shape in (before, after))
    theirs, ours = loaders(rows, old), loaders(rows, new)
    values = values_of(theirs, old, 3)
    done = int(share * values[1])
    batches = done * old.gradient_accumulation_steps
    seen = counted(own[:batches] for own in epoch_of(theirs, passes))
    state = TrainerState(
        epoch=passes + batches / len(theirs[0]), global_step=passes * values[1] + done
    )
    note_split(state, values, old)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipelib.training.resuming.say", said.append)
        again, (skipped_passes, skipped) = taken_up(
            values_of(ours, new, 3), state, new, stream=False
        )
    assert skipped_passes == passes
    rest = epoch_of(ours, passes, skipped)
    even = counted(epoch_of(ours, passes)).total() - rows
    if strategy == "group_by_length" and values[4] != again[4]:
        assert bool(said) == (done > 0)
        return
    assert set(seen) | set(counted(rest)) == set(range(rows))
    repeated = seen.total() + counted(rest).total() - rows - even
    assert repeated == max(0, seen.total() % again[4])
    assert bool(said) == (repeated > 0)
    assert all(f"; {repeated} of them come again" in line for line in said)
    # The steps that are left are those of the rows that are.
    steps = -(-len(rest[0]) // new.gradient_accumulation_steps)
    assert again[-1] - state.global_step == steps + (2 - passes) * again[1]


def test_of_a_stream_all_rows_that_were_read_are_skipped():
    old, new = training_of((2, 2, 1), max_steps=10), training_of((2, 2, 2), max_steps=10)
    state = TrainerState(epoch=0.5, global_step=5)
    note_split(state, (99, 10, 0, 0, 4, 10, 10), old)  # read 20 rows
    values, place = taken_up((99, 10, 0, 0, 8, 20, 10), state, new, stream=True)
    assert place == (0, 4)  # two steps of eight
    assert values == (99, 7, 0, 0, 8, 14, 10)  # and five more
    older = TrainerState(epoch=0.5, global_step=5)
    assert taken_up(values, older, new, stream=True) == (values, None)


# In the trainer ---------------------------------------------------------------------------------

ROWS = [
    {"input_ids": [5 + row, *range(30, 31 + row % 4)], "labels": [-100, *range(30, 31 + row % 4)]}
    for row in range(14)
]


class Recorded:
    """A collator that keeps the rows of each batch, by their first token."""

    def __init__(self, collate):
        self.collate, self.rows = collate, Counter()

    def __call__(self, examples):
        self.rows.update(example["input_ids"][0] - 5 for example in examples)
        return self.collate(examples)


def trainer_for(folder, checkpoint=None, **options) -> RecipeTrainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 10,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    task = examples_task(ROWS, TOKENIZER, checkpoint=checkpoint)
    trainer = RecipeTrainer(tiny_llama(VOCABULARY), RecipeConfig(**{**defaults, **options}), task)
    trainer.data_collator = Recorded(trainer.data_collator)
    return trainer


@pytest.mark.parametrize(
    ("changes", "trained", "again", "steps"),
    [
        ({}, 8, 0, 4),
        (  # its last step has two rows for three parts
            {"gradient_accumulation_steps": 3, "train_sampling_strategy": "batch_rebalance"},
            *(9, 0, 2),
        ),
        ({"per_device_train_batch_size": 4, "packing": True}, 10, 2, 3),
        ({"per_device_train_batch_size": 1, "max_steps": 18}, 8, 0, 8),
    ],
)
def test_a_run_with_other_steps_trains_what_is_left_of_its_pass(
    changes, trained, again, steps, tmp_path, capsys
):
    trainer_for(tmp_path).train()  # of 14 steps; from the tenth on, in the second pass
    shutil.rmtree(tmp_path / "checkpoint-14")
    trainer = trainer_for(tmp_path, str(tmp_path / "checkpoint-10"), **changes)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 10 + steps
    assert trainer.data_collator.rows.total() == trained
    assert (f"; {again} of them come again, for a step has 4 now" in capsys.readouterr().out) == (
        again > 0
    )
    assert {*trainer.lr_scheduler.get_last_lr()} == {0.0}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_counts_each_row_once_however_many_processes_there_are(
    packing, processes, tmp_path
):
    rows = ROWS[:7]
    trainer = trainer_for(tmp_path, packing=packing, per_device_eval_batch_size=2)
    alone = trainer.evaluate(encoded_from(rows).examples)["eval_loss"]
    with torch.no_grad():
        losses = [
            trainer.model(**{name: torch.tensor([row[name]]) for name in row}).loss * len(labels)
            for row in rows
            if (labels := row["labels"][1:])
        ]
    tokens = sum(len(row["labels"]) - 1 for row in rows)
    assert alone == pytest.approx(sum(losses).item() / tokens, abs=1e-5)
    trainer._evaluated = [0.0, 0]
    state = trainer.accelerator.gradient_state
    for rank in range(processes):
        trainer.accelerator = SimpleNamespace(process_index=rank, gradient_state=state)
        batches = evaluation_batches(
            encoded_from(rows).examples.remove_columns("length"),
            trainer.args,
            trainer.data_collator,
            size=2,
            processes=processes,
            process=rank,
        )
        for batch in batches:
            trainer.prediction_step(trainer.model, batch, True)
    assert trainer._evaluated[1] == tokens
    assert trainer._evaluated[0] / tokens == pytest.approx(alone, abs=1e-5)
