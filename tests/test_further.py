"""--adapter of lora_sft.py, adapter_sft.py and prompt_tuning.py: a trained adapter trained further,
on tiny models with random weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import adapter_sft
import lora_sft
import prompt_tuning
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from recipelib.models import loading
from recipelib.runtime import UserError
from recipelib.training import RecipeTrainer

QUICK = {
    **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 100},
    **{"lr_scheduler_type": "constant", "warmup_steps": 0},
}
ADAPTER = "adapter_model.safetensors"
CASES = {
    "lora": (lora_sft, {"r": 4, "lora_dropout": 0.1, "rslora": True}),
    "dora": (lora_sft, {"dora": True, "r": 2, "target_modules": ["q_proj", "lm_head"]}),
    "norms": (
        adapter_sft,
        {"adapter_input": "residual", "scaling": "learned", "top_layers": 1, "train_norms": True},
    ),
    "soft_prompt": (prompt_tuning, {"virtual_tokens": 5, "soft_verbalizer": True}),
    "p_tuning": (prompt_tuning, {"virtual_tokens": 5, "tune": "p_tuning"}),
    "prefix": (prompt_tuning, {"virtual_tokens": 5, "tune": "prefix"}),
}


class Trained(NamedTuple):
    """A recipe and what a run of it has left."""

    recipe: Any
    folder: Path


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """Gives a finished run of a case; each is made once."""
    made = {}

    def make(name: str) -> Trained:
        if name not in made:
            recipe, options = CASES[name]
            folder = tmp_path_factory.mktemp(name) / "first"
            options = {**QUICK, **options, "learning_rate": 0.03, "max_steps": 4}
            made[name] = Trained(recipe, start(recipe, folder, **options))
        return made[name]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run has trained."""
    return {
        f"{file.name}: {name}": weight
        for file in folder.glob("*.safetensors")
        for name, weight in load_file(file).items()
    }


def scores(folder: Path) -> list[float]:
    """What decides among the labels of each evaluation row, in a run's predictions."""
    records = read_jsonl(folder / "predictions.jsonl")
    decides = [record.get("scores") or record["log_likelihoods"] for record in records]
    return [score for by_label in decides for score in by_label.values()]


@pytest.mark.parametrize("name", CASES)
def test_training_starts_from_exactly_the_trained_adapter_and_goes_on(
    name, trained, start, tmp_path
):
    recipe, first = trained(name)
    still = {**QUICK, "learning_rate": 0, "max_steps": 1, "lora_dropout": 0.0}
    if recipe is not lora_sft:
        del still["lora_dropout"]
    folder = start(recipe, tmp_path / "out", **still, adapter=first, model_name_or_path="")
    before, after = weights(first), weights(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    was, now = (read_json(run / "metrics.json") for run in (first, folder))
    assert now["base_score"] == was["score"]
    assert now["adapter"] == str(first)
    assert f"further from the adapter `{first}`" in (folder / "README.md").read_text()
    kept, asked = (scores(run) for run in (first, folder))
    assert asked == pytest.approx(kept, abs=1e-6)
    assert losses(folder)[0] < losses(first)[0]  # of the same rows


def test_the_first_loss_is_that_of_the_trained_adapter(
    trained, start, causal_model, tmp_path, monkeypatch
):
    recipe, first = trained("lora")
    seen, compute = [], RecipeTrainer.compute_loss

    def watch(self, model, inputs, **more):
        seen.append(dict(inputs))
        return compute(self, model, inputs, **more)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", watch)
    options = {**QUICK, "lora_dropout": 0.0, "learning_rate": 0.03, "max_steps": 2}
    folder = start(recipe, tmp_path / "out", **options, adapter=first)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_model), first)
    batch = {key: seen[0][key] for key in ("input_ids", "attention_mask", "labels")}
    assert losses(folder)[0] == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-5)


