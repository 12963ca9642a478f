"""recipes/lora_sft.py run whole, on a tiny model with random weights."""

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
from recipe_runs import REVIEWS, SUMS, changed, watched_training, write_rows
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from recipelib.adapters import saved
from recipelib.models import loading, nature
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])
QUICK = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4}


@pytest.fixture
def run(runs):
    """Runs the recipe; gives the output folder."""
    return runs(lora_sft, **QUICK)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> Path:
    """A run that tests only read."""
    return start(lora_sft, tmp_path_factory.mktemp("lora") / "out", max_steps=4, whole=True)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def size_of_b(folder: Path) -> float:
    return sum(value.norm().item() for name, value in weights(folder).items() if "lora_B" in name)


def test_a_run_leaves_everything_that_the_design_names(finished):
    metrics = read_json(finished / "metrics.json")
    assert {
        "task", "method", "model", "metric", "score", "stderr", "base_score", "eval_rows",
        "train_rows", "train_tokens", "supervised_tokens", "padding_fraction", "tokens_per_second",
        "train_seconds", "eval_seconds", "trainable_parameters", "total_parameters",
        "peak_memory_bytes", "world_size", "distributed_type", "seed", "versions",
    } <= set(metrics)  # fmt: skip
    assert metrics["method"] == "lora"
    assert metrics["eval_rows"] == 6
    assert metrics["train_rows"] == len(REVIEWS)
    assert metrics["estimated_memory_bytes"] > 0
    # one-word answers: the word's tokens and the end marker
    tokenizer = AutoTokenizer.from_pretrained(finished)
    words = [len(tokenizer(text).input_ids) + 1 for text in (" positive", " negative")]
    assert metrics["supervised_tokens"] == sum(words) * len(REVIEWS) // 2
    records = read_jsonl(finished / "predictions.jsonl")
    assert [record["row"] for record in records] == [0, 1, 2, 3, 4, 5]
    right = [record["prediction"] == record["answer"] for record in records]
    assert metrics["score"] == sum(right) / 6
    assert all(math.isfinite(loss) for loss in losses(finished))
    assert len(losses(finished)) == 4
    for name in ("loss.png", "README.md", "template.yaml", "tokenizer.json"):
        assert (finished / name).stat().st_size > 0
    assert not list(finished.glob("*.bin")), "a pickle was left"


def test_training_starts_at_exactly_the_base_model(run, causal_model):
    # At learning rate 0 the saved adapter is the initial one.
    folder = run(learning_rate=0, r=8)
    b = [value for name, value in weights(folder).items() if "lora_B" in name]
    a = torch.cat([value.flatten() for name, value in weights(folder).items() if "lora_A" in name])
    assert len(b) == 14  # seven linear layers in each of two blocks, without the head
    assert all(value.count_nonzero() == 0 for value in b)
    assert a.std().item() == pytest.approx(1 / 8, rel=0.05)  # a Gaussian of standard deviation 1/r
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    expected = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), expected)


def test_the_adapter_alone_is_trained(run):
    with watched_training() as seen:
        run()
    trained = changed(seen)
    assert trained == {name for name in seen.before if ".lora_" in name}
    assert len(trained) == 2 * 14


@pytest.mark.parametrize(
    ("options", "kept", "tensors"),
    [({"dora": True}, "use_dora", 3), ({"rslora": True, "r": 4}, "use_rslora", 2)],
)
def test_a_variant_is_trained_and_loads_with_plain_peft(run, causal_model, options, kept, tensors):
    folder = run(learning_rate=0.01, **options)
    assert read_json(folder / "adapter_config.json")[kept] is True
    assert len(weights(folder)) == tensors * 14
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    untouched = logits(base)
    assert not torch.allclose(logits(PeftModel.from_pretrained(base, folder)), untouched, atol=1e-4)


