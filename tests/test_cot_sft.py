"""recipes/cot_sft.py run whole, on a tiny model with random weights."""

import json
import shutil
from pathlib import Path

import cot_sft
import pytest
import torch
from peft import PeftModel
from recipe_runs import SUMS, changed, watched_training, write_rows
from run_files import losses, read_json, read_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.cli import arguments
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

REASONED = " 1+1=2\nThe answer is 2</s>"
QUICK = {"template": "gsm8k", "max_steps": 2, "max_new_tokens": 8}


@pytest.fixture
def run(runs, sums):
    """Runs the recipe; gives the output folder."""
    return runs(cot_sft, dataset=sums, **QUICK)


@pytest.fixture(scope="module")
def finished(start, sums, tmp_path_factory) -> Path:
    """A run that tests only read, scored by several samples too."""
    folder = tmp_path_factory.mktemp("cot") / "out"
    return start(cot_sft, folder, dataset=sums, samples=3, whole=True, **QUICK)


@pytest.fixture(scope="module")
def tuned_whole(start, sums, tmp_path_factory):
    """A run that trained all parameters, where an adapter's was before; what was seen of it."""
    folder = tmp_path_factory.mktemp("cot_full") / "out"
    assert (start(cot_sft, folder, dataset=sums, **QUICK) / "adapter_config.json").exists()
    with watched_training() as seen:
        return start(cot_sft, folder, dataset=sums, full=True, learning_rate=1e-3, **QUICK), seen


@pytest.fixture
def pairs(tmp_path) -> dict:
    """What points a run at sentence pairs with explanations."""
    splits = {
        split: [
            {
                "premise": f"{split} {n}: a dog runs.",
                "hypothesis": "An animal moves.",
                "label": ("entailment", "neutral", "contradiction")[n % 3],
                "explanation_1": "Dogs are animals.",
            }
            for n in range(6)
        ]
        for split in ("train", "validation", "test")
    }
    return {"template": "esnli", "dataset": write_rows(tmp_path / "pairs", **splits)}


def test_a_resumed_run_ends_like_an_uninterrupted_one(run, tmp_path):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(**steps, output="whole")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = run(**steps, resume_from_checkpoint="auto", output="part")
    assert losses(resumed) == losses(whole)
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (resumed, whole))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_a_run_that_does_not_say_how_it_asked_answers_nothing(run, tmp_path):
    folder = run()
    metrics = read_json(folder / "metrics.json")
    del metrics["rendering"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"metrics\.json: rendering: is missing, .*; train again"):
        run(predict=write_rows(tmp_path / "asked", rows=SUMS[:1]) / "rows.jsonl")


def test_classes_without_their_rationale_are_scored_and_the_wrong_ones_shown(run, pairs, capsys):
    folder = run(**pairs, target="answer_only")
    assert read_json(folder / "metrics.json")["eval_rows"] == 6
    assert "are wrong, such as" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--samples 8: without its rationale esnli is answered"):
        run(**pairs, target="answer_only", samples=8)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("rationale_answer", [REASONED]),
        ("answer_only", [" 2</s>"]),
        ("answer_rationale", [" 2\n1+1=2</s>"]),
        ("mixed", [REASONED, " 2</s>"]),
    ],
)
def test_a_target_trains_exactly_its_part_of_the_solution(run, capsys, target, expected):
    run(target=target, max_train_samples=-1, preview=20)
    shown = capsys.readouterr().out
    for text in expected:
        assert f"⟦{text}⟧" in shown
    assert shown.count("⟦") == len(expected) * 8


def test_mixed_asks_for_either_under_an_instruction_of_its_own(run, capsys):
    run(target="mixed", preview=9, rationale_instruction="Reason.")
    shown = capsys.readouterr().out
    assert shown.count("Reason.\n\nQuestion:") == 8
    assert shown.count("Give only the answer.\n\nQuestion:") == 8


