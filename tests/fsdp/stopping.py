"""When two runs of `with_options.py` have stopped alike."""

import copy
from pathlib import Path

import pytest
import with_options
from peft import PeftModel
from run_files import read_json
from tiny_models import MODELS, TOKENIZER
from transformers import AutoModelForCausalLM

from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task


def assert_stopped_alike(folder: Path, other: Path, kind: str) -> None:
    """Training stopped as early, and went back to equal weights: those that were saved."""
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
