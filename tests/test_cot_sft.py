"""recipes/cot_sft.py run whole, on a tiny model with random weights."""

import json
from pathlib import Path

import cot_sft
import pytest
import torch
from peft import PeftModel
from run_files import read_json, read_jsonl
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.cli import parse_arguments
from recipelib.data.rows import load_rows
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

ROWS = [
    {
        "question": f"{n} pens and {n} more?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(1, 14)
]
REASONED = " 1+1=2\nThe answer is 2</s>"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for split, rows in (("train", ROWS[:8]), ("test", ROWS[8:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def run(model_folder, data_folder, tmp_path):
    """Runs `main` as the command line would, on the tiny model; gives the output folder."""

    def start(*argv: str) -> Path:
        given = {
            "--model_name_or_path": str(model_folder),
            "--template": "gsm8k",
            "--dataset": str(data_folder),
            "--output_dir": str(tmp_path / "out"),
            "--max_steps": "2",
            "--max_new_tokens": "8",
            "--disable_tqdm": "true",
        }
        given.update(zip(argv[::2], argv[1::2], strict=True))
        flat = [part for pair in given.items() for part in pair]
        cot_sft.main(*parse_arguments(cot_sft.CotArguments, "", cot_sft.DEFAULTS, flat))
        return tmp_path / "out"

    return start


@pytest.fixture
def pairs(tmp_path) -> tuple[str, ...]:
    """What points a run at sentence pairs with explanations."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            {
                "premise": f"{split} {n}: a dog runs.",
                "hypothesis": "An animal moves.",
                "label": ("entailment", "neutral", "contradiction")[n % 3],
                "explanation_1": "Dogs are animals.",
            }
            for n in range(6)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ("--template", "esnli", "--dataset", str(folder))


def test_classes_without_their_rationale_are_scored_and_the_wrong_ones_shown(run, pairs, capsys):
    folder = run(*pairs, "--target", "answer_only")
    assert read_json(folder / "metrics.json")["eval_rows"] == 6
    assert "are wrong, such as" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--samples 8: without its rationale esnli is answered"):
        run(*pairs, "--target", "answer_only", "--samples", "8")


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
    run("--target", target, "--max_train_samples", "-1", "--preview", "20")
    shown = capsys.readouterr().out
    for text in expected:
        assert f"⟦{text}⟧" in shown
    assert shown.count("⟦") == len(expected) * 8


def test_mixed_asks_for_either_under_an_instruction_of_its_own(run, capsys):
    run("--target", "mixed", "--preview", "9", "--rationale_instruction", "Reason.")
    shown = capsys.readouterr().out
    assert shown.count("Reason.\n\nQuestion:") == 8
    assert shown.count("Give only the answer.\n\nQuestion:") == 1


def test_a_run_is_scored_by_what_it_writes(run, model_folder):
    folder = run("--samples", "3")
    metrics = read_json(folder / "metrics.json")
    assert (metrics["method"], metrics["target"]) == ("cot lora", "rationale_answer")
    assert metrics["metric"] == "numeric_match"
    assert metrics["eval_rows"] == 5
    records = read_jsonl(folder / "predictions.jsonl")
    unread = [one["prediction"] is None for one in records]
    assert metrics["unreadable"] == sum(unread)
    assert all(isinstance(one["generated"], str) for one in records)
    voted = read_jsonl(folder / "predictions_samples.jsonl")
    assert [len(one["generated"]) for one in voted] == [3] * 5
    assert metrics["self_consistency"]["samples"] == 3
    assert metrics["self_consistency"]["score"] == sum(one["score"] for one in voted) / 5
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert PeftModel.from_pretrained(base, folder)
    assert AutoTokenizer.from_pretrained(folder)


def test_a_mixed_model_is_scored_under_both_instructions(run):
    metrics = read_json(run("--target", "mixed") / "metrics.json")
    assert metrics["train_examples"] == 16
    assert 0 <= metrics["answer_only"]["score"] <= 1


def test_an_answer_that_stands_first_ends_at_its_line(run, monkeypatch):
    template = PromptTemplate.load("gsm8k")
    args, _ = parse_arguments(
        cot_sft.CotArguments, "", cot_sft.DEFAULTS, ["--target", "answer_rationale"]
    )
    (trained,), asked = cot_sft.targets(template, args)
    (question,) = trained.questions(ROWS[2])
    assert question.target == " 6\n3+3=6"
    (answering,) = asked.values()
    assert answering.read_answer(question.target) == "6"
    (gold,) = answering.questions(ROWS[2])
    assert gold.references == ("6",)
    assert trained.prompt(question) == answering.prompt(gold) == template.prompt(gold)


def test_all_parameters_are_trained_on_request_and_load_with_plain_transformers(run, model_folder):
    folder = run("--full", "true", "--learning_rate", "1e-3")
    metrics = read_json(folder / "metrics.json")
    assert metrics["trainable_parameters"] == metrics["total_parameters"]
    tuned, base = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, model_folder))
    changed = [
        not torch.equal(one, other)
        for one, other in zip(tuned.parameters(), base.parameters(), strict=True)
    ]
    assert all(changed)
    assert "library_name: transformers" in (folder / "README.md").read_text()


@pytest.mark.parametrize("full", ["true", "false"])
def test_a_trained_result_answers_new_rows(run, data_folder, tmp_path, full):
    folder = run("--full", full)
    file = tmp_path / "asked.jsonl"
    template = PromptTemplate.load("gsm8k")
    rows = load_rows(template, str(data_folder), "test").rows
    file.write_text("\n".join(json.dumps({"question": row["question"]}) for row in rows))
    run("--predict", str(file))
    answered = read_jsonl(folder / "predictions_asked.jsonl")
    scored = read_jsonl(folder / "predictions.jsonl")
    said = {one["prompt"]: one["generated"] for one in scored}
    assert {one["prompt"]: one["generated"] for one in answered} == said


def test_a_whole_model_takes_the_place_of_an_adapter_of_an_earlier_run(run, model_folder):
    assert (run() / "adapter_config.json").exists()
    folder = run("--full", "true", "--learning_rate", "1e-3")
    assert not list(folder.glob("adapter_*"))
    tuned, base = (AutoModelForCausalLM.from_pretrained(one) for one in (folder, model_folder))
    assert not torch.equal(tuned.lm_head.weight, base.lm_head.weight)


def test_a_template_without_rationale_is_refused_by_a_line_with_the_cure(run):
    with pytest.raises(UserError, match=r"sst2.yaml: rationale: is missing; .*lora_sft.py"):
        run("--template", "sst2")


def test_samples_that_would_all_be_the_same_are_refused(run):
    with pytest.raises(UserError, match="--temperature"):
        run("--temperature", "0", "--samples", "4")


def test_wrong_answers_are_shown(run, capsys):
    folder = run()
    shown = capsys.readouterr().out
    assert "5 of 5 are wrong, such as" in shown
    records = read_jsonl(folder / "predictions.jsonl")
    for one in records[:3]:
        assert one["prompt"].partition("\n")[0] in shown
    assert shown.count("read: None; right: ['") == 3
