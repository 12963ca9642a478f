"""recipes/prompt_tuning.py run whole, on tiny causal and masked models with random weights."""

import json
import re
from pathlib import Path

import prompt_tuning
import pytest
import torch
from peft import PeftModel
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from tiny_bert import save_tiny_bert
from tiny_llama import save_tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from recipelib.adapters.saved import load_tuned
from recipelib.cli import parse_arguments
from recipelib.data.rows import load_rows
from recipelib.encoding.asking import asker_of
from recipelib.encoding.cloze_rows import encode_cloze_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.labels import score_cloze
from recipelib.models.loading import load_tokenizer
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError
from recipelib.training.cloze_trainer import ClozeTrainer

ROWS = [
    {"sentence": f"{'so ' * (number % 5)}{word} film, number {number}", "label": label}
    for number in range(12)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
KINDS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each kind of model."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    save_tiny_llama(folders["causal"])
    save_tiny_bert(folders["masked"])
    return folders


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for split, rows in (("train", ROWS), ("validation", ROWS[:6])):
        lines = (json.dumps({**row, "sentence": f"{split}: {row['sentence']}"}) for row in rows)
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(models, data_folder, tmp_path):
    """Runs `main` as the command line would; gives the output folder."""

    def start(kind: str, *argv: str, output: str = "out") -> Path:
        folder = tmp_path / output
        given = {
            "--model_name_or_path": str(models[kind]),
            "--dataset": str(data_folder),
            "--output_dir": str(folder),
            "--max_steps": "4",
            "--virtual_tokens": "5",
            "--max_length": "100",
            "--disable_tqdm": "true",
        }
        given.update(zip(argv[::2], argv[1::2], strict=True))
        flat = [part for pair in given.items() for part in pair]
        options = prompt_tuning.PromptArguments, "", prompt_tuning.DEFAULTS, flat
        prompt_tuning.main(*parse_arguments(*options))
        return folder

    return start


def scores(folder: Path, model=None) -> list[float]:
    """The labels' scores that what a run left gives to the evaluation rows, row by row."""
    metrics = read_json(folder / "metrics.json")
    model = load_tuned(folder, metrics) if model is None else model
    template = PromptTemplate.load(str(folder / "template.yaml"))
    tokenizer = load_tokenizer(str(folder))
    ask = asker_of(PromptEncoder(template, tokenizer, 95), metrics["masked"], metrics["cloze"])
    source = json.loads((folder / "rows.json").read_text())
    rows = load_rows(template, source, "validation").rows
    rows = encode_cloze_rows(ask, rows, soft=metrics["verbalizer"] == "soft")
    found = score_cloze(model, ask, rows, combine=metrics["combine"])
    return flat(found.records)


def flat(records: list[dict]) -> list[float]:
    return [score for record in records for score in record["log_likelihoods"].values()]


TUNED = [
    *[(kind, tune, False) for kind in KINDS for tune in ("soft_prompt", "p_tuning", "prefix")],
    *[(kind, tune, False) for kind in KINDS for tune in ("model", "both")],
    ("causal", "soft_prompt", True),
    ("masked", "both", True),
    ("causal", "model", True),
]


@pytest.mark.parametrize(("kind", "tune", "soft"), TUNED)
def test_what_was_trained_is_saved_and_loads_with_peft_and_transformers_alone(
    kind, tune, soft, run, data_folder, models
):
    argv = ["--tune", tune, "--soft_verbalizer", str(soft), "--learning_rate", "0.05"]
    folder = run(kind, *argv)
    (folder / "rows.json").write_text(json.dumps(str(data_folder)))
    kept = flat(read_jsonl(folder / "predictions.jsonl"))
    metrics = read_json(folder / "metrics.json")
    if tune == "model":
        model = KINDS[kind].from_pretrained(folder)
    else:
        base = folder / "base_model" if tune == "both" else models[kind]
        model = PeftModel.from_pretrained(KINDS[kind].from_pretrained(base), folder)
    if soft:
        model = load_tuned(folder, metrics)
        assert load_file(folder / "soft_verbalizer.safetensors")["weight"].shape == (2, 32)
    assert scores(folder, model) == pytest.approx(kept, abs=1e-5)
    # As the card says.
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scores(folder, scope["model"].eval()) == pytest.approx(kept, abs=1e-5)
    if soft:
        ids = torch.tensor([[5, 6, 7]])
        found = scope["model"](input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert found.shape[-1] == 2, "of the vocabulary, not of the labels"
    assert scores(folder) == pytest.approx(kept, abs=1e-5)
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")], "a pickle was left"
    assert metrics["trainable_parameters"] > 0
    assert len(losses(folder)) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tune", ["soft_prompt", "p_tuning", "prefix", "model", "both"])
def test_only_what_tune_names_changes(kind, tune, run, models, monkeypatch):
    seen = {}
    optimizer_at = ClozeTrainer.optimizer_at

    def watch(self, rates):
        seen["model"] = self.model
        seen["before"] = {name: one.detach().clone() for name, one in self.model.named_parameters()}
        return optimizer_at(self, rates)

    monkeypatch.setattr(ClozeTrainer, "optimizer_at", watch)
    run(kind, "--tune", tune, "--learning_rate", "0.01")
    changed = {
        name
        for name, one in seen["model"].named_parameters()
        if not torch.equal(one.detach(), seen["before"][name])
    }
    prompts = {name for name in seen["before"] if name.startswith("prompt_encoder.")}
    if tune == "model":
        assert not prompts
    expected = {"model": set(seen["before"]), "both": set(seen["before"])}.get(tune, prompts)
    # What has no part in a blank: positions behind the longest text, the other sentence's type.
    assert changed == expected - {name for name in expected - changed if _unused(name)}
    assert changed >= prompts


def _unused(name: str) -> bool:
    return "key.bias" in name  # a bias of all keys changes no attention


def test_a_soft_prompt_starts_where_init_says(run, models):
    model = AutoModelForCausalLM.from_pretrained(models["causal"])
    tokenizer, table = load_tokenizer(str(models["causal"])), model.get_input_embeddings().weight
    found = {}
    for init in ("template", "words", "vocabulary", "random"):
        folder = run("causal", "--init", init, "--learning_rate", "0", output=init)
        found[init] = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    text = "The movie review is: \nThe sentiment of the review is"
    ids = tokenizer(text, add_special_tokens=False).input_ids[:5]
    assert torch.equal(found["template"], table[ids])
    words = [
        tokenizer(word, add_special_tokens=False).input_ids
        for word in (" negative", " positive", " bad", " good")
    ]
    ids = [token for some in words for token in some][:5]
    assert torch.equal(found["words"], table[ids])
    for row in found["vocabulary"]:
        assert (row == table).all(-1).any()
    assert found["random"].std() == pytest.approx(table.std().item(), rel=0.3)


def test_a_prefix_starts_as_the_text_in_front_of_the_prompt(run, models):
    folder = run("causal", "--tune", "prefix", "--learning_rate", "0")
    model = AutoModelForCausalLM.from_pretrained(models["causal"])
    tokenizer = load_tokenizer(str(models["causal"]))
    text = "The movie review is: \nThe sentiment of the review is"
    start = tokenizer(text, add_special_tokens=False).input_ids[:5]
    ids = torch.tensor([[7, 30, 12, 99]])
    prefixed = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models["causal"]), folder
    )
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([start]), ids], 1)).logits[:, 5:]
        found = prefixed(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_no_arguments_but_the_template_choose_rates_that_fit_what_is_tuned(run, monkeypatch):
    rates, made = {}, []
    optimizer_at = ClozeTrainer.optimizer_at

    def watch(self, rates_of_parts):
        made.append(optimizer_at(self, rates_of_parts))
        rates[Path(self.args.output_dir).name] = [group["lr"] for group in made[-1].param_groups]
        return made[-1]

    monkeypatch.setattr(ClozeTrainer, "optimizer_at", watch)
    for tune in ("soft_prompt", "model", "both"):
        run("causal", "--tune", tune, "--max_steps", "1", output=tune)
    assert {name: [*dict.fromkeys(some)] for name, some in rates.items()} == {
        "soft_prompt": [0.03],
        "model": [5e-5],
        "both": [5e-5, 0.03],
    }
    assert all(isinstance(one, torch.optim.AdamW) for one in made)
    # Another that is asked for; biases and norms are not drawn to zero.
    options = ["--optim", "sgd", "--weight_decay", "0.1", "--max_steps", "1"]
    run("masked", "--tune", "model", *options, output="sgd")
    assert isinstance(made[-1], torch.optim.SGD)
    decays = {
        one.dim() > 1: group["weight_decay"]
        for group in made[-1].param_groups
        for one in group["params"]
    }
    assert decays == {True: 0.1, False: 0.0}


def test_few_shot_draws_have_a_run_each_and_a_mean(run):
    folder = run("masked", "--per_class", "3", "--draws", "2", "--max_steps", "-1")
    metrics = read_json(folder / "metrics.json")
    each = [read_json(folder / f"draw_{number}" / "metrics.json") for number in range(2)]
    assert metrics["draws"] == [one["score"] for one in each]
    assert metrics["score"] == pytest.approx(sum(metrics["draws"]) / 2)
    assert metrics["score_std"] == pytest.approx(
        abs(metrics["draws"][0] - metrics["draws"][1]) / 2**0.5
    )
    assert all(one["train_rows"] == 6 for one in each)
    assert each[0]["base_score"] == each[1]["base_score"] == metrics["base_score"]
    assert each[0]["seed"] + 1 == each[1]["seed"]


def test_the_best_pass_by_the_validation_rows_is_kept(run, monkeypatch):
    import recipelib.training.cloze_trainer as module

    weights, original = [], module.KeepBest.on_epoch_end

    def watch(self, args, state, control, **kwargs):
        self.score = lambda: ([0.2, 0.9, 0.5][len(self.scores)],)
        original(self, args, state, control, **kwargs)
        weights.append([one.detach().clone() for one in self._parts()])

    monkeypatch.setattr(module.KeepBest, "on_epoch_end", watch)
    options = ["--per_class", "3", "--max_steps", "-1", "--num_train_epochs", "3"]
    folder = run("causal", *options)
    assert len(weights) == 3
    saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(saved, weights[1][0])
    assert not torch.equal(saved, weights[2][0])
    assert read_json(folder / "metrics.json")["validation_scores"] == [0.2, 0.9, 0.5]


def test_too_few_rows_of_a_class_are_named_before_anything_is_done(run, monkeypatch):
    monkeypatch.setattr("recipelib.models.loading.load_pretrained", None)
    folder = run("causal", "--preview", "1")
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"--per_class 7: takes 14 rows .* 'negative' has 12"):
        run("causal", "--per_class", "7", "--draws", "2")
    assert (folder / "metrics.json").exists()


