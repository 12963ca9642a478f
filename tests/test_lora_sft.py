"""recipes/lora_sft.py run whole, on a tiny model with random weights."""

import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import lora_sft
import pytest
import torch
from peft import PeftModel
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.cli import parse_arguments, run_recipe
from recipelib.models import loading as models
from recipelib.reporting import predicting
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
        }
        given.update(zip(argv[::2], argv[1::2], strict=True))
        flat = [part for pair in given.items() for part in pair]
        lora_sft.main(*parse_arguments(lora_sft.LoraArguments, "", lora_sft.DEFAULTS, flat))
        return folder

    return start


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_run_leaves_everything_that_the_design_names(run):
    folder = run()
    metrics = read_json(folder / "metrics.json")
    assert {
        "task", "method", "model", "metric", "score", "stderr", "base_score", "eval_rows",
        "train_rows", "train_tokens", "supervised_tokens", "padding_fraction", "tokens_per_second",
        "train_seconds", "eval_seconds", "trainable_parameters", "total_parameters",
        "peak_memory_bytes", "world_size", "distributed_type", "seed", "versions",
    } <= set(metrics)  # fmt: skip
    assert metrics["method"] == "lora"
    assert metrics["eval_rows"] == 5
    assert metrics["train_rows"] == len(ROWS)
    # one-word answers: the word's tokens and the end marker
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [len(tokenizer(text).input_ids) + 1 for text in (" positive", " negative")]
    assert metrics["supervised_tokens"] == sum(words) * len(ROWS) // 2
    records = read_jsonl(folder / "predictions.jsonl")
    assert [record["row"] for record in records] == [0, 1, 2, 3, 4]
    right = [record["prediction"] == record["answer"] for record in records]
    assert metrics["score"] == sum(right) / 5
    assert all(math.isfinite(loss) for loss in losses(folder))
    assert len(losses(folder)) == 4
    for name in ("loss.png", "README.md", "template.yaml", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.glob("*.bin")), "a pickle was left"


def test_training_starts_at_exactly_the_base_model(run, model_folder):
    # At learning rate 0 the saved adapter is the initial one.
    folder = run("--learning_rate", "0", "--r", "8")
    weights = load_file(folder / "adapter_model.safetensors")
    b = [value for name, value in weights.items() if "lora_B" in name]
    a = torch.cat([value.flatten() for name, value in weights.items() if "lora_A" in name])
    assert len(b) == 14  # seven linear layers in each of two blocks, without the head
    assert all(value.count_nonzero() == 0 for value in b)
    assert a.std().item() == pytest.approx(1 / 8, rel=0.05)  # a Gaussian of standard deviation 1/r
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), expected)


