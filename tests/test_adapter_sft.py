"""recipes/adapter_sft.py run whole, on a tiny model with random weights."""

import json
import math
import shutil
from pathlib import Path

import adapter_sft
import pytest
import torch
from optional_packages import needs_bitsandbytes
from peft import PeftModel
from recipe_runs import changed, watched_training
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file, save_file
from tiny_llama import save_tiny_llama
from tiny_models import LLAMA_LIKE, tiny
from transformers import AutoModelForCausalLM

from recipelib.adapters import add_bottlenecks, without_adapters
from recipelib.adapters.bottleneck import BottleneckConfig, BottleneckLayer, layer_number
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])
QUICK = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "bottleneck_size": 8,
}


@pytest.fixture
def run(runs):
    """Runs the recipe; gives the output folder."""
    return runs(adapter_sft, **QUICK)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> Path:
    """A run that tests only read."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    return start(adapter_sft, folder, whole=True, **QUICK, learning_rate=0.01)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def layers(folder: Path) -> set[int]:
    return {layer_number(name) for name in weights(folder)}


def test_a_run_leaves_everything_that_the_design_names(finished):
    metrics = read_json(finished / "metrics.json")
    assert {
        "task", "method", "model", "metric", "score", "stderr", "base_score", "eval_rows",
        "train_rows", "train_tokens", "supervised_tokens", "padding_fraction", "tokens_per_second",
        "train_seconds", "eval_seconds", "trainable_parameters", "total_parameters",
        "peak_memory_bytes", "world_size", "distributed_type", "seed", "versions",
    } <= set(metrics)  # fmt: skip
    assert metrics["method"] == "adapter"
    assert metrics["eval_rows"] == 6
    assert metrics["estimated_memory_bytes"] > 0
    records = read_jsonl(finished / "predictions.jsonl")
    right = [record["prediction"] == record["answer"] for record in records]
    assert metrics["score"] == sum(right) / 6
    assert len(losses(finished)) == 4
    assert all(math.isfinite(loss) for loss in losses(finished))
    saved = weights(finished)
    assert len(saved) == 2 * 2 * 4  # two layers, two sublayers, down and up with their biases
    assert metrics["trainable_parameters"] == sum(weight.numel() for weight in saved.values())
    for name in ("loss.png", "README.md", "template.yaml", "tokenizer.json", "peft_bottleneck.py"):
        assert (finished / name).stat().st_size > 0
    assert not list(finished.glob("*.bin")), "a pickle was left"


def test_training_starts_near_the_base_model_or_at_it(run, causal_model):
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    expected = logits(base)
    near = run(learning_rate=0, max_steps=1)
    difference = logits(PeftModel.from_pretrained(base, near)) - expected
    assert 0 < difference.abs().max() < 0.01
    assert 0 < max(weight.abs().max() for weight in weights(near).values()) <= 0.02
    at = run(learning_rate=0, max_steps=1, init_weights="identity", output="identity")
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    assert torch.equal(logits(PeftModel.from_pretrained(base, at)), expected)


def test_the_base_model_is_scored_without_its_adapters(run, tmp_path, monkeypatch):
    (tmp_path / "loss.yaml").write_text(
        'name: loss\nform: generative\nprompt: "{{ sentence }}"\nanswer: " {{ label }}"\n'
        "metric: loss\n"
    )
    options = {"template": tmp_path / "loss.yaml", "learning_rate": 0, "max_steps": 1}
    plain = read_json(run(**options, init_weights="identity", output="plain") / "metrics.json")
    assert plain["score"] == plain["base_score"]
    # so that adapters show from the start
    monkeypatch.setattr("recipelib.adapters.bottleneck.INIT_STD", 5.0)
    large = read_json(run(**options) / "metrics.json")
    assert large["base_score"] == plain["base_score"]
    assert abs(large["score"] - plain["score"]) > 0.01


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"placement": "ffn", "adapter_input": "residual", "act": "relu"}, 2 * 4),
        ({"placement": "attention", "scaling": 0.5}, 2 * 4),
        ({"adapter_input": "input", "scaling": "learned"}, 4 * 5),
        ({"train_norms": True, "adapter_dropout": 0.1}, 4 * 4 + 5),
        ({"target_modules": ["down_proj"]}, 2 * 4),
    ],
)
def test_variants_are_trained_and_load_with_peft(run, causal_model, options, count):
    with watched_training() as seen:
        folder = run(**options, learning_rate=0.01)
    assert len(weights(folder)) == len(changed(seen)) == count
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    untouched = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, folder))
    assert not torch.allclose(tuned, untouched, atol=1e-4)
    assert torch.allclose(tuned, logits(seen.trainer.model), atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("adapter_input", ["output", "residual"])
def test_a_base_in_four_bits_learns_and_answers_as_it_scored(run, reviews, adapter_input, tmp_path):
    options = {
        "model_name_or_path": save_tiny_llama(tmp_path / "wide", hidden_size=64),
        "load_in_4bit": True,
        "adapter_input": adapter_input,
    }
    folder = run(**options, learning_rate=0.02, max_steps=12)
    assert read_json(folder / "metrics.json")["quantization"]
    assert losses(folder)[-1] < losses(folder)[0] - 0.1
    run(**options, predict=reviews / "validation.jsonl")
    answered = read_jsonl(folder / "predictions_validation.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    for answer, score in zip(answered, scored, strict=True):
        expected = pytest.approx(score["log_likelihoods"], abs=1e-3)
        assert answer["log_likelihoods"] == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_top_layers_have_no_backward_pass_below(run, monkeypatch, checkpointing):
    seen = set()
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def watched(self, hidden_states, *args, **kwargs):
        out = forward(self, hidden_states, *args, **kwargs)
        if out.requires_grad:
            number = self.self_attn.layer_idx
            out.register_hook(lambda gradient: seen.add(number))
        return out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", watched)
    options = {"max_steps": 1, "gradient_checkpointing": checkpointing}
    folder = run(top_layers=1, **options)
    assert layers(folder) == {1}
    assert seen == {1}
    seen.clear()
    run(**options, output="all")
    assert seen == {0, 1}


def test_activation_checkpointing_changes_nothing(run):
    plain = run(adapter_input="residual")
    again = run(adapter_input="residual", gradient_checkpointing=True, output="again")
    assert losses(again) == pytest.approx(losses(plain), abs=1e-6)


def test_dropped_adapters_are_scored_saved_and_still_peft_s(run, causal_model, capsys):
    folder = run(drop_adapters_below=1, learning_rate=0.02)
    said = capsys.readouterr().out
    assert "without 2 adapters below layer 1: accuracy" in said
    metrics = read_json(folder / "metrics.json")
    assert metrics["dropped_adapters"]["adapters"] == 2
    assert metrics["trainable_parameters"] == sum(
        weight.numel() for weight in weights(folder).values()
    )
    assert layers(folder) == {0, 1}
    assert layers(folder / "dropped") == {1}
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_model), folder)
    rest = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(causal_model), folder / "dropped"
    )
    assert not torch.allclose(logits(rest), logits(whole), atol=1e-4)
    with without_adapters(whole, below=1) as count:
        assert count == 2
        assert torch.equal(logits(rest), logits(whole))
    trained = [module for module in whole.modules() if isinstance(module, BottleneckLayer)]
    assert not any(layer.passed_over for layer in trained)
    run(max_steps=1)
    assert not (folder / "dropped").exists(), "of the run before"


def test_it_goes_on_from_an_adapter_of_adapterhub(run, tmp_path):
    first = run(placement="ffn", learning_rate=0.01, output="first")
    theirs = tmp_path / "hub"
    theirs.mkdir()
    config = read_json(
        ROOT / "tests" / "golden" / "adapterhub" / "llama_seq_bn" / "adapter_config.json"
    )
    config["config"] |= {"original_ln_before": False, "non_linearity": "gelu"}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    names = {".mlp.down_proj.bottleneck_down.": "down.0", ".mlp.down_proj.bottleneck_up.": "up"}
    renamed = {}
    for name, weight in weights(first).items():
        name = name.removeprefix("base_model.model.model.")
        for ours, part in names.items():
            name = name.replace(ours, f".output_adapters.adapters.old.adapter_{part}.")
        renamed[name] = weight
    save_file(renamed, theirs / "adapter.safetensors")
    same = {"bottleneck_size": 64}  # the default: the adapter says what it is
    again = run(adapterhub=theirs, learning_rate=0, max_steps=1, **same, output="again")
    for name, weight in weights(first).items():
        assert torch.equal(weights(again)[name], weight)
    with pytest.raises(UserError, match="no adapter_config"):
        run(adapterhub=tmp_path, **same, output="wrong")


def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(run, tmp_path):
    steps = {"max_steps": 8, "save_steps": 4, "adapter_dropout": 0.1}
    whole = run(**steps, output="whole")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    resumed = run(**steps, resume_from_checkpoint="last", output="again")
    assert losses(resumed) == losses(whole)
    for name, weight in weights(whole).items():
        assert torch.allclose(weight, weights(resumed)[name], atol=1e-6)


def test_predict_answers_rows_without_answers_as_the_run_did(run, questions):
    folder = run(adapter_input="input", learning_rate=0.01)
    run(predict=questions)
    answered = read_jsonl(folder / "predictions_questions.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    for answer, score in zip(answered, scored, strict=True):
        assert answer["prediction"] == score["prediction"]
        expected = pytest.approx(score["log_likelihoods"], abs=1e-5)
        assert answer["log_likelihoods"] == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"act": "gelo"}, "--act='gelo': no activation of ACT2FN"),
        ({"act": "prelu"}, "--act='prelu': no activation of ACT2FN, or one that is trained"),
        ({"scaling": "much"}, "--scaling much: pass a number, or learned"),
        ({"bottleneck_size": 0}, "--bottleneck_size 0: must be 1 or more"),
        ({"top_layers": 2}, "--top_layers 2: the model has 2 layers"),
        ({"drop_adapters_below": 3}, "--drop_adapters_below 3: the model has 2 layers"),
        (
            {"top_layers": 1, "drop_adapters_below": 1},
            "--drop_adapters_below 1: the lowest adapters are those of layer 1",
        ),
        (
            {"adapterhub": "somewhere", "bottleneck_size": 64, "placement": "ffn"},
            "--placement: an adapter of --adapterhub is as it is",
        ),
        ({"target_modules": ["down"]}, "--target_modules down: the model has no such layer"),
        (
            {"target_modules": ["up_proj"], "adapter_input": "input"},
            "up_proj ends no sublayer",
        ),
        ({"target_modules": ["norm"]}, "--target_modules norm: the model has no such layer"),
    ],
)
def test_wrong_input_is_one_line(run, options, said):
    with pytest.raises(UserError) as no:
        run(**options)
    assert said in str(no.value)
    assert "\n" not in str(no.value)


def test_what_the_tuner_refuses_is_said_of_the_option_that_it_names(run, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("adapter_input='residual': gemma2 norms h before it is added to x")

    monkeypatch.setattr("recipelib.adapters.adapter_layers.get_peft_model", refuse)
    with pytest.raises(UserError, match=r"^--adapter_input='residual': gemma2"):
        run(adapter_input="residual")


@pytest.mark.parametrize(("kind", "known"), [("olmo2", True), ("mixtral", False)])
def test_layers_made_as_llamas_have_adapters_under_any_name(kind, known, capsys):
    model = tiny(kind, **LLAMA_LIKE)
    config = BottleneckConfig(task_type="CAUSAL_LM")
    if not known:  # its experts are no linear layers
        with pytest.raises(UserError, match=r"--target_modules: model type 'mixtral'"):
            add_bottlenecks(model, config)
        return
    adapted = add_bottlenecks(model, config)
    assert "after self_attn.o_proj and mlp.down_proj, as in Llama" in capsys.readouterr().out
    layers = {name for name, it in adapted.named_modules() if isinstance(it, BottleneckLayer)}
    assert len(layers) == 4