def test_a_model_is_scored_without_training(run, capsys):
    folder = run("masked", "--tune", "none")
    metrics = read_json(folder / "metrics.json")
    assert metrics["trainable_parameters"] == 0
    assert {"score", "calibrated", "versions"} <= metrics.keys()
    calibrated = run("masked", "--tune", "none", "--calibrate", "true", output="calibrated")
    found = read_json(calibrated / "metrics.json")
    assert (found["score"], found["uncalibrated"]) == (metrics["calibrated"], metrics["score"])


@pytest.mark.parametrize("tune", ["soft_prompt", "p_tuning", "both"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tune, run):
    options = ["--tune", tune, "--save_strategy", "steps", "--save_steps", "2"]
    options += ["--soft_verbalizer", "true"]
    whole = run("masked", *options, "--save_total_limit", "5", output="whole")
    part = run("masked", *options, "--save_total_limit", "5", output="part")
    for path in (part / "checkpoint-4").glob("*"):
        path.unlink()
    (part / "checkpoint-4").rmdir()
    resumed = run("masked", *options, "--resume_from_checkpoint", "last", output="part")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    name = "adapter_model.safetensors"
    found, expected = (load_file(one / name)["prompt_embeddings"] for one in (resumed, whole))
    assert torch.allclose(found, expected, atol=1e-6)


def test_only_what_was_trained_is_gone_on_with(run):
    folder = run("causal", "--save_strategy", "steps", "--save_steps", "2")
    for argv in (
        ["--tune", "p_tuning"],
        ["--tune", "model"],
        ["--virtual_tokens", "6"],
        ["--soft_verbalizer", "true"],
    ):
        with pytest.raises(UserError, match=rf"was trained with {argv[0]} \w+, and this run has"):
            run("causal", *argv, "--resume_from_checkpoint", "last")
        assert (folder / "metrics.json").exists()
    (folder / "checkpoint-4" / "trained.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4: has no trained.safetensors"):
        run("causal", "--resume_from_checkpoint", "last")
    assert (folder / "metrics.json").exists()


def test_accumulated_steps_are_those_of_one_batch(run):
    for kind in KINDS:
        one = run(kind, "--per_device_train_batch_size", "8", output=f"one_{kind}")
        argv = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
        many = run(kind, *argv, output=f"many_{kind}")
        assert losses(many) == pytest.approx(losses(one), abs=1e-4)


def test_predict_answers_rows_without_labels(run, data_folder, tmp_path):
    folder = run("masked", "--soft_verbalizer", "true")
    rows = [json.loads(line) for line in (data_folder / "validation.jsonl").open()]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(json.dumps({"sentence": row["sentence"]}) for row in rows))
    run("masked", "--predict", str(asked))
    found = read_jsonl(folder / "predictions_asked.jsonl")
    known = read_jsonl(folder / "predictions.jsonl")
    assert [one["prediction"] for one in found] == [one["prediction"] for one in known]
    # The tuned model answers, whichever is named; also from where the folder was moved.
    folder = run("causal", "--tune", "both", "--learning_rate", "0.05", output="both")
    run("causal", "--predict", str(asked), output=folder.rename(tmp_path / "moved").name)
    found = flat(read_jsonl(tmp_path / "moved" / "predictions_asked.jsonl"))
    known = flat(read_jsonl(tmp_path / "moved" / "predictions.jsonl"))
    assert found == pytest.approx(known, abs=1e-5)


