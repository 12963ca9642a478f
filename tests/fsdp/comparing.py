"""When two runs are equal: in the losses of their steps, in what they learned, in where they
stopped.
"""

import copy
from pathlib import Path

import pytest
import torch
import with_options
from peft import PeftModel
from run_files import losses, read_json
from safetensors.torch import load_file
from tiny_models import MODELS, TOKENIZER
from transformers import AutoModelForCausalLM

from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task

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


def assert_stopped_alike(folder: Path, other: Path, kind: str) -> None:
    """Of `with_options.py`: training stopped as early, and went back to equal weights, which are
    those that were saved.
    """
    found, expected = (read_json(one / f"{kind}-stopped.json") for one in (folder, other))
    for name in ("steps", "best", "trainable"):
        assert found[name] == expected[name], name
    assert 0 < found["best"] == found["steps"] - 4 < 50
    assert found["evaluated"] == pytest.approx(expected["evaluated"], abs=1e-3)
    best = min(found["evaluated"])
    encoder = PromptEncoder(with_options.TEMPLATE, TOKENIZER, 100)
    saved = folder / f"run-{kind}-stopped"
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(saved)
    else:
        model = PeftModel.from_pretrained(copy.deepcopy(MODELS["llama"]), saved)
    score = evaluate_task(model, encoder, with_options.OTHER_ROWS).score
    assert found["after"] == pytest.approx(score, abs=1e-5)
    assert abs(found["after"] - best) < abs(found["evaluated"][-1] - best)
