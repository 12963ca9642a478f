"""recipes/lora_sft.py with --load_in_4bit, run whole on a tiny model with random weights."""

import json
from pathlib import Path

import lora_sft
import pytest
import torch
from optional_packages import needs_bitsandbytes
from peft import PeftModel
from run_files import losses, read_json
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

import recipelib.models.loading
from recipelib.cli import parse_arguments, run_recipe
from recipelib.models import quantization
from recipelib.models.quantization import count_parameters
from recipelib.reporting.predicting import answer_file
from recipelib.runtime.errors import UserError

ROWS = [
    {"sentence": f"a {word} film, number {number}", "label": label}
    for number in range(8)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bits")
    save_tiny_llama(folder / "model", hidden_size=64)
    (folder / "rows").mkdir()
    for split, rows in (("train", ROWS), ("validation", ROWS[:5])):
        lines = (json.dumps({**row, "sentence": f"{split}: {row['sentence']}"}) for row in rows)
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def command(root: Path, **options) -> list[str]:
    given = {
        "model_name_or_path": root / "model",
        "dataset": root / "rows",
        "output_dir": root / "out",
        "load_in_4bit": "true",
        "max_steps": 24,
        "learning_rate": 0.01,
        "save_steps": 12,
        "disable_tqdm": "true",
        **options,
    }
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def parsed(argv: list[str]):
    return parse_arguments(lora_sft.LoraArguments, "", lora_sft.DEFAULTS, argv)


@pytest.fixture(scope="module")
def run(root):
    """A run with everything on: its folder, and the model that it trained."""
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        load = recipelib.models.loading.load_pretrained

        def keep(*args, **kwargs):
            loaded.append(load(*args, **kwargs))
            return loaded[-1]

        patch.setattr(recipelib.models.loading, "load_pretrained", keep)
        lora_sft.main(*parsed(command(root, merge="true", dora="true")))
    return root / "out", loaded[0]


@needs_bitsandbytes
def test_the_base_is_in_4_bits_while_the_loss_falls(run):
    folder, model = run
    layers = [one for one in model.modules() if getattr(one, "quant_state", None) is not None]
    assert len(layers) == 14
    for layer in layers:
        size = layer.weight.numel() * layer.weight.element_size()
        assert size == layer.in_features * layer.out_features / 2
    assert losses(folder)[-1] < losses(folder)[0] - 0.3


@needs_bitsandbytes
def test_metrics_count_the_parameters_that_the_whole_model_has(run, root):
    metrics = read_json(run[0] / "metrics.json")
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    whole = count_parameters(PeftModel.from_pretrained(base, run[0], is_trainable=True))
    assert (metrics["trainable_parameters"], metrics["total_parameters"]) == whole
    assert metrics["quantization"] == "4-bit (nf4, double quantization)"


@needs_bitsandbytes
def test_the_adapter_loads_with_plain_peft_on_the_whole_base_and_merges_into_it(run, root):
    folder, trained = run
    weights = load_file(folder / "adapter_model.safetensors")
    assert {one.dtype for one in weights.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    untouched = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, folder))
    learned = (adapted - untouched).norm()
    assert (adapted - logits(trained)).norm() < 0.5 * learned  # but for the base's rounding
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert "quantization_config" not in read_json(folder / "merged" / "config.json")
    assert (logits(merged) - adapted).abs().max() < 1e-4


@needs_bitsandbytes
def test_rows_are_answered_as_they_were_scored(run, root):
    answer_file(*parsed(command(root, predict=root / "rows" / "validation.jsonl")))

    def read(name: str) -> list[dict]:
        return [json.loads(line) for line in (run[0] / name).read_text().splitlines()]

    scored, answered = read("predictions.jsonl"), read("predictions_validation.jsonl")
    assert len(scored) == len(answered) == 5
    for one, other in zip(scored, answered, strict=True):
        assert other["log_likelihoods"] == pytest.approx(one["log_likelihoods"], abs=1e-5)


@needs_bitsandbytes
def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(root, capsys):
    def train(name: str, **more) -> Path:
        lora_sft.main(
            *parsed(command(root, output_dir=root / name, max_steps=6, save_steps=3, **more))
        )
        return root / name

    whole = train("whole")
    again = train("again", resume_from_checkpoint=whole / "checkpoint-3")
    assert capsys.readouterr().out.count("4-bit (nf4, double quantization)") == 2  # in each plan
    assert losses(again) == losses(whole)
    first, second = (load_file(one / "adapter_model.safetensors") for one in (whole, again))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def refused(root: Path, monkeypatch, capsys, **options) -> str:
    monkeypatch.setattr("sys.argv", ["lora_sft.py", *command(root, **options)])
    with pytest.raises(SystemExit) as end:
        run_recipe(lora_sft.main, lora_sft.LoraArguments, "", lora_sft.DEFAULTS)
    assert end.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    return line


def test_without_bitsandbytes_it_ends_in_one_line_before_anything_is_read(
    root, monkeypatch, capsys
):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    line = refused(root, monkeypatch, capsys, dataset="no/such/file.jsonl")
    assert line.endswith("bitsandbytes is not installed; pip install -r requirements-gpu.txt")


def test_pissa_which_starts_from_the_whole_weights_is_refused(root, monkeypatch, capsys):
    line = refused(root, monkeypatch, capsys, pissa="true", dataset="no/such/file.jsonl")
    assert "--pissa" in line
    assert "--load_in_4bit" in line


def test_a_model_that_is_quantized_already_is_refused(root, monkeypatch, capsys, tmp_path):
    config = read_json(root / "model" / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    line = refused(root, monkeypatch, capsys, model_name_or_path=tmp_path)
    assert "quantized already" in line


def test_an_unknown_word_for_the_flag_is_refused(root):
    with pytest.raises(UserError, match="load_in_4bit"):
        parsed(command(root, load_in_4bit="perhaps"))