def test_runs_of_other_recipes_answer_nothing_here(run, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "template.yaml").write_text("name: t")
    for said, text in (("another recipe", '{"trainable_parameters": 7}'), ("not what", "{")):
        (folder / "metrics.json").write_text(text)
        with pytest.raises(UserError, match=said):
            run("causal", "--predict", "rows.jsonl")


def test_a_trained_run_is_not_written_over_by_a_score_or_a_search(run):
    run("causal", "--max_steps", "1")
    for argv in (["--tune", "none"], ["--search_label_words", "true"]):
        with pytest.raises(UserError, match="holds a trained run; name another"):
            run("causal", *argv)


def test_what_was_not_trained_answers_nothing(run, data_folder):
    for argv, output in (
        (["--tune", "none"], "scored"),
        (["--search_label_words", "true"], "searched"),
        (["--per_class", "3", "--draws", "2", "--max_steps", "1"], "drawn"),
    ):
        run("causal", *argv, output=output)
        with pytest.raises(UserError, match="holds no trained result"):
            run("causal", "--predict", str(data_folder / "train.jsonl"), output=output)


def test_a_soft_prompt_after_a_tuned_model_in_the_same_folder_stands_before_the_untouched_one(
    run, models
):
    run("masked", "--tune", "both", "--max_steps", "1")
    folder = run("masked", "--max_steps", "1")
    config = read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(models["masked"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_evaluation_rows_is_that_of_their_labels(kind, run):
    options = ["--eval_strategy", "steps", "--eval_steps", "4", "--learning_rate", "0"]
    folder = run(kind, *options)
    history = read_json(folder / "trainer_state.json")["log_history"]
    (found,) = [one["eval_loss"] for one in history if "eval_loss" in one]
    records = read_jsonl(folder / "predictions.jsonl")
    scores = [torch.tensor([*one["log_likelihoods"].values()]) for one in records]
    right = [list(one["log_likelihoods"]).index(one["answer"]) for one in records]
    loss = torch.nn.functional.cross_entropy(torch.stack(scores), torch.tensor(right))
    assert found == pytest.approx(loss.item(), abs=1e-5)


def test_preview_shows_the_blank_and_its_words(run, capsys):
    run("causal", "--preview", "2")
    out = capsys.readouterr().out
    assert "The sentiment of the review is" in out
    assert "' negative'" in out
    assert "row 3" not in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--draws", "3"], "--draws: draws of which rows"),
        (["--tune", "none", "--soft_verbalizer", "true"], "--soft_verbalizer: is trained"),
        (["--virtual_tokens", "100"], "--virtual_tokens 100: 100 tokens fit"),
        (["--packing", "true"], "--packing: rows with a blank are padded"),
        (["--virtual_tokens", "0"], "--virtual_tokens 0: must be 1 or more"),
        (["--soft_verbalizer", "true", "--calibrate", "true"], "--soft_verbalizer has no words"),
        (["--per_class", "2", "--resume_from_checkpoint", "last"], "few-shot runs are short"),
        (
            ["--per_class", "2", "--draws", "2", "--push_to_hub", "true"],
            "--push_to_hub: which of the draws",
        ),
        (["--template", "gsm8k"], "verbalizer: is missing"),
    ],
)
def test_mistakes_are_one_line(argv, said, run):
    with pytest.raises(UserError) as error:
        run("causal", *argv)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_soft_prompt_is_not_trained_where_it_could_not_be_saved(run, monkeypatch):
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(UserError, match=r"--tune soft_prompt: is saved whole, .*fsdp2\.yaml"):
        run("causal")