def test_pissa_is_saved_as_plain_lora_that_fits_the_untouched_base(run, causal_model):
    folder = run(pissa=True, r=4, alpha=4, learning_rate=0.01)
    config = read_json(folder / "adapter_config.json")
    assert config["r"] == 8  # the update and the start it is measured from, each of rank 4
    assert config["init_lora_weights"] is True
    assert not (folder / "pissa_start").exists()
    # The trained model wrote predictions.jsonl; the loaded adapter must say the same.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(causal_model)
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
    plain = run(learning_rate=1e-3, output="plain")
    plus = run(learning_rate=1e-3, loraplus_ratio=16, output="plus")
    assert size_of_b(plus) > 5 * size_of_b(plain)


def test_loraplus_takes_the_optimizer_and_the_weight_decay_that_are_asked_for(run):
    options = {"learning_rate": 1e-3, "optim": "sgd", "weight_decay": 0.1, "max_steps": 1}
    with watched_training() as seen:
        run(loraplus_ratio=16, **options)
    optimizer = seen.trainer.optimizer
    names = {parameter: name for name, parameter in seen.trainer.model.named_parameters()}
    groups = {
        names[parameter].split(".")[-3]: (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)
    assert groups == {"lora_A": (1e-3, 0.1), "lora_B": (16e-3, 0.1)}


def test_an_optimizer_that_groups_parameters_itself_is_refused_with_loraplus(run, monkeypatch):
    def galore(*_):  # as the trainer gives those whose packages are not here
        return torch.optim.SGD, {"optimizer_dict": {}}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(galore))
    with pytest.raises(UserError, match=r"^--optim sgd: groups parameters itself; try adamw_torch"):
        run(loraplus_ratio=16, optim="sgd")


def test_a_loss_that_is_not_finite_is_shown_as_that(run, capsys):
    options = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    folder = run(**options, stop_after_nan=0)
    assert not all(map(math.isfinite, losses(folder)))
    assert "warning: the loss is not finite from step 2 on" in capsys.readouterr().out


def test_a_mistake_does_not_cost_the_finished_run_that_it_would_have_replaced(run):
    folder = run(save_strategy="steps", save_steps=2)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(UserError, match="q_prj"):
        run(target_modules=["q_prj"])
    with pytest.raises(UserError, match=r"its adapter has r 16, and this run's 8; go on with"):
        run(resume_from_checkpoint="last", r=8)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_the_revision_of_the_base_is_kept_with_the_adapter_and_used_again(
    run, reviews, monkeypatch
):
    # The tiny model's folder stands for a hub id, which it would be refused for.
    for room in (loading, nature):
        monkeypatch.setattr(room, "hub_errors_in_one_line", lambda *_: nullcontext())
    folder = run(revision="v1")
    assert read_json(folder / "adapter_config.json")["revision"] == "v1"
    assert ", revision='v1')" in (folder / "README.md").read_text()
    asked, load = [], saved.load_pretrained

    def load_pretrained(name, **options):
        asked.append(options["revision"])
        return load(name, **options)

    monkeypatch.setattr(saved, "load_pretrained", load_pretrained)
    run(model_name_or_path="", predict=reviews / "validation.jsonl")
    run(predict=reviews / "validation.jsonl")  # another model, maybe: its own revision
    assert asked == ["v1", None]