def test_a_resumed_run_gives_the_uninterrupted_ones_losses_and_weights(trained, start, tmp_path):
    recipe, first = trained("lora")
    options = {**QUICK, "adapter": first, "max_steps": 4, "save_steps": 2, "learning_rate": 0.03}
    whole = start(recipe, tmp_path / "whole", **options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = start(recipe, tmp_path / "again", **options, resume_from_checkpoint="last")
    assert losses(resumed) == losses(whole)
    before, after = weights(whole), weights(resumed)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    # A checkpoint is an adapter, too.
    options = {**QUICK, "adapter": whole / "checkpoint-2", "max_steps": 1, "learning_rate": 0}
    after = weights(start(recipe, tmp_path / "on", **options))
    before = load_file(whole / "checkpoint-2" / ADAPTER)
    assert all(torch.equal(before[name], after[f"{ADAPTER}: {name}"]) for name in before)


# What ends in a line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(trained, causal_model, masked_model, tmp_path_factory) -> dict[str, Path]:
    """Adapters and models that do not fit, by their names in the table."""
    root = tmp_path_factory.mktemp("misfits")
    first = trained("lora").folder
    unfinished = root / "unfinished"
    shutil.copytree(first, unfinished)
    (unfinished / "metrics.json").unlink()
    (root / "checkpoint-8").mkdir()
    for name in ("adapter_config.json", ADAPTER):
        shutil.copy(first / name, root / "checkpoint-8" / name)
    config = read_json(first / "adapter_config.json")
    changes: dict[str, Any] = {
        "classifier": {"task_type": "SEQ_CLS"},
        "niter": {"init_lora_weights": "pissa_niter_4"},
        "homeless": {"base_model_name_or_path": None},
        "moved": {"base_model_name_or_path": str(root / "gone")},
        "unknown": {"peft_type": "NEW"},
    }
    for name, change in changes.items():
        shutil.copytree(root / "checkpoint-8", root / name)
        (root / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(model, ia3).save_pretrained(root / "ia3")
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    raw = LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear")
    get_peft_model(model, raw).save_pretrained(root / "raw")
    phi = Phi3Config(
        **{"vocab_size": model.config.vocab_size, "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        pad_token_id=0,
    )
    Phi3ForCausalLM(phi).save_pretrained(root / "phi")
    AutoTokenizer.from_pretrained(causal_model).save_pretrained(root / "phi")
    (root / "other.yaml").write_text(
        "name: other\nform: generative\nprompt: '{{ sentence }} It was'\nanswer: ' {{ word }}'\n"
        "label: label\nverbalizer: {positive: [good], negative: [bad]}\n"
    )
    return {
        **{file.name: file for file in root.iterdir()},
        **{name: trained(name).folder for name in CASES},
        "masked": masked_model,
        "whole": causal_model,
        "wide": save_tiny_llama(root / "wide", 64),
        "shallow": save_tiny_llama(root / "shallow", num_hidden_layers=1),
    }


LORA, BOTTLENECK, PROMPTS = lora_sft, adapter_sft, prompt_tuning
REFUSED = [
    (BOTTLENECK, "lora", {}, "its method is LORA; lora_sft.py trains it further"),
    (LORA, "norms", {}, "its method is BOTTLENECK; adapter_sft.py trains it further"),
    (LORA, "prefix", {}, "its method is PREFIX_TUNING; prompt_tuning.py trains it further"),
    (LORA, "ia3", {}, "its method is IA3; no recipe trains it further"),
    (LORA, "classifier", {}, "was trained with a classification head"),
    (LORA, "niter", {}, "fits a base model that init_lora_weights=pissa_niter_4 has changed"),
    (LORA, "unknown", {}, "adapter_config.json is not PEFT's"),
    (LORA, "homeless", {"model_name_or_path": ""}, "does not say what model it is for; pass --m"),
    (LORA, "moved", {"model_name_or_path": ""}, "gone, which is not there; pass --model_name_or"),
    (LORA, "unfinished", {}, "is the folder of an unfinished run; finish it with"),
    (LORA, "checkpoint-8", {}, "was not written to its end; pass another"),
    (LORA, "whole", {}, "no adapter_config.json, so no adapter"),
    (LORA, "lora", {"output_dir": "<lora>"}, "lies in this run's --output_dir"),
    (LORA, "lora", {"model_name_or_path": "<wide>"}, "does not fit the model .size mismatch"),
    (LORA, "lora", {"model_name_or_path": "<shallow>"}, "it adapts model.layers.1, which the mod"),
    (LORA, "lora", {"model_name_or_path": "<phi>"}, "it adapts model.layers.0.*, which the model"),
    (BOTTLENECK, "norms", {"model_name_or_path": "<wide>"}, "does not fit the model .size mism"),
    (PROMPTS, "p_tuning", {"model_name_or_path": "<wide>"}, "its width is 32, the model's 64"),
    (PROMPTS, "prefix", {"model_name_or_path": "<masked>"}, "it is for a causal language model"),
    (LORA, "lora", {"r": 16}, "^--r 16: --adapter .* has 4, which stays; leave it out"),
    (LORA, "lora", {"alpha": 8}, "^--alpha 8: --adapter .* has 32, which stays; leave it out"),
    (LORA, "lora", {"dora": True}, "^--dora true: --adapter .* has false, which stays"),
    (LORA, "lora", {"target_modules": ["q_proj"]}, "^--target_modules q_proj: .* has others"),
    (LORA, "lora", {"pissa": True}, "^--pissa: training starts from --adapter; leave one of"),
    (LORA, "lora", {"predict": "rows.jsonl"}, "^--adapter: --predict answers with what --output"),
    (BOTTLENECK, "norms", {"bottleneck_size": 8}, "^--bottleneck_size 8: --adapter .* has 64"),
    (BOTTLENECK, "norms", {"top_layers": 2}, "^--top_layers 2: --adapter .* has 1, which stays"),
    (BOTTLENECK, "norms", {"init_weights": "identity"}, "^--init_weights: training starts from"),
    (PROMPTS, "prefix", {"tune": "soft_prompt"}, "^--tune soft_prompt: --adapter .* has prefix"),
    (PROMPTS, "prefix", {"virtual_tokens": 16}, "^--virtual_tokens 16: --adapter .* has 5"),
    (PROMPTS, "prefix", {"soft_verbalizer": True}, "^--soft_verbalizer true: .* has false, which"),
    (PROMPTS, "prefix", {"init": "words"}, "^--init: training starts from --adapter; leave one"),
    (
        PROMPTS,
        "soft_prompt",
        {"template": "<other.yaml>"},
        "embeddings are of negative, positive, and this task has positive, negative",
    ),
]


@pytest.mark.parametrize(("recipe", "name", "options", "says"), REFUSED)
def test_what_does_not_fit_ends_in_a_line_before_weights_are_loaded(
    recipe, name, options, says, place, start, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    options = {
        option: str(place[value[1:-1]]) if str(value).startswith("<") else value
        for option, value in options.items()
    }
    folder = options.pop("output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=says) as refused:
        start(recipe, Path(folder), **QUICK, adapter=place[name], **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "name", "options"),
    [
        (LORA, "lora", {"r": 4, "rslora": True}),
        (LORA, "raw", {}),
        (PROMPTS, "p_tuning", {"tune": "p_tuning", "virtual_tokens": 5}),
    ],
)
def test_what_fits_is_taken(recipe, name, options, place, start, tmp_path, capsys):
    options |= {**QUICK, "max_length": 100, "preview": 1, "model_name_or_path": ""}
    start(recipe, tmp_path / "out", adapter=place[name], **options)
    said = capsys.readouterr().out
    assert "positive" in said
    assert ("what it put out is trained, as a soft prompt" in said) == (name == "p_tuning")
    assert not (tmp_path / "out").exists()
