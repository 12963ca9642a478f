"""recipes/transfer_learning.py --mode freeze run whole, on tiny models of two layers: with what the
frozen one computes kept, and with it computed in each pass.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transfer_learning
from cloze_runs import scores as cloze_scores
from peft import PeftModel
from recipe_runs import changed, watched_training
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from transfer_learning import TransferArguments
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from recipelib import probes
from recipelib.activations import DTYPES, POOLING
from recipelib.reporting import features
from recipelib.runtime import UserError

QUICK = {
    "train_layers": 1,
    "num_train_epochs": 2,
    "max_length": 100,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "random",
    "save_strategy": "no",
}
MASKED = {"model_name_or_path": "MASKED"}
HEAD = {"head": "classifier"}
# What can be trained.
KINDS = {
    "words": {},
    "masked words": MASKED,
    "head": HEAD,
    "masked head": {**MASKED, **HEAD},
    "lora": {"peft": "lora"},
    "masked lora": {**MASKED, "peft": "lora"},
    "lora and head": {"peft": "lora", **HEAD},
    "bottleneck": {"peft": "bottleneck"},
    "own head": {"train_head": True, "train_layers": 0},
    "masked own head": {**MASKED, "train_head": True},
}


@pytest.fixture
def run(runs, masked_model):
    """Runs the recipe; gives the output folder."""
    start = runs(transfer_learning, **QUICK)

    def run(output: str = "out", **options) -> Path:
        if options.get("model_name_or_path") == "MASKED":
            options["model_name_or_path"] = masked_model
        return start(output, **options)

    return run


class Left(NamedTuple):
    """A run's folder, and the names of the parameters that it has changed."""

    folder: Path
    changed: set[str]


@pytest.fixture(scope="module")
def left(start, masked_model, tmp_path_factory):
    """Gives the run of a kind, with the cache or without, made once: to be read."""
    made: dict[tuple, Left] = {}

    def of(kind: str, cached: bool = True) -> Left:
        if (kind, cached) not in made:
            folder, options = tmp_path_factory.mktemp("left"), {**QUICK, **KINDS[kind]}
            options |= {"cache_dir": folder / "states"} if cached else {"cache": False}
            options |= {"eval_strategy": "steps", "eval_steps": 4}
            if "model_name_or_path" in options:
                options["model_name_or_path"] = masked_model
            with watched_training() as seen:
                start(transfer_learning, folder / "out", **options)
            made[kind, cached] = Left(folder / "out", changed(seen))
        return made[kind, cached]

    return of


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def scores(folder: Path, name: str = "predictions") -> list[list[float]]:
    """What each label got, row by row."""
    records = read_jsonl(folder / f"{name}.jsonl")
    return [[*(one.get("scores") or one["log_likelihoods"]).values()] for one in records]


def assert_close(found: list[list[float]], wanted: list[list[float]], **tolerance) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), **tolerance)


def assert_equal_runs(run: Path, other: Path) -> None:
    """Both had the same losses, and hold the same weights; but for the biases of keys, which have
    no true gradient.
    """
    assert losses(run) == pytest.approx(losses(other), abs=1e-5)
    found, wanted = weights(run), weights(other)
    assert found.keys() == wanted.keys()
    for name in found:
        if "key.bias" not in name:
            torch.testing.assert_close(found[name], wanted[name], atol=2e-5, rtol=0, msg=name)


