"""What ends training between two steps: SIGTERM, and a loss that stays not finite. All processes
decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import TrainerCallback

from recipelib.data import StoredRows
from recipelib.runtime import Terminated, UserError, terminating

_COMPARED_AT_ONCE = 1000
_SHOWN = 8


class EndInOrder(TrainerCallback):
    """Ends a run with its last whole checkpoint: after SIGTERM that of the step that is under way,
    after `--stop_after_nan` steps without a finite loss that of before. transformers' own
    `enable_jit_checkpoint` lets each process decide by itself, and the others wait for it.

    Args:
        accelerator: of the trainer, whose processes have to agree.
        task: the trainer's, to name rows.
    """

    def __init__(self, accelerator, task):
        self._accelerator, self._task = accelerator, task
        self._bad: torch.Tensor | None = None  # whether a loss of this step was not finite
        self._batches: list[tuple[torch.Tensor, Mapping]] = []  # of this step
        self._suspects: list[list[int]] = []  # the examples with which it began
        self._lost = 0  # steps in a row
        self._ending = False

    def saw(self, loss: torch.Tensor, inputs: Mapping) -> None:
        """Look at the loss of a micro-batch; the answer is waited for at the end of the step."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad
        if self._lost == 0 and {"input_ids", "attention_mask"} <= inputs.keys():
            kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            self._batches.append((bad, kept))

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget an attempt whose batches were too large."""
        self._lost, self._bad, self._batches, self._ending = 0, None, [], False

    def on_step_end(self, args, state, control, **kwargs):
        """End, or go on."""
        ended, lost = self._agreed(self._bad)
        if lost and self._lost == 0:
            self._suspects = [ids for bad, batch in self._batches if bad for ids in _ids(batch)]
        self._lost = self._lost + 1 if lost else 0
        self._bad, self._batches = None, []
        if self._lost:
            control.should_save = False  # it would replace a whole one
        if args.stop_after_nan and self._lost == args.stop_after_nan:
            raise UserError(self._refusal(state.global_step))
        if ended:
            self._end(control)

    def on_evaluate(self, args, state, control, **kwargs):
        """End, if SIGTERM has come meanwhile."""
        if not self._ending and self._agreed()[0]:
            self._end(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save no weights that are lost."""
        if self._lost:
            control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        """End, when all processes have written their parts."""
        if self._ending:
            self._accelerator.wait_for_everyone()
            raise Terminated(
                f"terminated after step {state.global_step}; --resume_from_checkpoint last goes "
                f"on from checkpoint-{state.global_step}"
            )

    def _end(self, control) -> None:
        if self._lost:
            raise Terminated("terminated; the loss is not finite, so the last step is not saved")
        self._ending = control.should_save = control.should_training_stop = True

    def _agreed(self, bad: torch.Tensor | None = None) -> tuple[bool, bool]:
        """Whether SIGTERM has come, and whether the loss is not finite, in any process."""
        bad = torch.zeros((), dtype=torch.bool) if bad is None else bad
        came = torch.full_like(bad, terminating())
        both = torch.stack([came, bad]).to(self._accelerator.device, torch.float32)
        ended, lost = self._accelerator.reduce(both, "sum").tolist()
        return ended > 0, lost > 0

    def _refusal(self, step: int) -> str:
        first = step - self._lost + 1
        steps = f"in step {step}" if first == step else f"from step {first} to {step}"
        rows = locate(self._task, self._suspects)
        rows = f" (step {first} had {rows})" if rows else ""
        return (
            f"--stop_after_nan {self._lost}: the loss was not finite {steps}{rows}; lower "
            "--learning_rate, or look at the rows; checkpoints of the steps before are kept"
        )


def _ids(batch: Mapping) -> list[list[int]]:
    """The tokens of each row of a batch, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def locate(task, suspects: Sequence[Sequence[int]]) -> str:
    """Where training rows with these tokens stand; empty where nobody knows: those of a stream, of
    packed lines, of several tasks, of a cloze.
    """
    encoded, rows = task.encoded, getattr(getattr(task, "train", None), "rows", None)
    if encoded.stream is not None or not isinstance(rows, StoredRows):
        return ""
    if not {"input_ids", "length"} <= {*encoded.examples.column_names}:
        return ""
    examples, lengths, found = encoded.examples.with_format("numpy"), encoded.lengths, set()
    for ids in suspects:
        places = np.flatnonzero(lengths == len(ids))
        for start in range(0, len(places), _COMPARED_AT_ONCE):
            some = places[start : start + _COMPARED_AT_ONCE]
            same = (np.stack(examples[some]["input_ids"]) == ids).all(1)
            if same.any():
                found.add(int(encoded.rows[some[same.argmax()]]))
                break
    places = [
        f"line {row['line']}" + (f" of {row['file']}" if "file" in row else "")
        for row in rows.select(sorted(found)[:_SHOWN]).locations()
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(places) + more
