"""recipes/cloze_sft.py run whole, on tiny causal and masked models with random weights."""

import shutil
from pathlib import Path
from typing import NamedTuple

import cloze_sft
import prompt_tuning
import pytest
import torch
from cloze_runs import KINDS, PROMPT, QUICK, flat, scores, shown_code
from peft import PeftModel
from recipe_runs import changed, watched_training
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file

from recipelib.adapters.saved import load_tuned
from recipelib.runtime.errors import UserError


@pytest.fixture
def run(runs, masked_model):
    """Runs the recipe on the tiny masked model; gives the output folder."""

    def run(**options):
        quick = {} if options.get("score_only") else QUICK
        return runs(cloze_sft, model_name_or_path=masked_model, **quick)(**options)

    return run


class Trained(NamedTuple):
    """A run, what it trained on, and which parameters changed."""

    kind: str
    prompt: bool
    soft: bool
    folder: Path
    changed: set[str]
    whole: set[str]


TUNED = [
    *[(kind, prompt, False) for kind in KINDS for prompt in (False, True)],
    ("masked", True, True),
    ("causal", False, True),
]


@pytest.fixture(scope="module", params=TUNED, ids=str)
def trained(request, start, causal_model, masked_model, tmp_path_factory) -> Trained:
    kind, prompt, soft = request.param
    base = masked_model if kind == "masked" else causal_model
    options = {**(PROMPT if prompt else QUICK), "learning_rate": 0.05, "whole": kind == "masked"}
    with watched_training() as seen:
        folder = start(
            cloze_sft,
            tmp_path_factory.mktemp("cloze") / "out",
            **options,
            model_name_or_path=base,
            soft_prompt=prompt,
            soft_verbalizer=soft,
        )
    return Trained(kind, prompt, soft, folder, changed(seen), {*seen.before})


def test_all_parameters_change(trained):
    left = trained.whole - trained.changed
    # A bias of all keys changes no attention; where labels have embeddings, words have no bias.
    without_effect = ["key.bias", *(["predictions.bias", "decoder.bias"] if trained.soft else [])]
    assert [name for name in left if not name.endswith(tuple(without_effect))] == []
    parts = {name.split(".")[0] for name in trained.whole}
    assert ("prompt_encoder" in parts) == trained.prompt
    assert any("soft_verbalizer." in name for name in trained.whole) == trained.soft


def test_what_was_trained_is_saved_and_loads_with_peft_and_transformers_alone(trained, reviews):
    folder, metrics = trained.folder, read_json(trained.folder / "metrics.json")
    kept = flat(read_jsonl(folder / "predictions.jsonl"))
    if trained.soft:
        model = load_tuned(folder, metrics)
        assert load_file(folder / "soft_verbalizer.safetensors")["weight"].shape == (2, 32)
    elif trained.prompt:
        model = KINDS[trained.kind].from_pretrained(folder / "base_model")
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = KINDS[trained.kind].from_pretrained(folder)
    assert scores(folder, reviews, model) == pytest.approx(kept, abs=1e-5)
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")], "a pickle was left"
    assert metrics["trainable_parameters"] > 0
    assert metrics["method"] == (
        "cloze (model and soft prompt)" if trained.prompt else "cloze (model)"
    )
    assert len(losses(folder)) == 4


def test_it_loads_as_the_card_says(trained, reviews):
    kept, scope = flat(read_jsonl(trained.folder / "predictions.jsonl")), {}
    exec(shown_code(trained.folder), scope)
    model = scope["model"].eval()
    assert scores(trained.folder, reviews, model) == pytest.approx(kept, abs=1e-5)
    if trained.soft:
        ids = torch.tensor([[5, 6, 7]])
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert found.shape[-1] == 2, "of the vocabulary, not of the labels"


def test_predict_answers_rows_without_labels_as_the_run_did(
    trained, start, questions, causal_model, tmp_path
):
    # The tuned model answers, whichever is named; also from where the folder was moved.
    folder = tmp_path / "moved"
    shutil.copytree(trained.folder, folder)
    start(cloze_sft, folder, predict=questions, model_name_or_path=causal_model)
    answered = flat(read_jsonl(folder / "predictions_questions.jsonl"))
    scored = flat(read_jsonl(folder / "predictions.jsonl"))
    assert answered == pytest.approx(scored, abs=1e-5)


def test_each_part_is_trained_at_a_rate_of_its_own(run):
    rates = {}
    for prompt in (False, True):
        with watched_training() as seen:
            run(soft_prompt=prompt, soft_verbalizer=prompt, max_steps=1, output=str(prompt))
        groups = seen.trainer.optimizer.param_groups
        rates[prompt] = sorted({group["initial_lr"] for group in groups})
        assert isinstance(seen.trainer.optimizer.optimizer, torch.optim.AdamW)
    assert rates == {False: [5e-5], True: [5e-5, 1e-3, 0.03]}


