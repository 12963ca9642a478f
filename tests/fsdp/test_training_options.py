"""Noise, lines of rows, early stopping and samples are over two processes under FSDP2 as in one."""

from pathlib import Path

import pytest
import torch
import with_options
from launching import CONFIGS, finish, read_json, start
from peft import PeftModel
from tiny_models import MODELS, TOKENIZER
from transformers import AutoModelForCausalLM

from common.encoding import PromptEncoder
from common.evaluation import evaluate_task

pytestmark = pytest.mark.slow

SCRIPT = str(Path(with_options.__file__))
KINDS = ["full", "lora"]
HOW = list(with_options.OPTIONS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """What two processes found under each config, and what one process does."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("fsdp2", "fsdp2_sharded", "alone")}
    started = {}
    for config, hows in (("fsdp2", HOW), ("fsdp2_sharded", ["stopped"])):
        folder = found[config]
        runs = {f"{kind}-{how}": [SCRIPT, str(folder), kind, how] for how in hows for kind in KINDS}
        options = ("--num_processes", "2")
        started[config] = start(CONFIGS / f"{config}.yaml", folder / "runs.json", runs, *options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for how in HOW:
            for kind in KINDS:
                with_options.main(found["alone"], kind, how, rows_per_process=8)
    finally:
        torch.set_num_threads(threads)
        launched = {config: finish(process) for config, process in started.items()}
    for one in launched.values():
        assert one.failed == [], one.errors
    return found


@pytest.fixture
def results(folders, kind):
    """Of one kind: two processes' and one's, by how they were trained."""

    def read(how: str, config: str = "fsdp2") -> tuple[dict, dict]:
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


@pytest.mark.parametrize("config", ["fsdp2", "fsdp2_sharded"])
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
        model = PeftModel.from_pretrained(MODELS["llama"], saved)
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
