"""recipes/adapter_sft.py run whole, on a tiny model with random weights."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import adapter_sft
import pytest
import torch
from optional_packages import needs_bitsandbytes
from peft import PeftModel
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.adapters.bottleneck import BottleneckLayer, layer_number
from recipelib.cli import parse_arguments, run_recipe
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"sentence": f"a {word} film, number {number}", "label": label}
    for number in range(8)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for split, rows in (("train", ROWS), ("validation", ROWS[:5])):
        lines = (json.dumps({**row, "sentence": f"{split}: {row['sentence']}"}) for row in rows)
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(model_folder, data_folder, tmp_path):
    """Runs `main` as the command line would, on the tiny model; gives the output folder."""

    def start(*argv: str, output: str = "out") -> Path:
        folder = tmp_path / output
        given = {
            "--model_name_or_path": str(model_folder),
            "--dataset": str(data_folder),
            "--output_dir": str(folder),
            "--per_device_train_batch_size": "4",
            "--max_steps": "4",
            "--disable_tqdm": "true",
            "--bottleneck_size": "8",
        }
        given.update(zip(argv[::2], argv[1::2], strict=True))
        flat = [part for pair in given.items() for part in pair]
        adapter_sft.main(
            *parse_arguments(adapter_sft.AdapterArguments, "", adapter_sft.DEFAULTS, flat)
        )
        return folder

    return start


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def layers(folder: Path) -> set[int]:
    return {layer_number(name) for name in weights(folder)}


def test_a_run_leaves_everything_that_the_design_names(run):
    folder = run()
    metrics = read_json(folder / "metrics.json")
    assert {
        "task", "method", "model", "metric", "score", "stderr", "base_score", "eval_rows",
        "train_rows", "train_tokens", "supervised_tokens", "padding_fraction", "tokens_per_second",
        "train_seconds", "eval_seconds", "trainable_parameters", "total_parameters",
        "peak_memory_bytes", "world_size", "distributed_type", "seed", "versions",
    } <= set(metrics)  # fmt: skip
    assert metrics["method"] == "adapter"
    assert metrics["eval_rows"] == 5
    records = read_jsonl(folder / "predictions.jsonl")
    right = [record["prediction"] == record["answer"] for record in records]
    assert metrics["score"] == sum(right) / 5
    assert len(losses(folder)) == 4
    assert all(math.isfinite(loss) for loss in losses(folder))
    saved = weights(folder)
    assert len(saved) == 2 * 2 * 4  # two layers, two sublayers, down and up with their biases
    assert metrics["trainable_parameters"] == sum(one.numel() for one in saved.values())
    for name in ("loss.png", "README.md", "template.yaml", "tokenizer.json", "peft_bottleneck.py"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.glob("*.bin")), "a pickle was left"


def test_training_starts_near_the_base_model_or_at_it(run, model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = logits(base)
    near = run("--learning_rate", "0")
    found = logits(PeftModel.from_pretrained(base, near))
    assert 0 < (found - expected).abs().max() < 0.01
    assert 0 < max(one.abs().max() for one in weights(near).values()) <= 0.02
    at = run("--learning_rate", "0", "--init_weights", "identity", output="identity")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert torch.equal(logits(PeftModel.from_pretrained(base, at)), expected)


def test_the_base_model_is_scored_without_its_adapters(run, tmp_path, monkeypatch):
    (tmp_path / "loss.yaml").write_text(
        'name: loss\nform: generative\nprompt: "{{ sentence }}"\nanswer: " {{ label }}"\n'
        "metric: loss\n"
    )
    options = ("--template", str(tmp_path / "loss.yaml"), "--learning_rate", "0")
    plain = read_json(run(*options, "--init_weights", "identity", output="plain") / "metrics.json")
    assert plain["score"] == plain["base_score"]
    monkeypatch.setattr(
        "recipelib.adapters.bottleneck.INIT_STD", 1.0
    )  # so that adapters show from the start
    large = read_json(run(*options) / "metrics.json")
    assert large["base_score"] == plain["base_score"]
    assert abs(large["score"] - plain["score"]) > 0.01


def test_the_adapter_loads_with_peft_and_one_file_in_a_script_of_its_own(
    run, model_folder, tmp_path
):
    folder = run()
    card = (folder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    shutil.copy(folder / "peft_bottleneck.py", tmp_path)
    script = tmp_path / "load.py"
    script.write_text(
        snippet
        + "import datasets, sys, torch\n"
        + f"out = model.eval()(input_ids=torch.tensor({IDS.tolist()})).logits\n"
        + "assert not [name for name in sys.modules if name.split('.')[0] == 'common']\n"
        + "torch.save(out.detach(), 'logits.pt')\n"
    )
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    untouched = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, folder))
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), tuned, atol=1e-6)
    assert not torch.allclose(tuned, untouched, atol=1e-4), "nothing was learned"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--placement", "ffn", "--adapter_input", "residual", "--act", "relu"), 2 * 4),
        (("--placement", "attention", "--scaling", "0.5"), 2 * 4),
        (("--adapter_input", "input", "--scaling", "learned"), 4 * 5),
        (("--train_norms", "true", "--adapter_dropout", "0.1"), 4 * 4 + 5),
        (("--target_modules", "down_proj"), 2 * 4),
    ],
)
def test_variants_are_trained_and_load_with_peft(run, model_folder, options, count):
    folder = run(*options, "--learning_rate", "0.01")
    assert len(weights(folder)) == count
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    untouched = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, folder))
    assert not torch.allclose(tuned, untouched, atol=1e-4)
    start = run(*options, "--learning_rate", "0", output="start")
    moved = [
        name for name, one in weights(start).items() if not torch.equal(one, weights(folder)[name])
    ]
    assert len(moved) == count


@needs_bitsandbytes
@pytest.mark.parametrize("adapter_input", ["output", "residual"])
def test_a_base_in_four_bits_learns_and_answers_as_it_scored(
    run, data_folder, adapter_input, tmp_path
):
    wide = str(save_tiny_llama(tmp_path / "wide", hidden_size=64))
    options = ("--model_name_or_path", wide, "--load_in_4bit", "true")
    options += ("--adapter_input", adapter_input)
    folder = run(*options, "--learning_rate", "0.02", "--max_steps", "12")
    assert read_json(folder / "metrics.json")["quantization"]
    assert losses(folder)[-1] < losses(folder)[0] - 0.1
    run(*options, "--predict", str(data_folder / "validation.jsonl"))
    answered = read_jsonl(folder / "predictions_validation.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    for one, other in zip(answered, scored, strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
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
    folder = run("--top_layers", "1", "--gradient_checkpointing", checkpointing)
    assert layers(folder) == {1}
    assert seen == {1}
    seen.clear()
    run("--gradient_checkpointing", checkpointing, output="all")
    assert seen == {0, 1}


def test_activation_checkpointing_changes_nothing(run):
    plain = run("--adapter_input", "residual")
    again = run("--adapter_input", "residual", "--gradient_checkpointing", "true", output="again")
    assert losses(again) == pytest.approx(losses(plain), abs=1e-6)


def test_dropped_adapters_are_scored_saved_and_still_peft_s(run, model_folder, capsys):
    folder = run("--drop_adapters_below", "1", "--learning_rate", "0.02")
    said = capsys.readouterr().out
    assert "without 2 adapters below layer 1: accuracy" in said
    metrics = read_json(folder / "metrics.json")
    assert metrics["dropped_adapters"]["adapters"] == 2
    assert metrics["trainable_parameters"] == sum(one.numel() for one in weights(folder).values())
    assert layers(folder) == {0, 1}
    assert layers(folder / "dropped") == {1}
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    rest = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), folder / "dropped"
    )
    assert not torch.allclose(logits(rest), logits(whole), atol=1e-4)
    with adapter_sft.without_adapters(whole, below=1) as count:
        assert count == 2
        assert torch.equal(logits(rest), logits(whole))
    trained = [one for one in whole.modules() if isinstance(one, BottleneckLayer)]
    assert not any(one.passed_over for one in trained)
    run()
    assert not (folder / "dropped").exists(), "of the run before"


def test_it_goes_on_from_an_adapter_of_adapterhub(run, model_folder, tmp_path):
    from safetensors.torch import save_file

    first = run("--placement", "ffn", "--learning_rate", "0.01", output="first")
    theirs = tmp_path / "hub"
    theirs.mkdir()
    config = read_json(
        ROOT / "tests" / "golden" / "adapterhub" / "llama_seq_bn" / "adapter_config.json"
    )
    config["config"] |= {"original_ln_before": False, "non_linearity": "gelu"}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    names = {".mlp.down_proj.bottleneck_down.": "down.0", ".mlp.down_proj.bottleneck_up.": "up"}
    renamed = {}
    for name, one in weights(first).items():
        name = name.removeprefix("base_model.model.model.")
        for ours, part in names.items():
            name = name.replace(ours, f".output_adapters.adapters.old.adapter_{part}.")
        renamed[name] = one
    save_file(renamed, theirs / "adapter.safetensors")
    same = ("--bottleneck_size", "64")  # the default: the adapter says what it is
    again = run("--adapterhub", str(theirs), "--learning_rate", "0", *same, output="again")
    for name, one in weights(first).items():
        assert torch.equal(weights(again)[name], one)
    with pytest.raises(UserError, match="no adapter_config"):
        run("--adapterhub", str(tmp_path), *same, output="wrong")


def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(run, tmp_path):
    steps = ("--max_steps", "8", "--save_steps", "4", "--adapter_dropout", "0.1")
    whole = run(*steps, output="whole")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    resumed = run(*steps, "--resume_from_checkpoint", "last", output="again")
    assert losses(resumed) == losses(whole)
    for name, one in weights(whole).items():
        assert torch.allclose(one, weights(resumed)[name], atol=1e-6)


def test_preview_and_predict(run, data_folder, tmp_path, capsys):
    folder = run("--preview", "1")
    assert "⟦ positive</s>⟧" in capsys.readouterr().out
    assert not folder.exists()
    run("--adapter_input", "input")
    questions = tmp_path / "questions.jsonl"
    rows = read_jsonl(data_folder / "validation.jsonl")
    questions.write_text("\n".join(json.dumps({"sentence": row["sentence"]}) for row in rows))
    run("--predict", str(questions))
    answered = read_jsonl(folder / "predictions_questions.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    assert [one["prediction"] for one in answered] == [one["prediction"] for one in scored]


def test_icl_eval_scores_it(run, data_folder, tmp_path):
    folder = run("--learning_rate", "0.01")
    command = [
        *(sys.executable, "recipes/icl_eval.py", "--adapter", str(folder), "--shots", "0"),
        *("--template", str(folder / "template.yaml"), "--dataset", str(data_folder)),
        *("--rendering", "text", "--output_dir", str(tmp_path / "scored")),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scored = read_jsonl(tmp_path / "scored" / "predictions.jsonl")
    own = read_jsonl(folder / "predictions.jsonl")
    for one, other in zip(scored, own, strict=True):
        assert one["scores"]["sum"] == pytest.approx(other["log_likelihoods"], abs=1e-4)


def test_the_loss_on_the_evaluation_rows_is_followed_on_request(run):
    folder = run("--eval_strategy", "steps", "--eval_steps", "2")
    history = read_json(folder / "trainer_state.json")["log_history"]
    followed = {one["step"]: one["eval_loss"] for one in history if "eval_loss" in one}
    assert set(followed) == {2, 4}
    assert all(math.isfinite(loss) for loss in followed.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--act", "gelo"), "--act='gelo': no activation of ACT2FN"),
        (("--act", "prelu"), "--act='prelu': no activation of ACT2FN, or one that is trained"),
        (("--scaling", "much"), "--scaling much: pass a number, or the word learned"),
        (("--bottleneck_size", "0"), "--bottleneck_size 0: must be 1 or more"),
        (("--top_layers", "2"), "--top_layers 2: the model has 2 layers"),
        (("--drop_adapters_below", "3"), "--drop_adapters_below 3: the model has 2 layers"),
        (
            ("--top_layers", "1", "--drop_adapters_below", "1"),
            "--drop_adapters_below 1: the lowest adapters are those of layer 1",
        ),
        (
            ("--adapterhub", "somewhere", "--bottleneck_size", "64", "--placement", "ffn"),
            "--placement: an adapter of --adapterhub is as it is",
        ),
        (("--target_modules", "down"), "--target_modules down: the model has no such layer"),
        (
            ("--target_modules", "up_proj", "--adapter_input", "input"),
            "up_proj ends no sublayer",
        ),
        (("--target_modules", "norm"), "--target_modules norm: the model has no such layer"),
    ],
)
def test_wrong_input_is_one_line(run, options, said):
    with pytest.raises(UserError) as no:
        run(*options)
    assert said in str(no.value)
    assert "\n" not in str(no.value)


def test_what_the_tuner_refuses_is_said_of_the_option_that_it_names(run, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("adapter_input='residual': gemma2 norms h before it is added to x")

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(UserError, match=r"^--adapter_input='residual': gemma2"):
        run("--adapter_input", "residual")


def test_bad_rows_end_in_one_line(tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"sentence": "fine", "label": "positive"}\n{"sentence": "so", "label": "so"}\n')
    monkeypatch.setattr("sys.argv", ["adapter_sft.py", "--dataset", str(bad)])
    with pytest.raises(SystemExit) as end:
        run_recipe(adapter_sft.main, adapter_sft.AdapterArguments, "", adapter_sft.DEFAULTS)
    assert end.value.code == 2
    assert f"{bad}:2: label: 'so' is not in the verbalizer" in capsys.readouterr().err
