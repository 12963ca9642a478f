"""Where a resumed run goes on: behind the rows of the pass that were trained already.

transformers counts steps alone. With more processes or larger steps than before it would leave out
rows that nobody has seen, with fewer or smaller ones it would train some again. So each checkpoint
says what its steps were made of, and a run that has others counts rows.
"""

from __future__ import annotations

import math

from transformers import TrainerState

from recipelib.runtime import say

# What `set_initial_training_values` of transformers' trainer gives: passes, steps of a pass,
# examples, examples of the run, rows of a step, batches of a pass in each process, steps.
Values = tuple[int, int, int, int, int, int, int]
_SPLIT = "Split"  # in trainer_state.json, among the states of callbacks


def note_split(state: TrainerState, values: Values, training) -> None:
    """Keep in a run's checkpoints what its steps are made of."""
    _, _, _, _, rows_of_step, batches, _ = values
    split = {
        "rows_of_step": rows_of_step,
        "rows_of_batch": rows_of_step // training.gradient_accumulation_steps,  # of all processes
        "batches": batches,
        "processes": training.world_size,
    }
    state.stateful_callbacks[_SPLIT] = {"args": {}, "attributes": split}


def taken_up(
    values: Values, state: TrainerState, training, *, stream: bool
) -> tuple[Values, tuple[int, int] | None]:
    """What is left to train from a checkpoint on. What is trained twice is said.

    Args:
        values: those of a run from the beginning.
        state: the checkpoint's.
        training: the trainer's arguments.
        stream: whether rows are read while training, in a pass that does not end.
    Returns:
        The values of the resumed run, which numbers its steps on from the checkpoint's; and the
        passes that are finished with the batches to skip of the next. None for the latter: as
        transformers says, for the checkpoint does not tell.
    """
    if _SPLIT not in state.stateful_callbacks:  # of an earlier version
        return values, None
    then = state.stateful_callbacks[_SPLIT]["attributes"]
    epochs, steps, examples, samples, rows_of_step, batches, max_steps = values
    passes = 0 if stream else int(state.epoch)
    seen = round((state.epoch - passes) * then["batches"]) * then["rows_of_batch"]
    done, again = divmod(seen, rows_of_step)
    if not stream and done >= steps:
        passes, done, again = passes + 1, 0, 0
    if seen and (note := _seen_again(then, training, seen, rows_of_step, again, stream)):
        say(f"{state.global_step} steps are done, with {seen:,} rows of pass {passes + 1}; {note}")
    left = max_steps - state.global_step
    if stream:
        steps = done + left
        batches = steps * training.gradient_accumulation_steps
    elif training.max_steps > 0:
        epochs = passes + math.ceil((done + left) / steps)
    else:
        max_steps = state.global_step + max_steps - passes * steps - done
    place = passes, done * training.gradient_accumulation_steps
    return (epochs, steps, examples, samples, rows_of_step, batches, max_steps), place


def _seen_again(then, training, seen: int, rows_of_step: int, again: int, stream: bool) -> str:
    """Which rows are, in words; empty for none."""
    if stream and training.world_size != then["processes"]:
        return "processes have other shares now, so some of them may come again, and others not"
    grouped = not stream and training.train_sampling_strategy == "group_by_length"
    if grouped and rows_of_step != then["rows_of_step"]:
        return f"steps of {rows_of_step} are grouped anew: some of them come again, and others not"
    return f"{again} of them come again, for a step has {rows_of_step} now" if again else ""
