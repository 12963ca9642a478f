"""What a run leaves in its folder, whatever trainer it had, and what it shows at its end."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for

from recipelib.data.rows import Rows
from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.scores import TaskScore, score_records
from recipelib.models.quantization import count_parameters
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting import run
from recipelib.reporting.run import save_predictions, save_run, say_wrong
from recipelib.task.mixture import Mixture
from recipelib.task.task import Task
from recipelib.training.trainer import TrainingFigures

FIGURES = {
    "steps": 2,
    "tokens": 200,
    "slots": 400,
    "seconds": 10.0,
    "peak_memory_bytes": 7_000,
    "peak_resident_bytes": 9_000,
    "estimated_memory_bytes": 6_000,
    "world_size": 2,
    "distributed_type": "MULTI_CPU",
}
RECORDS = [
    {"row": 0, "prompt": "p", "answer": "a", "prediction": "a", "score": 1.0},
    {"row": 1, "prompt": "q\nq", "answer": "a", "prediction": "b", "score": 0.0},
]
BASE = TaskScore("accuracy", 0.5, 0.1, {}, RECORDS, 2, 2, 3.0)
TUNED = TaskScore("accuracy", 0.75, 0.05, {"macro_f1": 0.7}, RECORDS, 2, 2, 4.0)


class StandIn:
    """A trainer that has trained, and is not one of ours: a pipeline has a trainer of its own."""

    def __init__(self, folder: Path):
        self.args = SimpleNamespace(
            command=None,
            output_dir=str(folder),
            seed=3,
            hub_token=None,
            hub_model_id=None,
            publish=False,
        )
        self.model = tiny_llama(300)
        self.model.requires_grad_(False)
        self.model.model.norm.requires_grad_(True)
        self.state = SimpleNamespace(log_history=[{"step": 1, "loss": 0.5}])
        self.took = dict(FIGURES)

    def figures(self) -> TrainingFigures:
        return TrainingFigures(**self.took)

    def parameter_counts(self) -> tuple[int, int]:
        return count_parameters(self.model)

    def save_state(self) -> None:
        Path(self.args.output_dir, "trainer_state.json").write_text("{}")


def task_of(name: str, rows: list[dict]) -> Task:
    encoder = PromptEncoder(PromptTemplate.load(name), tokenizer_for("gpt2"), 200)
    return Task(
        encoder=encoder,
        train=Rows(rows, "train.jsonl", skipped=6),
        evaluation=Rows(rows, "eval.jsonl"),
        model_name="owner/base",
        budget={},
        encoded=encode_rows(encoder, rows),
    )


@pytest.fixture(scope="module")
def task():
    rows = [{"sentence": f"film {number}", "label": "positive"} for number in range(4)]
    return task_of("movie_reviews", rows)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """With a folder in which the weights lie already."""
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return StandIn(folder)


@pytest.fixture
def save(trainer, task):
    def save(**options) -> dict:
        return save_run(trainer, task, BASE, TUNED, **{"method": "lora", **options})

    save.folder = Path(trainer.args.output_dir)
    return save


def test_metrics_hold_what_the_design_names(save, task):
    metrics = save(more={"merged": True, "extra": 1})
    assert json.loads((save.folder / "metrics.json").read_text()) == metrics
    expected = {
        "task": "movie_reviews",
        "rendering": "text",
        "chat_template_kwargs": {},
        "max_length": 200,
        "method": "lora",
        "model": "owner/base",
        "metric": "accuracy",
        "score": 0.75,
        "stderr": 0.05,
        "macro_f1": 0.7,
        "base_score": 0.5,
        "base_stderr": 0.1,
        "eval_rows": 2,
        "eval_rows_left_out": 2,
        "train_rows": 4,
        "train_examples": 4,
        "bad_rows_skipped": 6,
        "train_tokens": 200,
        "supervised_tokens": task.encoded.counts.supervised_tokens,
        "padding_fraction": 0.5,
        "tokens_per_second": 20.0,
        "train_seconds": 10.0,
        "eval_seconds": 4.0,
        "steps": 2,
        "trainable_parameters": 32,
        "total_parameters": count_parameters(tiny_llama(300))[1],
        "peak_memory_bytes": 7_000,
        "peak_resident_bytes": 9_000,
        "estimated_memory_bytes": 6_000,
        "quantization": None,
        "world_size": 2,
        "distributed_type": "MULTI_CPU",
        "seed": 3,
        "merged": True,
        "extra": 1,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_everything_stands_beside_the_weights(save, capsys):
    save()
    names = {one.name for one in save.folder.iterdir()}
    assert {
        *("metrics.json", "predictions.jsonl", "trainer_state.json", "loss.png"),
        *("template.yaml", "tokenizer.json", "README.md", "model.safetensors"),
    } <= names
    assert not any(one.endswith(".tmp") for one in names)
    assert PromptTemplate.load(str(save.folder / "template.yaml")).name == "movie_reviews"
    records = [
        json.loads(line) for line in (save.folder / "predictions.jsonl").read_text().splitlines()
    ]
    assert records == RECORDS
    assert "accuracy 0.750 ± 0.050 (2 rows)" in capsys.readouterr().out


def test_classes_are_shown_drawn_and_counted_beside_the_majority_class(
    save, task, trainer, capsys, monkeypatch
):
    template = PromptTemplate({**task.template.fields, "metric": ["macro_f1", "accuracy"]})
    before, after = (
        score_records(
            template,
            [
                {"row": n, "line": n + 7, "prompt": "p", "answer": gold, "prediction": one}
                for n, (gold, one) in enumerate(zip(["negative"] * 4, said, strict=True))
            ],
            4,
            True,
        )
        for said in (["positive"] * 4, ["negative"] * 3 + [None])
    )
    metrics = save_run(trainer, task, before, after, method="lora")
    assert metrics["classes"] == after.class_figures()
    assert metrics["metrics"]["accuracy"]["base_score"] == 0
    assert (metrics["majority_class"], metrics["majority_accuracy"]) == ("negative", 1)
    assert metrics["majority_score"] == 0.5
    assert (save.folder / "confusion.png").exists()
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ negative │ 4 │ 1.000 │ 0.750 │ 0.857 │" in shown
    assert "│ positive │ no rows │ - │ - │ - │" in shown
    assert "majority class │ 'negative': accuracy 1.000, macro_f1 0.500 │" in shown
    assert "confusion.png │" in shown
    card = (save.folder / "README.md").read_text()
    assert "| macro\\_f1 | 0.500 (always negative) | 0.000 | 0.429 ± " in card
    assert "| accuracy | 1.000 (always negative) | 0.000 | 0.750 ± 0.250 | 4 |" in card
    say_wrong(after)
    assert "line 10" in capsys.readouterr().out

    several = TaskScore(None, math.nan, math.nan, tasks={"a": after, "b": TUNED})
    first = TaskScore(None, math.nan, math.nan, tasks={"a": before, "b": BASE})
    more = {"tasks": {"a": {**after.figures(before), "heldout": True}, "b": TUNED.figures(BASE)}}
    monkeypatch.setattr(run, "plot_classes", lambda *_: ["confusion/"])
    metrics = save_run(trainer, task, first, several, method="instruction full", more=more)
    assert (metrics["metric"], metrics["tasks"]["b"]["base_score"]) == (None, 0.5)
    shown = " ".join(capsys.readouterr().out.split())
    assert "a (held out), accuracy │ 0.000 │ 0.750 ± 0.250 │ 1.000 (negative) │ 4 │" in shown
    assert "b (held out), accuracy │ 0.500 │ 0.750 ± 0.050 │ │ 2 │" in shown
    assert "a: classes" in shown
    card = (save.folder / "README.md").read_text()
    assert "| a (held out) | accuracy | 1.000 (always negative) | 0.000 | 0.750" in card
    assert "| b | accuracy |  | 0.500 | 0.750 ± 0.050 |  |" in card


def test_of_several_tasks_each_template_is_kept_under_its_name(trainer, task, monkeypatch):
    conversation = task_of("gsm8k", [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}])
    mixture = Mixture(
        tasks=[task, conversation],
        shares={},
        encoder=task.encoder,
        train=None,
        evaluation=task.evaluation,
        model_name=task.model_name,
        budget={},
        encoded=task.encoded,
    )
    metrics = save_run(trainer, mixture, BASE, TUNED, method="instruction full")
    folder = Path(trainer.args.output_dir)
    assert metrics["task"] == "movie_reviews+gsm8k"
    assert metrics["bad_rows_skipped"] == 12
    assert not (folder / "template.yaml").exists()
    kept = {path.stem: path for path in (folder / "templates").iterdir()}
    assert kept.keys() == {"movie_reviews", "gsm8k"}
    assert all(PromptTemplate.load(str(path)).name == name for name, path in kept.items())


def test_metrics_come_last_so_that_a_failure_before_leaves_none(save, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    for name in ("plot_loss", "write_jsonl", "model_card"):
        with monkeypatch.context() as context:
            context.setattr(run, name, broken)
            with pytest.raises(OSError, match="disk full"):
                save()
        assert not (save.folder / "metrics.json").exists()
    save()
    assert (save.folder / "metrics.json").exists()


def test_a_run_is_uploaded_when_it_is_whole_and_only_if_that_was_asked_for(
    save, trainer, monkeypatch
):
    uploaded = []

    def publish(folder, training):
        assert Path(folder, "metrics.json").exists()
        uploaded.append((folder, training))

    monkeypatch.setattr(run, "publish", publish)
    save()
    assert uploaded == []
    trainer.args.publish = True
    save()
    assert uploaded == [(trainer.args.output_dir, trainer.args)]


def test_a_run_without_a_step_has_figures_too(save, trainer):
    trainer.took |= {"steps": 0, "tokens": 0, "slots": 0, "seconds": 0.0}
    metrics = save()
    assert (metrics["padding_fraction"], metrics["tokens_per_second"]) == (0.0, 0.0)


def test_a_loss_that_is_not_finite_is_said_with_its_first_step(save, trainer, capsys):
    losses = [1.0, math.nan, math.inf]
    trainer.state.log_history = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    save()
    assert "warning: the loss is not finite from step 2 on" in capsys.readouterr().out


def test_other_processes_write_nothing(save, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    before = {"trainer_state.json", "model.safetensors"}  # the trainer decides for itself
    assert save()["score"] == 0.75
    assert {one.name for one in save.folder.iterdir()} == before
    assert capsys.readouterr().out == ""


def test_the_card_shows_the_command_but_no_token_and_how_to_load(save, trainer, monkeypatch):
    trainer.args.hub_token = "hf_secret"
    command = ["recipes/x.py", "--hub_token", "hf_secret", "--dataset", "a b"]
    monkeypatch.setattr("sys.argv", command)
    save()
    card = (save.folder / "README.md").read_text()
    assert "hf_secret" not in card
    assert "accelerate launch recipes/x.py --hub_token HUB_TOKEN --dataset 'a b'" in card
    assert f"AutoModelForCausalLM.from_pretrained({trainer.args.output_dir!r})" in card
    assert "library_name: transformers" in card
    (save.folder / "adapter_config.json").write_text("{}")
    save()
    assert "library_name: peft" in (save.folder / "README.md").read_text()


def test_further_predictions_have_a_file_of_their_own(tmp_path):
    save_predictions(str(tmp_path), TUNED, "samples")
    (path,) = tmp_path.iterdir()
    assert path.name == "predictions_samples.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS


def test_the_first_wrong_answers_are_shown(capsys):
    say_wrong(TUNED)
    out = capsys.readouterr().out
    assert "1 of 2 are wrong, such as" in out
    assert "row 1" in out
    assert "read: b; right: a" in out
    say_wrong(TaskScore("accuracy", 1.0, 0.0, {}, RECORDS[:1], 1))
    assert capsys.readouterr().out == ""