def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(run, tmp_path):
    steps = {"max_steps": 8, "save_steps": 4, "lora_dropout": 0.1, "pissa": True}
    whole = run(**steps, output="whole")
    # As a kill after step 4 leaves it, the next checkpoint half-written.
    shutil.copytree(whole / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    (tmp_path / "again" / "checkpoint-8").mkdir()
    resumed = run(**steps, resume_from_checkpoint="last", output="again")
    assert losses(resumed) == losses(whole)
    first, second = weights(whole), weights(resumed)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_an_unfinished_run_is_not_mixed_with_a_new_one(run, tmp_path):
    folder = run(save_steps=2)
    shutil.copytree(folder, tmp_path / "stopped")
    (tmp_path / "stopped" / "metrics.json").unlink()
    with pytest.raises(UserError, match="checkpoint-4 of an unfinished run"):
        run(output="stopped")
    run(max_steps=2)
    assert read_json(folder / "metrics.json")["steps"] == 2  # a finished one is replaced


def test_preview_loads_the_tokenizer_only(run, causal_model, tmp_path, capsys):
    tokenizer_only = tmp_path / "tokenizer"
    tokenizer_only.mkdir()
    for file in causal_model.glob("*.json"):
        shutil.copy(file, tokenizer_only)
    folder = run(model_name_or_path=tokenizer_only, preview=2)
    shown = capsys.readouterr().out
    assert "fine film, number" in shown
    assert shown.count("⟦ positive</s>⟧") + shown.count("⟦ negative</s>⟧") == 2
    assert not folder.exists()


def test_predict_answers_rows_without_answers_as_the_run_did(finished, run, questions):
    run(output_dir=finished, predict=questions)
    answered = read_jsonl(finished / "predictions_questions.jsonl")
    scored = read_jsonl(finished / "predictions.jsonl")
    for answer, score in zip(answered, scored, strict=True):
        assert answer["prediction"] == score["prediction"]
        assert answer["answer"] is None
        expected = pytest.approx(score["log_likelihoods"], abs=1e-5)
        assert answer["log_likelihoods"] == expected


def test_a_task_with_reasoning_is_trained_on_it_and_scored_by_generating(run, tmp_path):
    file = write_rows(tmp_path, sums=SUMS[:8]) / "sums.jsonl"
    folder = run(template="gsm8k", dataset=file, max_new_tokens=6)
    records = read_jsonl(folder / "predictions.jsonl")
    assert read_json(folder / "metrics.json")["metric"] == "numeric_match"
    assert len(records) == 1  # held out of training
    assert all("generated" in record for record in records)


def test_rows_that_do_not_fit_are_shortened_and_counted(run):
    metrics = read_json(run(max_length=72, max_steps=1) / "metrics.json")
    assert metrics["train_examples_shortened"] == len(REVIEWS)
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
    folder = run(push_to_hub=True, hub_model_id="reviews-lora", max_steps=1)
    (_, name), (_, options) = calls
    assert name == "reviews-lora"
    assert options["repo_id"] == "someone/reviews-lora"
    assert options["folder_path"] == str(folder)
    assert "checkpoint-*" in options["ignore_patterns"]


@pytest.mark.slow
def test_accelerate_launch_runs_the_recipe(causal_model, reviews, tmp_path):
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "recipes/lora_sft.py"),
        *("--model_name_or_path", str(causal_model), "--dataset", str(reviews)),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "2"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Before training" in done.stdout
    assert "written to" in done.stdout
    assert read_json(tmp_path / "out" / "metrics.json")["steps"] == 2


def test_named_layers_alone_are_adapted_and_a_wrong_name_is_one_line(run):
    names = weights(run(target_modules=["q_proj"], max_steps=1))
    assert len(names) == 4
    assert all("q_proj" in name for name in names)
    for wrong in ("q_prj", "mlp", "norm"):
        with pytest.raises(
            UserError, match=f"--target_modules {wrong}: the model has no such layer"
        ) as no:
            run(target_modules=[wrong], output="wrong")
        assert "q_proj" in str(no.value)
        assert "\n" not in str(no.value)


def test_the_head_is_adapted_where_it_is_named(run):
    folder = run(target_modules=["q_proj", "lm_head"], max_steps=2, learning_rate=1e-2)
    learned = load_file(folder / "adapter_model.safetensors")
    assert learned["base_model.model.lm_head.lora_B.weight"].abs().sum() > 0


def test_the_loss_on_the_evaluation_rows_is_followed_on_request(run):
    folder = run(eval_strategy="steps", eval_steps=2)
    history = read_json(folder / "trainer_state.json")["log_history"]
    followed = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert set(followed) == {2, 4}
    assert all(math.isfinite(loss) for loss in followed.values())


@pytest.mark.parametrize("name", ["max_length", "per_device_train_batch_size"])
def test_sizes_of_zero_are_refused_at_once(run, name):
    with pytest.raises(UserError, match=f"--{name} 0: must be 1 or more"):
        run(**{name: 0})
