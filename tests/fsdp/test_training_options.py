"""Noise, lines of rows, early stopping and samples are over two processes under FSDP2 as in one."""

import copy
from pathlib import Path

import pytest
import torch
import with_options
from peft import PeftModel
from run_files import read_json
from tiny_models import MODELS, TOKENIZER
from transformers import AutoModelForCausalLM

from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task

pytestmark = pytest.mark.slow

KINDS = ["full", "lora"]
HOW = list(with_options.OPTIONS)


@pytest.fixture(scope="module")
def folders(root, two, sharded) -> dict[str, Path]:
    """What two processes found under each config, and what one process does."""
    assert two.failed == [], two.errors
    assert sharded.failed == [], sharded.errors
    found = {name: root / f"{name}_options" for name in ("two", "sharded", "alone")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for how in HOW:
            for kind in KINDS:
                with_options.main(found["alone"], kind, how, rows_per_process=8)
    finally:
        torch.set_num_threads(threads)
    return found


@pytest.fixture
def results(folders, kind):
    """Of one kind: two processes' and one's, by how they were trained."""

    def read(how: str, config: str = "two") -> tuple[dict, dict]:
        file = f"{kind}-{how}.json"
        return read_json(folders[config] / file), read_json(folders["alone"] / file)

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_in_the_training_loss_and_nowhere_else(results, kind):
    two, alone = results("noise")
    plain = results("packed")[0]["losses"][0]  # the same first step, without noise
    for found in (two, alone):
        assert abs(found["losses"][0] - plain) > 1e-2
        assert not found["noisy"]
        for loss in (found["before"], found["after"]):
            assert loss == pytest.approx(alone["before"], abs=1e-5)
        assert found["evaluated"] == pytest.approx(alone["evaluated"][:1] * 2, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_lines_of_rows_are_trained_as_in_one_process(results, kind):
    two, alone = results("packed")
    assert two["rows_apart"] is alone["rows_apart"] is True
    assert two["padding"] == alone["padding"] == 0
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert alone["losses"][0] - alone["losses"][-1] > 0.1
    assert two["after"] == pytest.approx(alone["after"], abs=1e-4)


@pytest.mark.parametrize("config", ["two", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_and_goes_back_as_in_one_process(results, folders, kind, config):
    two, alone = results("stopped", config)
    for name in ("steps", "best", "trainable"):
        assert two[name] == alone[name], name
    assert 0 < two["best"] == two["steps"] - 4 < 50
    assert two["evaluated"] == pytest.approx(alone["evaluated"], abs=1e-3)
    best = min(two["evaluated"])
    encoder = PromptEncoder(with_options.TEMPLATE, TOKENIZER, 100)
    saved = folders[config] / f"run-{kind}-stopped"
    if kind == "full":
        model = AutoModelForCausalLM.from_pretrained(saved)
    else:
        model = PeftModel.from_pretrained(copy.deepcopy(MODELS["llama"]), saved)
    score = evaluate_task(model, encoder, with_options.OTHER_ROWS).score
    assert two["after"] == pytest.approx(score, abs=1e-5)
    assert abs(two["after"] - best) < abs(two["evaluated"][-1] - best)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_one_process(results, kind, how):
    two, alone = results(how)
    assert two["samples"] == alone["samples"]
    assert len(alone["samples"]) >= 6
    assert two["whole"] == 0 < alone["whole"]  # every parameter is a shard again
