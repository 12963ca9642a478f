"""recipes/lora_sft.py with --load_in_4bit, run whole on a tiny model with random weights."""

import json
from pathlib import Path

import lora_sft
import pytest
import torch
from optional_packages import needs_bitsandbytes
from peft import PeftModel
from recipe_runs import changed, watched_training
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.adapters import merge_adapter
from recipelib.models import quantization
from recipelib.models.quantization import count_parameters
from recipelib.runtime.errors import UserError

QUICK = {
    "load_in_4bit": True,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose widths are multiples of 64, as 4 bits on a CPU need them."""
    return save_tiny_llama(tmp_path_factory.mktemp("wide"), hidden_size=64)


@pytest.fixture
def run(runs, wide):
    """Runs the recipe; gives the output folder."""
    return runs(lora_sft, model_name_or_path=wide, **QUICK)


@pytest.fixture(scope="module")
def finished(start, wide, tmp_path_factory):
    """A run with everything on: its folder, and what was seen of its training."""
    options = {**QUICK, "dora": True, "max_steps": 24, "model_name_or_path": wide, "whole": True}
    with watched_training() as seen:
        return start(lora_sft, tmp_path_factory.mktemp("four_bits") / "out", **options), seen


@needs_bitsandbytes
def test_the_base_is_in_4_bits_while_the_loss_falls(finished):
    folder, seen = finished
    model = seen.trainer.model
    layers = [layer for layer in model.modules() if getattr(layer, "quant_state", None) is not None]
    assert len(layers) == 14
    for layer in layers:
        size = layer.weight.numel() * layer.weight.element_size()
        assert size == layer.in_features * layer.out_features / 2
    assert [name for name in changed(seen) if ".lora_" not in name] == []
    assert losses(folder)[-1] < losses(folder)[0] - 0.3


@needs_bitsandbytes
def test_memory_is_estimated_with_the_activations(finished):
    _, seen = finished
    assert seen.trainer.estimated.note == ""
    assert seen.trainer.estimated.activations > 0


@needs_bitsandbytes
def test_metrics_count_the_parameters_that_the_whole_model_has(finished, wide):
    folder, _ = finished
    metrics = read_json(folder / "metrics.json")
    base = AutoModelForCausalLM.from_pretrained(wide)
    whole = count_parameters(PeftModel.from_pretrained(base, folder, is_trainable=True))
    assert (metrics["trainable_parameters"], metrics["total_parameters"]) == whole
    assert metrics["quantization"] == "4-bit (nf4, double quantization)"


@needs_bitsandbytes
def test_the_adapter_loads_with_plain_peft_on_the_whole_base_and_merges_into_it(
    finished, wide, tmp_path
):
    folder, seen = finished
    weights = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(wide)
    untouched = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, folder))
    learned = (adapted - untouched).norm()
    trained = logits(seen.trainer.model)
    assert (adapted - trained).norm() < 0.5 * learned  # but for the base's rounding
    merged = merge_adapter(str(folder), str(tmp_path / "merged"))
    assert "quantization_config" not in read_json(merged / "config.json")
    assert (logits(AutoModelForCausalLM.from_pretrained(merged)) - adapted).abs().max() < 1e-4


@needs_bitsandbytes
def test_rows_are_answered_as_they_were_scored(finished, run, reviews):
    folder, _ = finished
    run(output_dir=folder, predict=reviews / "validation.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    answered = read_jsonl(folder / "predictions_validation.jsonl")
    assert len(scored) == 6
    for score, answer in zip(scored, answered, strict=True):
        expected = pytest.approx(score["log_likelihoods"], abs=1e-5)
        assert answer["log_likelihoods"] == expected


@needs_bitsandbytes
def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(run, capsys):
    whole = run(max_steps=6, save_steps=3, output="whole")
    again = run(max_steps=6, resume_from_checkpoint=whole / "checkpoint-3", output="again")
    assert capsys.readouterr().out.count("4-bit (nf4, double quantization)") == 2  # in each plan
    assert losses(again) == losses(whole)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_without_bitsandbytes_it_ends_in_one_line_before_anything_is_read(run, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    line = r"bitsandbytes is not installed; pip install -r requirements-gpu\.txt$"
    with pytest.raises(UserError, match=line):
        run(dataset="no/such/file.jsonl")


def test_pissa_which_starts_from_the_whole_weights_is_refused(run):
    with pytest.raises(UserError, match=r"--pissa: .* leave out it or --load_in_4bit"):
        run(pissa=True, dataset="no/such/file.jsonl")


def test_a_model_that_is_quantized_already_is_refused(run, wide, tmp_path):
    config = read_json(wide / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="quantized already"):
        run(model_name_or_path=tmp_path)


def test_an_unknown_word_for_the_flag_is_refused(run):
    with pytest.raises(UserError, match="load_in_4bit"):
        run(load_in_4bit="perhaps")