def followed(folder: Path) -> list[float]:
    """The loss on the evaluation rows."""
    history = read_json(folder / "trainer_state.json")["log_history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


# The cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "masked words", "masked own head"])
def test_with_and_without_the_cache_the_same_is_learned(left, kind):
    (cached, trained), (plain, _) = left(kind), left(kind, cached=False)
    assert len(losses(cached)) == 6
    assert_equal_runs(cached, plain)
    assert followed(cached) == pytest.approx(followed(plain), abs=1e-5)
    assert len(followed(cached)) == 2
    assert_close(scores(cached), scores(plain), atol=1e-4, rtol=1e-4)
    assert trained
    metrics, other = (read_json(run / "metrics.json") for run in (cached, plain))
    assert "cache_bytes" not in other
    for name in ("train_tokens", "trainable_parameters", "base_score", "padding_fraction"):
        assert metrics[name] == other[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_above_what_was_computed_once_has_changed(left, kind):
    folder, trained = left(kind)
    metrics = read_json(folder / "metrics.json")
    assert metrics["layers_computed_once"] == (2 if kind == "own head" else 1)
    assert metrics["cache_bytes"] > 0
    assert metrics["cache_seconds"] > 0
    assert metrics["cache_relative_error"] == 0
    assert trained
    assert not any(".0." in name for name in trained)  # the lower layer
    assert not any("embed" in name for name in trained)


@pytest.mark.parametrize("options", [{}, {**MASKED, **HEAD}], ids=["words", "masked head"])
def test_a_second_run_finds_what_the_first_has_computed(run, options, tmp_path, capsys):
    run("first", cache_dir=tmp_path / "states", **options)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "states").rglob("*.*")}
    assert "there already" not in capsys.readouterr().out
    # Another seed orders the rows anew, and draws another head: neither is below.
    run("second", cache_dir=tmp_path / "states", seed=7, **options)
    assert "there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "states").rglob("*.*")} == files


def test_half_the_bytes_train_almost_the_same(run, left):
    half = run(cache_dtype="bfloat16")
    found, whole = (read_json(one / "metrics.json") for one in (half, left("words").folder))
    assert found["cache_bytes"] == whole["cache_bytes"] / 2
    assert 1e-4 < found["cache_relative_error"] < 1e-2
    difference = [a - b for a, b in zip(losses(half), losses(left("words").folder), strict=True)]
    assert 0 < max(map(abs, difference)) < 0.02


# Resumed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        MASKED,
        {"peft": "lora", **HEAD},
        {"unfreeze_every": 3, "train_layers": 2},
    ],
    ids=["words", "masked words", "lora and head", "thawing"],
)
def test_resuming_gives_the_uninterrupted_runs_losses_and_weights(run, options, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, **options}
    steps["cache_dir"] = tmp_path / "states"
    whole = run("whole", **steps)
    # As a kill after step 4 leaves it, the next checkpoint half-written.
    shutil.copytree(whole / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    (tmp_path / "again" / "checkpoint-6").mkdir()
    resumed = run("again", **steps, resume_from_checkpoint="last")
    assert len(losses(resumed)) == 6
    assert_equal_runs(resumed, whole)


# What is left -----------------------------------------------------------------------------------


def likelihoods(model, tokenizer, records: list[dict]) -> list[list[float]]:
    """Of the labels of movie_reviews after each prompt, by a model alone."""
    labels = {"negative": (" negative", " bad"), "positive": (" positive", " good")}
    found = []
    for record in records:
        prompt = tokenizer(record["prompt"]).input_ids
        total = {}
        for label, words in labels.items():
            values = []
            for word in words:
                answer = tokenizer(word).input_ids
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer])).logits[0]
                places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                ranked = logits.log_softmax(-1)
                values.append(sum(ranked[p, t] for p, t in zip(places, answer, strict=True)))
            total[label] = torch.logsumexp(torch.stack(values), 0).item()
        found.append([total[label] for label in record["log_likelihoods"]])
    return found