def test_the_adapter_loads_with_plain_peft_in_a_script_of_its_own(run, model_folder, tmp_path):
    folder = run()
    card = (folder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    script = tmp_path / "load.py"
    script.write_text(
        snippet
        + "import sys, torch\n"
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


@pytest.mark.parametrize("more", [(), ("--dora", "true"), ("--rslora", "true", "--r", "4")])
def test_the_merged_model_gives_the_adapters_logits_in_plain_transformers(run, model_folder, more):
    folder = run("--merge", "true", "--learning_rate", "0.01", *more)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = logits(PeftModel.from_pretrained(base, folder))
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    assert (merged - adapted).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(folder / "merged").eos_token == "</s>"
    config = read_json(folder / "adapter_config.json")
    assert config["use_dora"] == ("--dora" in more)
    assert config["use_rslora"] == ("--rslora" in more)


def test_pissa_is_saved_as_plain_lora_that_fits_the_untouched_base(run, model_folder):
    folder = run("--pissa", "true", "--r", "4", "--alpha", "4", "--learning_rate", "0.01")
    config = read_json(folder / "adapter_config.json")
    assert config["r"] == 8  # the update and the start it is measured from, each of rank 4
    assert config["init_lora_weights"] is True
    # The trained model wrote predictions.jsonl; the loaded adapter must say the same.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, folder).eval()
    record = read_jsonl(folder / "predictions.jsonl")[0]
    prompt = tokenizer(record["prompt"]).input_ids
    total = {}
    for label, words in {
        "negative": (" negative", " bad"),
        "positive": (" positive", " good"),
    }.items():
        values = []
        for word in words:
            answer = tokenizer(word).input_ids
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            values.append(sum(scores[p, t] for p, t in zip(places, answer, strict=True)))
        total[label] = torch.logsumexp(torch.stack(values), 0).item()
    assert total == pytest.approx(record["log_likelihoods"], abs=1e-4)


def test_loraplus_moves_b_further_than_plain_lora_does(run):
    def size_of_b(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        return sum(value.norm().item() for name, value in weights.items() if "lora_B" in name)

    plain = run("--learning_rate", "1e-3", output="plain")
    plus = run("--learning_rate", "1e-3", "--loraplus_ratio", "16", output="plus")
    assert size_of_b(plus) > 5 * size_of_b(plain)


def test_loraplus_heeds_the_weight_decay(run):
    plain, decayed = (
        load_file(run("--loraplus_ratio", "16", *more, output=name) / "adapter_model.safetensors")
        for name, more in (("plain", ()), ("decayed", ("--weight_decay", "100")))
    )
    assert any((plain[name] - decayed[name]).abs().max() > 1e-3 for name in plain)


def test_a_loss_that_is_not_finite_is_shown_as_that(run, capsys):
    steep = ("--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_grad_norm", "0")
    folder = run(*steep)
    assert not all(map(math.isfinite, losses(folder)))
    assert "warning: the loss is not finite from step 2 on" in capsys.readouterr().out


def test_a_mistake_does_not_cost_the_finished_run_that_it_would_have_replaced(run):
    folder = run("--save_strategy", "steps", "--save_steps", "2")
    before = {one: one.stat().st_mtime_ns for one in folder.rglob("*")}
    with pytest.raises(UserError, match="q_prj"):
        run("--target_modules", "q_prj")
    with pytest.raises(UserError, match=r"its adapter has r 16, and this run's 8; go on with"):
        run("--resume_from_checkpoint", "last", "--r", "8")
    assert {one: one.stat().st_mtime_ns for one in folder.rglob("*")} == before


def test_the_revision_of_the_base_is_kept_with_the_adapter_and_used_again(
    run, data_folder, monkeypatch
):
    # The tiny model's folder stands for a hub id, which it would be refused for.
    monkeypatch.setattr(models, "hub_errors_in_one_line", lambda *_: nullcontext())
    folder = run("--revision", "v1")
    assert read_json(folder / "adapter_config.json")["revision"] == "v1"
    assert ", revision='v1')" in (folder / "README.md").read_text()
    asked, load = [], predicting.load_pretrained

    def load_pretrained(name, **options):
        asked.append(options["revision"])
        return load(name, **options)

    monkeypatch.setattr(predicting, "load_pretrained", load_pretrained)
    predict = ("--predict", str(data_folder / "validation.jsonl"))
    run("--model_name_or_path", "", *predict)
    run(*predict)  # another model, maybe: its own revision
    assert asked == ["v1", None]


def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(run, tmp_path):
    steps = ("--max_steps", "8", "--save_steps", "4", "--lora_dropout", "0.1", "--pissa", "true")
    whole = run(*steps, output="whole")
    # As a kill after step 4 leaves it, the next checkpoint half-written.
    shutil.copytree(whole / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    (tmp_path / "again" / "checkpoint-8").mkdir()
    resumed = run(*steps, "--resume_from_checkpoint", "last", output="again")
    assert losses(resumed) == losses(whole)
    first = load_file(whole / "adapter_model.safetensors")
    second = load_file(resumed / "adapter_model.safetensors")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_an_unfinished_run_is_not_mixed_with_a_new_one(run, tmp_path):
    shutil.copytree(run("--save_steps", "2"), tmp_path / "stopped")
    (tmp_path / "stopped" / "metrics.json").unlink()
    with pytest.raises(UserError, match="checkpoint-4 of an unfinished run"):
        run(output="stopped")
    assert read_json(run() / "metrics.json")["steps"] == 4  # a finished one is replaced


def test_preview_loads_the_tokenizer_only(run, model_folder, tmp_path, capsys):
    tokenizer_only = tmp_path / "tokenizer"
    tokenizer_only.mkdir()
    for file in Path(model_folder).glob("*.json"):
        shutil.copy(file, tokenizer_only)
    folder = run("--model_name_or_path", str(tokenizer_only), "--preview", "2")
    shown = capsys.readouterr().out
    assert "a fine film, number 0" in shown
    assert "⟦ positive</s>⟧" in shown
    assert "⟦ negative</s>⟧" in shown
    assert not folder.exists()


def test_predict_answers_rows_without_answers_as_the_run_did(run, data_folder, tmp_path):
    folder = run()
    questions = tmp_path / "questions.jsonl"
    rows = read_jsonl(data_folder / "validation.jsonl")
    questions.write_text("\n".join(json.dumps({"sentence": row["sentence"]}) for row in rows))
    run("--predict", str(questions))
    answered = read_jsonl(folder / "predictions_questions.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    assert [one["prediction"] for one in answered] == [one["prediction"] for one in scored]
    assert [one["answer"] for one in answered] == [None] * len(rows)


def test_a_task_with_reasoning_is_trained_on_it_and_scored_by_generating(run, tmp_path):
    rows = [
        {
            "question": f"{n} pens and {n} more?",
            "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
        }
        for n in range(1, 9)
    ]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    folder = run("--template", "gsm8k", "--dataset", str(file), "--max_new_tokens", "6")
    records = read_jsonl(folder / "predictions.jsonl")
    assert read_json(folder / "metrics.json")["metric"] == "numeric_match"
    assert len(records) == 1  # held out of training
    assert all("generated" in record for record in records)


def test_rows_that_do_not_fit_are_shortened_and_counted(run):
    folder = run("--max_length", "72")
    metrics = read_json(folder / "metrics.json")
    assert metrics["train_examples_shortened"] == len(ROWS)
    assert metrics["train_examples_left_out"] == 0


def test_a_finished_run_is_pushed_with_its_card_and_without_its_checkpoints(run, monkeypatch):
    calls = []

    class FakeApi:
        def __init__(self, token=None):
            pass

        def create_repo(self, name, **options):
            calls.append(("create", name))
            return type("Url", (), {"repo_id": f"someone/{name}"})()

        def upload_folder(self, **options):
            calls.append(("upload", options))

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    folder = run("--push_to_hub", "true", "--hub_model_id", "reviews-lora")
    (_, name), (_, options) = calls
    assert name == "reviews-lora"
    assert options["repo_id"] == "someone/reviews-lora"
    assert options["folder_path"] == str(folder)
    assert "checkpoint-*" in options["ignore_patterns"]


def test_bad_rows_end_in_one_line_before_any_model_is_loaded(run, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"sentence": "fine", "label": "positive"}\n{"sentence": "so", "label": "so"}\n')
    monkeypatch.setattr("sys.argv", ["lora_sft.py", "--dataset", str(bad)])
    with pytest.raises(SystemExit) as end:
        run_recipe(lora_sft.main, lora_sft.LoraArguments, "", lora_sft.DEFAULTS)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    (line,) = [one for one in error if one.startswith("error:")]
    assert f"{bad}:2: label: 'so' is not in the verbalizer" in line


@pytest.mark.slow
def test_accelerate_launch_runs_the_recipe(model_folder, data_folder, tmp_path):
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "recipes/lora_sft.py"),
        *("--model_name_or_path", str(model_folder), "--dataset", str(data_folder)),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "2"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Before training" in done.stdout
    assert "written to" in done.stdout
    assert read_json(tmp_path / "out" / "metrics.json")["steps"] == 2


def test_named_layers_alone_are_adapted_and_a_wrong_name_is_one_line(run):
    folder = run("--target_modules", "q_proj")
    names = load_file(folder / "adapter_model.safetensors")
    assert len(names) == 4
    assert all("q_proj" in name for name in names)
    for wrong in ("q_prj", "mlp", "norm"):
        with pytest.raises(
            UserError, match=f"--target_modules {wrong}: the model has no such layer"
        ) as no:
            run("--target_modules", wrong, output="wrong")
        assert "q_proj" in str(no.value)
        assert "\n" not in str(no.value)


def test_the_loss_on_the_evaluation_rows_is_followed_on_request(run):
    folder = run("--eval_strategy", "steps", "--eval_steps", "2")
    history = read_json(folder / "trainer_state.json")["log_history"]
    followed = {one["step"]: one["eval_loss"] for one in history if "eval_loss" in one}
    assert set(followed) == {2, 4}
    assert all(math.isfinite(loss) for loss in followed.values())


@pytest.mark.parametrize("name", ["max_length", "per_device_train_batch_size"])
def test_sizes_of_zero_are_refused_at_once(run, name):
    with pytest.raises(UserError, match=f"--{name} 0: must be 1 or more"):
        run(f"--{name}", "0")
