"""recipes/prompt_tuning.py run whole, on tiny causal and masked models with random weights."""

import shutil
from pathlib import Path
from typing import NamedTuple

import prompt_tuning
import pytest
import torch
from cloze_runs import KINDS, PROMPT, flat, scores, shown_code
from peft import PeftModel
from recipe_runs import changed, watched_training
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_models import LLAMA_LIKE, TOKENIZER, tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from recipelib.adapters.saved import load_tuned
from recipelib.models.loading import load_tokenizer
from recipelib.runtime.errors import UserError
from recipelib.training.cloze_trainer import KeepBest
from recipelib.training.memory import MemoryEstimate


@pytest.fixture
def run(runs):
    """Runs the recipe on the tiny causal model; gives the output folder."""
    return runs(prompt_tuning, **PROMPT)


@pytest.fixture
def masked(masked_model) -> dict:
    """What asks a run for the masked model."""
    return {"model_name_or_path": masked_model}


class Trained(NamedTuple):
    """A run, what it trained on, and which parameters changed."""

    kind: str
    base: Path
    tune: str
    soft: bool
    folder: Path
    changed: set[str]
    trainable: set[str]
    estimated: MemoryEstimate


PROMPTS = [
    *[(kind, tune, False) for kind in KINDS for tune in ("soft_prompt", "p_tuning", "prefix")],
    ("causal", "soft_prompt", True),
]


@pytest.fixture(scope="module", params=PROMPTS, ids=str)
def trained(request, start, causal_model, masked_model, tmp_path_factory) -> Trained:
    kind, tune, soft = request.param
    base = masked_model if kind == "masked" else causal_model
    options = {**PROMPT, "model_name_or_path": base, "learning_rate": 0.05, "whole": True}
    with watched_training() as seen:
        folder = start(
            prompt_tuning,
            tmp_path_factory.mktemp(tune) / "out",
            **options,
            tune=tune,
            soft_verbalizer=soft,
        )
    trainable = {name for name, one in seen.trainer.model.named_parameters() if one.requires_grad}
    estimated = seen.trainer.estimated
    return Trained(kind, base, tune, soft, folder, changed(seen), trainable, estimated)


def test_the_prompt_changes_and_nothing_of_the_model(trained):
    prompts = {name for name in trained.trainable if name.startswith("prompt_encoder.")}
    own = {name for name in trained.trainable if "soft_verbalizer." in name}
    assert prompts
    assert bool(own) == trained.soft
    assert trained.changed == trained.trainable == prompts | own


def test_memory_is_estimated_with_the_activations(trained):
    assert trained.estimated.note == ""
    assert trained.estimated.activations > 0


def test_what_was_trained_is_saved_and_loads_with_peft_and_transformers_alone(trained, reviews):
    folder, metrics = trained.folder, read_json(trained.folder / "metrics.json")
    kept = flat(read_jsonl(folder / "predictions.jsonl"))
    base = KINDS[trained.kind].from_pretrained(trained.base)
    model = PeftModel.from_pretrained(base, folder)
    if trained.soft:
        model = load_tuned(folder, metrics)
        assert load_file(folder / "soft_verbalizer.safetensors")["weight"].shape == (2, 32)
    assert scores(folder, reviews, model) == pytest.approx(kept, abs=1e-5)
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")], "a pickle was left"
    assert metrics["trainable_parameters"] > 0
    assert metrics["method"] == f"prompt_tuning ({trained.tune})"
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


def test_predict_answers_rows_without_labels_as_the_run_did(trained, start, questions):
    start(prompt_tuning, trained.folder, predict=questions, model_name_or_path="")
    answered = read_jsonl(trained.folder / "predictions_questions.jsonl")
    scored = read_jsonl(trained.folder / "predictions.jsonl")
    assert [row["prediction"] for row in answered] == [row["prediction"] for row in scored]
    assert flat(answered) == pytest.approx(flat(scored), abs=1e-5)


def test_a_soft_prompt_starts_where_init_says(run, causal_model):
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    tokenizer, table = load_tokenizer(str(causal_model)), model.get_input_embeddings().weight
    starts = {}
    for init in ("template", "words", "vocabulary", "random"):
        folder = run(init=init, learning_rate=0, max_steps=1, output=init)
        starts[init] = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    text = "The movie review is: \nThe sentiment of the review is"
    ids = tokenizer(text, add_special_tokens=False).input_ids[:5]
    assert torch.equal(starts["template"], table[ids])
    words = [
        tokenizer(word, add_special_tokens=False).input_ids
        for word in (" negative", " positive", " bad", " good")
    ]
    ids = [token for tokens in words for token in tokens][:5]
    assert torch.equal(starts["words"], table[ids])
    for row in starts["vocabulary"]:
        assert (row == table).all(-1).any()
    assert starts["random"].std() == pytest.approx(table.std().item(), rel=0.3)