@pytest.mark.parametrize("kind", ["words", "own head", "lora", "bottleneck"])
def test_plain_transformers_and_peft_load_it_and_give_the_tuned_scores(left, kind, causal_model):
    folder = left(kind).folder
    if kind in ("lora", "bottleneck"):
        base = AutoModelForCausalLM.from_pretrained(causal_model)
        model = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    records = read_jsonl(folder / "predictions.jsonl")
    found = likelihoods(model, AutoTokenizer.from_pretrained(folder), records)
    assert_close(found, scores(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["masked words", "masked own head", "masked lora"])
def test_a_masked_model_too(left, kind, masked_model, reviews):
    folder = left(kind).folder
    if kind == "masked lora":
        base = AutoModelForMaskedLM.from_pretrained(masked_model)
        model = PeftModel.from_pretrained(base, folder).eval()
    else:
        model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    found = cloze_scores(folder, reviews, model)
    wanted = [score for row in scores(folder) for score in row]
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["head", "masked head"])
def test_plain_transformers_load_a_classification_head_that_chooses_the_same(left, kind):
    folder = left(kind).folder
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = read_jsonl(folder / "predictions.jsonl")
    assert [*model.config.id2label.values()] == [*records[0]["scores"]]
    texts = [record["prompt"] for record in records]
    # As the model card shows it: one text, and several padded ones.
    special = kind == "head"
    shown = {"return_tensors": "pt", "add_special_tokens": special}
    with torch.no_grad():
        single = [model(**tokenizer(text, **shown)).logits for text in texts]
    found = torch.cat(single).log_softmax(-1)
    torch.testing.assert_close(found, torch.tensor(scores(folder)), atol=1e-4, rtol=1e-4)
    names = [model.config.id2label[number] for number in found.argmax(-1).tolist()]
    assert names == [record["prediction"] for record in records]
    tokenizer.padding_side = "right"
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, **shown)).logits.log_softmax(-1)
    torch.testing.assert_close(together, found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_answers_rows_without_answers_as_the_run_did(left, kind, run, questions, tmp_path):
    folder = shutil.copytree(left(kind).folder, tmp_path / "left")
    run(output_dir=folder, predict=questions, model_name_or_path="")
    answered = read_jsonl(folder / "predictions_questions.jsonl")
    records = read_jsonl(folder / "predictions.jsonl")
    assert [one["prediction"] for one in answered] == [one["prediction"] for one in records]
    assert all(one["answer"] is None for one in answered)
    assert_close(scores(folder, "predictions_questions"), scores(folder), atol=1e-5, rtol=1e-5)


# What is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"layers.1", "norm"}),
        ({"train_layers": None, "freeze_layers": 0}, {"layers.0", "layers.1", "norm"}),
        ({"train_layers": None, "train_modules": ["layers.1.mlp"]}, {"layers.1"}),
        (HEAD, {"layers.1", "norm", "score"}),
    ],
)
def test_what_is_asked_for_changes_and_nothing_else(run, options, expected):
    with watched_training() as seen:
        run(num_train_epochs=0.3, **options)
    found = {
        ".".join(name.removeprefix("model.").split(".")[: 2 if "layers." in name else 1])
        for name in changed(seen)
    }
    assert found == expected


def test_a_table_says_what_is_trained_and_where_the_states_are_kept(run, tmp_path, capsys):
    run(cache_dir=tmp_path / "states")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "layer 0 frozen, " in said
    assert "layer 1 trained, " in said
    assert "computed once: 1 of 2" in said
    folder = next((tmp_path / "states").iterdir())
    assert str(folder) in said.replace(" ", "")


def test_a_mistake_is_one_line_before_anything_is_written(run, tmp_path):
    with pytest.raises(UserError, match=r"^--train_layers 3: the model has 2 layers"):
        run(train_layers=3)
    assert not (tmp_path / "out").exists()


# Features ---------------------------------------------------------------------------------------


def test_the_options_name_all_kinds_there_are():
    fields = TransferArguments.__dataclass_fields__
    for name, kinds in (("probe", [*probes.KINDS, "all"]), ("pooling", POOLING)):
        assert fields[name].metadata["choices"] == [*kinds]
    assert fields["cache_dtype"].metadata["choices"] == [*DTYPES]


def test_features_are_uploaded_if_that_is_asked_for_and_the_card_fetches_them(runs, monkeypatch):
    run = runs(transfer_learning, mode="features")
    uploaded = []
    monkeypatch.setattr(features, "publish", lambda folder, training: uploaded.append(folder))
    assert "snapshot_download" not in (run("kept") / "README.md").read_text()
    assert uploaded == []
    folder = run("uploaded", push_to_hub=True)
    assert uploaded == [str(folder)]
    assert f"snapshot_download({str(folder)!r})" in (folder / "README.md").read_text()
