"""When two runs are equal: in the losses of their steps and in what they learned."""

from pathlib import Path

import pytest
import torch
from run_files import losses
from safetensors.torch import load_file

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


def assert_equal_losses(run: Path, other: Path, steps: int = 8) -> None:
    """Each of the first steps has the same loss."""
    assert len(losses(run)) == steps
    assert losses(run) == pytest.approx(losses(other)[:steps], abs=1e-4)


def assert_equal_updates(run: Path, other: Path, start: Path, file: str = ADAPTER) -> None:
    """Both hold the same tensors, D and D' away from where they started, and |D - D'| is at most
    1e-3 |D|: against the weights themselves, any two short runs would be equal.
    """
    weights = [load_file(folder / file) for folder in (run, other, start)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    names = sorted(weights[0])
    found, wanted, before = (torch.cat([one[name].flatten() for name in names]) for one in weights)
    update = (wanted - before).norm()
    assert update > 0.1  # something was learned
    assert (found - wanted).norm() <= 1e-3 * update