def test_a_prefix_starts_as_the_text_in_front_of_the_prompt(run, causal_model):
    folder = run(tune="prefix", learning_rate=0, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    tokenizer = load_tokenizer(str(causal_model))
    text = "The movie review is: \nThe sentiment of the review is"
    start = tokenizer(text, add_special_tokens=False).input_ids[:5]
    ids = torch.tensor([[7, 30, 12, 99]])
    prefixed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_model), folder)
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([start]), ids], 1)).logits[:, 5:]
        found = prefixed(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_without_a_learning_rate_it_is_one_that_fits_what_is_tuned(run):
    rates = {}
    for tune in ("soft_prompt", "p_tuning", "prefix"):
        with watched_training() as seen:
            run(tune=tune, max_steps=1, soft_verbalizer=tune == "soft_prompt", output=tune)
        groups = seen.trainer.optimizer.param_groups
        rates[tune] = sorted({group["initial_lr"] for group in groups})
    assert rates == {"soft_prompt": [1e-3, 0.03], "p_tuning": [3e-4], "prefix": [0.01]}


def test_few_shot_draws_have_a_run_each_and_a_mean(run, masked):
    folder = run(**masked, per_class=3, draws=2, max_steps=-1)
    metrics = read_json(folder / "metrics.json")
    each = [read_json(folder / f"draw_{number}" / "metrics.json") for number in range(2)]
    assert metrics["draws"] == [draw["score"] for draw in each]
    assert metrics["score"] == pytest.approx(sum(metrics["draws"]) / 2)
    assert metrics["score_std"] == pytest.approx(
        abs(metrics["draws"][0] - metrics["draws"][1]) / 2**0.5
    )
    assert all(draw["train_rows"] == 6 for draw in each)
    assert each[0]["base_score"] == each[1]["base_score"] == metrics["base_score"]
    assert each[0]["seed"] + 1 == each[1]["seed"]


def test_the_best_pass_by_the_validation_rows_is_kept(run, monkeypatch):
    weights, original = [], KeepBest.on_epoch_end

    def watch(self, args, state, control, **kwargs):
        self.score = lambda: ([0.2, 0.9, 0.5][len(self.scores)],)
        original(self, args, state, control, **kwargs)
        weights.append([part.detach().clone() for part in self._trained()])

    monkeypatch.setattr(KeepBest, "on_epoch_end", watch)
    folder = run(per_class=3, max_steps=-1, num_train_epochs=3)
    assert len(weights) == 3
    saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved, weights[1][0])
    assert not torch.equal(saved, weights[2][0])
    assert read_json(folder / "metrics.json")["validation_scores"] == [0.2, 0.9, 0.5]


def test_a_mistake_does_not_cost_the_mean_over_draws_that_it_would_have_replaced(
    run, causal_model, tmp_path
):
    drawn = {"per_class": 3, "draws": 2, "max_steps": 1}
    before = read_json(run(**drawn) / "metrics.json")
    too_many = r"--per_class 7: takes 14 rows .* 'negative' has 12"
    with pytest.raises(UserError, match=too_many):
        run(**{**drawn, "per_class": 7})
    without_weights = tmp_path / "without_weights"
    shutil.copytree(causal_model, without_weights, ignore=lambda *_: ["model.safetensors"])
    with pytest.raises(UserError, match="no weights"):
        run(**drawn, model_name_or_path=without_weights)
    assert read_json(tmp_path / "out" / "metrics.json") == before


@pytest.mark.parametrize("tune", ["soft_prompt", "p_tuning", "prefix"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tune, run, masked, tmp_path):
    options = {"tune": tune, "soft_verbalizer": True, "save_strategy": "steps", "save_steps": 2}
    whole = run(**masked, **options, output="whole")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = run(**masked, **options, resume_from_checkpoint="last", output="part")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    for name in ("adapter_model.safetensors", "soft_verbalizer.safetensors"):
        found, expected = load_file(resumed / name), load_file(whole / name)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in found)


def test_only_what_was_trained_is_gone_on_with(run):
    folder = run(save_strategy="steps", save_steps=2)
    for name, value in (("tune", "p_tuning"), ("virtual_tokens", 6), ("soft_verbalizer", True)):
        with pytest.raises(UserError, match=rf"was trained with --{name} \w+, and this run has"):
            run(**{name: value}, resume_from_checkpoint="last")
        assert (folder / "metrics.json").exists()
    (folder / "checkpoint-4" / "trained.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4: has no trained.safetensors"):
        run(resume_from_checkpoint="last")
    assert (folder / "metrics.json").exists()


def test_accumulated_steps_are_those_of_one_batch(run, causal_model, masked_model):
    for kind, base in (("causal", causal_model), ("masked", masked_model)):
        options = {"model_name_or_path": base, "max_steps": 2}
        once = run(**options, per_device_train_batch_size=8, output=f"once_{kind}")
        small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        often = run(**options, **small, output=f"often_{kind}")
        assert losses(often) == pytest.approx(losses(once), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_evaluation_rows_is_that_of_their_labels(
    kind, run, causal_model, masked_model
):
    base = masked_model if kind == "masked" else causal_model
    followed = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0, "max_steps": 1}
    folder = run(model_name_or_path=base, **followed)
    history = read_json(folder / "trainer_state.json")["log_history"]
    (found,) = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    records = read_jsonl(folder / "predictions.jsonl")
    likely = [torch.tensor([*record["log_likelihoods"].values()]) for record in records]
    right = [list(record["log_likelihoods"]).index(record["answer"]) for record in records]
    loss = torch.nn.functional.cross_entropy(torch.stack(likely), torch.tensor(right))
    assert found == pytest.approx(loss.item(), abs=1e-5)