def test_a_run_is_scored_by_what_it_writes(finished, causal_model):
    metrics = read_json(finished / "metrics.json")
    assert (metrics["method"], metrics["target"]) == ("cot lora", "rationale_answer")
    assert metrics["metric"] == "numeric_match"
    assert metrics["eval_rows"] == 4
    assert metrics["estimated_memory_bytes"] > 0
    records = read_jsonl(finished / "predictions.jsonl")
    unread = [record["prediction"] is None for record in records]
    assert metrics["unreadable"] == sum(unread)
    assert all(isinstance(record["generated"], str) for record in records)
    voted = read_jsonl(finished / "predictions_samples.jsonl")
    assert [len(record["generated"]) for record in voted] == [3] * 4
    assert metrics["self_consistency"]["samples"] == 3
    assert metrics["self_consistency"]["score"] == sum(record["score"] for record in voted) / 4
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    assert PeftModel.from_pretrained(base, finished)
    assert AutoTokenizer.from_pretrained(finished)


def test_a_mixed_model_is_scored_under_both_instructions(run):
    metrics = read_json(run(target="mixed") / "metrics.json")
    assert (metrics["train_rows"], metrics["train_examples"]) == (8, 16)
    assert 0 <= metrics["answer_only"]["score"] <= 1


def test_an_answer_that_stands_first_ends_at_its_line():
    template = PromptTemplate.load("gsm8k")
    args, _ = arguments(cot_sft, target="answer_rationale")
    (trained,), (answering,) = cot_sft.targets(template, args)
    (question,) = trained.questions(SUMS[2])
    assert question.target == " 6\n3+3=6"
    assert answering.read_answer(question.target) == "6"
    (gold,) = answering.questions(SUMS[2])
    assert gold.references == ("6",)
    assert trained.prompt(question) == answering.prompt(gold) == template.prompt(gold)


def test_all_parameters_are_trained_on_request_and_load_with_plain_transformers(tuned_whole):
    folder, seen = tuned_whole
    metrics = read_json(folder / "metrics.json")
    assert metrics["trainable_parameters"] == metrics["total_parameters"]
    assert changed(seen) == seen.before.keys()
    assert read_json(folder / "config.json")["use_cache"]  # by which others write
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert parameter.equal(seen.trainer.model.get_parameter(name))
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_a_whole_model_takes_the_place_of_an_adapter_of_an_earlier_run(tuned_whole):
    folder, _ = tuned_whole
    assert not list(folder.glob("adapter_*"))


@pytest.mark.parametrize("trained", ["finished", "tuned_whole"])
def test_a_trained_result_answers_new_rows(run, tmp_path, trained, request):
    result = request.getfixturevalue(trained)
    folder = result if trained == "finished" else result[0]
    asked = [{"question": row["question"]} for row in SUMS[8:]]
    run(output_dir=folder, predict=write_rows(tmp_path, asked=asked) / "asked.jsonl")
    answered = read_jsonl(folder / "predictions_asked.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    said = {record["prompt"]: record["generated"] for record in scored}
    assert {record["prompt"]: record["generated"] for record in answered} == said


def test_a_template_without_rationale_is_refused_by_a_line_with_the_cure(run):
    with pytest.raises(UserError, match=r"sst2.yaml: rationale: is missing; .*lora_sft.py"):
        run(template="sst2")


def test_samples_that_would_all_be_the_same_are_refused(run):
    with pytest.raises(UserError, match="--temperature"):
        run(temperature=0, samples=4)


def test_wrong_answers_are_shown(run, capsys):
    folder = run(max_steps=1)
    shown = capsys.readouterr().out
    assert "4 of 4 are wrong, such as" in shown
    records = read_jsonl(folder / "predictions.jsonl")
    for record in records[:3]:
        assert record["prompt"].partition("\n")[0] in shown
    assert shown.count("read: None; right: ['") == 3