# Other models -----------------------------------------------------------------------------------


SHAPE = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    "electra": {**SHAPE, "hidden_size": 32, "embedding_size": 16},
    "albert": {**SHAPE, "hidden_size": 32, "embedding_size": 16},
}


@pytest.mark.parametrize("kind", SMALL)
def test_soft_prompts_stand_before_masked_models_of_other_kinds(kind, run, models, tmp_path):
    tokenizer = load_tokenizer(str(models["masked"]))
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(kind, **SMALL[kind], vocab_size=len(tokenizer))
    )
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / kind)
    argv = ["--model_name_or_path", str(tmp_path / kind), "--max_steps", "1"]
    for tune in ("soft_prompt", "p_tuning"):
        folder = run("masked", *argv, "--tune", tune, output=tune)
        assert read_json(folder / "metrics.json")["trainable_parameters"] > 0
    if kind != "electra":
        with pytest.raises(UserError, match=r"--tune prefix: .*ForMaskedLM takes no keys"):
            run("masked", *argv, "--tune", "prefix", output="prefix")


def test_a_model_with_an_encoder_is_refused(run, models, tmp_path):
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **shape))
    model.save_pretrained(tmp_path / "bart")
    load_tokenizer(str(models["causal"])).save_pretrained(tmp_path / "bart")
    with pytest.raises(UserError, match="bart: is an encoder-decoder model"):
        run("causal", "--model_name_or_path", str(tmp_path / "bart"))