def test_a_folder_without_a_trained_result_answers_nothing(run, questions, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="holds no trained result; train one first"):
        run(predict=questions)
    folder.mkdir()
    (folder / "template.yaml").write_text("name: t")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="is not what a run writes; name another --output_dir"):
        run(predict=questions)
    run(per_class=3, draws=2, max_steps=1, output="drawn")
    with pytest.raises(UserError, match=r"holds no trained result \(its folders draw_N do\)"):
        run(predict=questions, output="drawn")


def test_preview_shows_the_cloze_and_its_words_and_loads_no_model(run, capsys, monkeypatch):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    folder = run(preview=2)
    out = capsys.readouterr().out
    assert "The sentiment of the review is" in out
    assert "' negative'" in out
    assert "row 3" not in out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 3}, "--draws: draws of which rows"),
        ({"virtual_tokens": 100}, "--virtual_tokens 100: 100 tokens fit"),
        ({"packing": True}, "--packing: rows with a cloze are padded"),
        ({"virtual_tokens": 0}, "--virtual_tokens 0: must be 1 or more"),
        ({"soft_verbalizer": True, "calibrate": True}, "--soft_verbalizer has no words"),
        ({"per_class": 2, "resume_from_checkpoint": "last"}, "few-shot runs are short"),
        ({"per_class": 2, "draws": 2, "push_to_hub": True}, "--push_to_hub: which of the draws"),
        ({"template": "gsm8k"}, "verbalizer: is missing"),
        ({"tune": "both"}, "tune both: has moved; run recipes/cloze_sft.py --soft_prompt true"),
    ],
)
def test_mistakes_are_one_line(options, said, run):
    with pytest.raises(UserError) as error:
        run(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_soft_prompt_is_not_trained_where_it_could_not_be_saved(run, monkeypatch):
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(UserError, match=r"--tune soft_prompt: is saved whole, .*fsdp2\.yaml"):
        run()


# Other models -----------------------------------------------------------------------------------


SHAPE = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    "electra": {**SHAPE, "hidden_size": 32, "embedding_size": 16},
    "albert": {**SHAPE, "hidden_size": 32, "embedding_size": 16},
}


@pytest.mark.parametrize("kind", SMALL)
def test_soft_prompts_stand_before_masked_models_of_other_kinds(kind, run, masked_model, tmp_path):
    tokenizer = load_tokenizer(str(masked_model))
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(kind, **SMALL[kind], vocab_size=len(tokenizer))
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / kind)
    options = {"model_name_or_path": tmp_path / kind, "max_steps": 1}
    for tune in ("soft_prompt", "p_tuning"):
        folder = run(**options, tune=tune, output=tune)
        assert read_json(folder / "metrics.json")["trainable_parameters"] > 0
    if kind != "electra":
        with pytest.raises(
            UserError, match=r"--tune prefix: .* has layers that keep no plain keys"
        ):
            run(**options, tune="prefix", output="prefix")


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
CAUSAL = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},  # one key head
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mixtral": LLAMA_LIKE | EXPERTS,
    "gemma4_text": LLAMA_LIKE | LAYERS,  # another head size in some layers
}


@pytest.fixture(scope="module")
def causal_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for kind, fields in CAUSAL.items():
        tiny(kind, **fields).save_pretrained(folder / kind)
        TOKENIZER.save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize(
    ("kind", "tune"),
    [
        *(("falcon", "prefix"), ("gemma4_text", "prefix"), ("mixtral", "prefix")),
        *(("mamba", "soft_prompt"), ("mixtral", "soft_prompt")),
    ],
)
def test_prompts_stand_before_causal_models_of_other_kinds(kind, tune, run, causal_kinds):
    folder = run(model_name_or_path=causal_kinds / kind, tune=tune, max_steps=1, init="words")
    assert read_json(folder / "metrics.json")["trainable_parameters"] > 0


@pytest.mark.parametrize(
    ("kind", "tune", "says"),
    [
        ("mamba", "prefix", "keep no plain keys and values; try prompt_tuning.py --tune soft_pr"),
        ("gemma4_text", "soft_prompt", "looks tokens up in every layer, .* try .* --tune prefix"),
    ],
)
def test_a_prompt_that_cannot_stand_there_is_refused_before_the_model_is_loaded(
    kind, tune, says, run, causal_kinds, monkeypatch
):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    with pytest.raises(UserError, match=says):
        run(model_name_or_path=causal_kinds / kind, tune=tune)


def test_a_model_with_an_encoder_is_refused(run, causal_model, tmp_path):
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **shape))
    model.save_pretrained(tmp_path / "bart")
    load_tokenizer(str(causal_model)).save_pretrained(tmp_path / "bart")
    with pytest.raises(UserError, match="bart: is an encoder-decoder model"):
        run(model_name_or_path=tmp_path / "bart")