def test_another_optimizer_is_taken_and_biases_and_norms_do_not_decay(run):
    with watched_training() as seen:
        run(optim="sgd", weight_decay=0.1, max_steps=1)
    assert isinstance(seen.trainer.optimizer.optimizer, torch.optim.SGD)
    decays = {
        parameter.dim() > 1: group["weight_decay"]
        for group in seen.trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays == {True: 0.1, False: 0.0}


def test_few_shot_draws_have_a_run_each_and_a_mean(run):
    folder = run(per_class=3, draws=2, max_steps=-1, num_train_epochs=1)
    metrics = read_json(folder / "metrics.json")
    each = [read_json(folder / f"draw_{number}" / "metrics.json") for number in range(2)]
    assert metrics["draws"] == [draw["score"] for draw in each]
    assert metrics["score"] == pytest.approx(sum(metrics["draws"]) / 2)
    assert all(draw["train_rows"] == 6 for draw in each)
    assert all(len(draw["validation_scores"]) == 1 for draw in each)


def test_a_model_is_scored_without_training(run):
    folder = run(score_only=True)
    metrics = read_json(folder / "metrics.json")
    assert metrics["method"] == "cloze (zero-shot)"
    assert metrics["trainable_parameters"] == 0
    assert {"score", "calibrated", "versions"} <= metrics.keys()
    assert not list(folder.glob("*.safetensors"))
    calibrated = read_json(
        run(score_only=True, calibrate=True, output="calibrated") / "metrics.json"
    )
    assert calibrated["score"] == metrics["calibrated"]
    assert calibrated["uncalibrated"] == metrics["score"]


def test_a_trained_run_is_not_written_over_by_a_score(run):
    before = read_json(run(max_steps=1) / "metrics.json")
    with pytest.raises(UserError, match="holds a trained run; name another"):
        run(score_only=True)
    assert read_json(run(score_only=True, output="other").parent / "out/metrics.json") == before


def test_a_model_that_was_only_scored_answers_nothing(run, questions):
    run(score_only=True)
    with pytest.raises(UserError, match="holds no trained result; train one first"):
        run(predict=questions)


@pytest.mark.parametrize("prompt", [False, True])
def test_a_resumed_run_ends_like_an_uninterrupted_one(prompt, run, tmp_path):
    options = {"soft_prompt": prompt, "soft_verbalizer": prompt, "learning_rate": 1e-3}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = run(**options, output="whole")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = run(**options, resume_from_checkpoint="last", output="part")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    files = {str(file.relative_to(whole)) for file in whole.rglob("*.safetensors")}
    files = {file for file in files if not file.startswith("checkpoint-")}
    assert len(files) == (3 if prompt else 1)
    for file in files:
        found, expected = load_file(resumed / file), load_file(whole / file)
        assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


def test_only_what_was_trained_is_gone_on_with(run, runs, masked_model):
    folder = run(save_strategy="steps", save_steps=2)
    for name, value in (("soft_prompt", True), ("soft_verbalizer", True)):
        with pytest.raises(UserError, match=rf"was trained with --{name} False, and this run has"):
            run(**{name: value}, resume_from_checkpoint="last")
    prompts = runs(prompt_tuning, **PROMPT, model_name_or_path=masked_model)
    with pytest.raises(UserError, match="checkpoint-4: is of another recipe"):
        prompts(resume_from_checkpoint="last")
    assert (folder / "metrics.json").exists()


def test_a_soft_prompt_after_a_tuned_model_in_the_same_folder_stands_before_the_untouched_one(
    run, runs, masked_model
):
    run(soft_prompt=True, max_steps=1)
    folder = runs(prompt_tuning, **{**PROMPT, "max_steps": 1})(model_name_or_path=masked_model)
    config = read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(masked_model)
    assert not (folder / "base_model").exists()


def test_preview_shows_the_cloze_and_its_words_and_loads_no_model(run, capsys, monkeypatch):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    folder = run(preview=2)
    out = capsys.readouterr().out
    assert "[MASK]" in out
    assert out.count("⟦") == 2
    assert "positive" in out
    assert "row 3" not in out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 3}, "--draws: draws of which rows"),
        ({"score_only": True, "soft_verbalizer": True}, "--soft_verbalizer: is trained"),
        ({"soft_prompt": True, "virtual_tokens": 100}, "--virtual_tokens 100: 100 tokens fit"),
        ({"packing": True}, "--packing: rows with a cloze are padded"),
        ({"soft_verbalizer": True, "calibrate": True}, "--soft_verbalizer has no words"),
        ({"per_class": 2, "resume_from_checkpoint": "last"}, "few-shot runs are short"),
        ({"per_class": 2, "draws": 2, "push_to_hub": True}, "--push_to_hub: which of the draws"),
        ({"template": "gsm8k"}, "verbalizer: is missing"),
    ],
)
def test_mistakes_are_one_line(options, said, run):
    with pytest.raises(UserError) as error:
        run(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_soft_prompt_is_not_trained_where_it_could_not_be_saved_and_a_model_is(run, monkeypatch):
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(UserError, match=r"--soft_prompt: is saved whole, .*fsdp2\.yaml"):
        run(soft_prompt=True)
    assert (run(max_steps=1) / "model.safetensors").exists()
