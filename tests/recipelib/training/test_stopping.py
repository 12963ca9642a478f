"""SIGTERM and a loss that stays not finite end a run with its last whole checkpoint."""

import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress

import lora_sft
import pytest
import torch
from recipe_runs import REVIEWS
from run_files import losses
from safetensors.torch import load_file

from recipelib.runtime import EXIT_CODE, Terminated, UserError, checkpoints, ending
from recipelib.runtime.owning import LOCK
from recipelib.training.trainer import RecipeTrainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


@pytest.fixture
def run(runs):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    return runs(lora_sft, **options, max_steps=5)


@pytest.fixture(autouse=True)
def usual_signals():
    """Behind `Terminated` a process ends; this one goes on."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def watch(monkeypatch):
    """Calls a function with the trainer, the loss and the inputs of each micro-batch; it gives the
    loss that is seen instead.
    """
    watched = RecipeTrainer.watched

    def put(change: Callable) -> None:
        def look(self, loss, inputs):
            return watched(self, change(self, loss, inputs), inputs)

        monkeypatch.setattr(RecipeTrainer, "watched", look)

    return put


def kept(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*") if checkpoints.is_whole(path))


def test_after_sigterm_the_step_is_finished_and_saved_and_the_run_goes_on_as_if_undisturbed(
    run, watch
):
    whole = run(output="whole")

    def terminate(trainer, loss, inputs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    watch(terminate)
    with pytest.raises(Terminated) as end:
        run(output="ended")
    folder = whole.parent / "ended"
    assert "after step 3; --resume_from_checkpoint last goes on from checkpoint-3" in end.value.line
    assert kept(folder) == ["checkpoint-3"]
    assert not (folder / LOCK).exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # what a launcher repeats
    watch(lambda trainer, loss, inputs: loss)
    run(output="ended", resume_from_checkpoint="auto")
    assert losses(folder) == losses(whole)
    for name, weight in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(weight, load_file(folder / "adapter_model.safetensors")[name])


def test_sigterm_outside_of_training_ends_at_once():
    with pytest.raises(Terminated) as end, ending.heeding_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == EXIT_CODE == 143
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which a new process has
    with suppress(ZeroDivisionError), ending.heeding_sigterm():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not ending.terminating()


def test_a_loss_that_stays_not_finite_ends_the_run_with_the_checkpoint_before_and_the_rows(
    run, watch
):
    seen = []

    def lose(trainer, loss, inputs):
        if trainer.state.global_step >= 1:
            seen.append(trainer.processing_class.batch_decode(inputs["input_ids"]))
            return loss * float("nan")
        return loss

    watch(lose)
    with pytest.raises(UserError) as error:
        run(**SAVING, output="lost", stop_after_nan=2)
    said = str(error.value)
    assert said.startswith("--stop_after_nan 2: the loss was not finite from step 2 to 3 (step 2 ")
    lines = [int(line) for line in re.findall(r"line (\d+)", said)]
    rows = [REVIEWS[line - 1]["sentence"] for line in lines]
    assert len(seen) == 2
    assert len(rows) == 4
    for text in seen[0]:
        assert any(re.search(rf"{row}\b", text) for row in rows)


def test_no_checkpoint_of_lost_weights_replaces_a_whole_one(run, watch):
    watch(lambda trainer, loss, _: loss * (float("inf") if trainer.state.global_step else 1))
    with pytest.raises(UserError, match=r"not finite from step 2 to 4 .*steps before are kept"):
        run(**SAVING, output="lost")
    folder = run(**SAVING, output="more", stop_after_nan=0).parent
    assert kept(folder / "lost") == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("torch.save", OSError(28, "No space left on device"), "No space left on device"),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file"), "cannot be writt"),
        ("json.dumps", PermissionError(13, "Permission denied", "some/file"), "^some/file: Perm"),
    ],
)
def test_what_cannot_be_written_ends_in_one_line_and_keeps_the_last_whole_checkpoint(
    run, watch, monkeypatch, tmp_path, where, error, said
):
    def fail(*_, **__):
        raise error

    def begin(trainer, loss, inputs):  # in the second step
        if trainer.state.global_step == 1:
            monkeypatch.setattr(where, fail)
        return loss

    watch(begin)
    with pytest.raises(UserError, match=said) as ended:
        run(**SAVING)
    monkeypatch.undo()
    assert "\n" not in str(ended.value)
    assert kept(tmp_path / "out") == ["checkpoint-1"]
