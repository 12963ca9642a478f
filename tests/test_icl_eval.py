"""recipes/icl_eval.py run whole, on tiny models with random weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import icl_eval
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from run_files import read_json, read_jsonl
from tiny_llama import save_tiny_llama
from tokenizers_for_tests import tokenizer_for
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from recipelib.cli import parse_arguments
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["fine", "warm", "dull", "weak"]
TRAIN = [
    {"sentence": f"a {word} film, number {number}", "label": ["positive", "negative"][at // 2]}
    for number in range(8)
    for at, word in enumerate(WORDS)
]
ASKED = [{**row, "sentence": f"seen: {row['sentence']}"} for row in TRAIN[:9]]
SUMS = [
    {
        "question": f"{n} pens and {n} more?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(1, 12)
]
KINDS = ["sum", "mean", "bytes", "pmi", "calibrated"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # weights so large that a prompt's tokens show in its score
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = tokenizer_for("bert")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=200,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for split, rows in (("train", TRAIN), ("validation", ASKED)):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def sums_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    for split, rows in (("train", SUMS[:7]), ("test", SUMS[7:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
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
            "--max_length": "512",
        }
        given.update(zip(argv[::2], argv[1::2], strict=True))
        flat = [part for key, value in given.items() if value for part in (key, value)]
        icl_eval.main(*parse_arguments(icl_eval.IclArguments, "", icl_eval.DEFAULTS, flat))
        return folder

    return start


# Labels ------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_the_design_names(run, capsys):
    folder = run("--shots", "3", "--draws", "2")
    metrics = read_json(folder / "metrics.json")
    assert {
        "task", "method", "model", "metric", "score", "stderr", "base_score", "eval_rows",
        "train_rows", "train_tokens", "supervised_tokens", "padding_fraction", "tokens_per_second",
        "train_seconds", "eval_seconds", "trainable_parameters", "total_parameters",
        "peak_memory_bytes", "world_size", "distributed_type", "seed", "versions",
    } <= set(metrics)  # fmt: skip
    records = read_jsonl(folder / "predictions.jsonl")
    assert [(one["draw"], one["row"]) for one in records] == [
        (draw, row) for draw in range(2) for row in range(9)
    ]
    by_draw = [
        np.mean([one["prediction"] == one["answer"] for one in records if one["draw"] == draw])
        for draw in range(2)
    ]
    assert metrics["draw_scores"] == pytest.approx(by_draw)
    assert metrics["score"] == pytest.approx(np.mean(by_draw))
    assert metrics["std_over_draws"] == pytest.approx(np.std(by_draw, ddof=1))
    assert set(metrics["scores"]) == set(KINDS)
    for one in records:
        assert set(one["scores"]) == set(KINDS)
        assert one["prompt"].count("The movie review is:") == 4
        assert one["prediction"] == max(one["scores"]["sum"], key=one["scores"]["sum"].get)
    for name in ("confusion.png", "reliability.png", "template.yaml"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "partial").exists()
    said = capsys.readouterr().out
    assert "the first prompt" in said
    assert records[0]["prompt"] in said


def test_scores_are_those_of_whole_prompts_computed_one_by_one(run, model_folder):
    records = read_jsonl(run("--shots", "3") / "predictions.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()

    def total(prompt: str, words: list[str]) -> float:
        values = []
        for word in words:
            ids, answer = tokenizer(prompt).input_ids, tokenizer(word).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            places = range(len(ids) - 1, len(ids) + len(answer) - 1)
            values.append(logits[places, answer].sum())
        return torch.logsumexp(torch.stack(values), 0).item()

    words = {"negative": [" negative", " bad"], "positive": [" positive", " good"]}
    asked = "The movie review is: {}\nThe sentiment of the review is"
    for one in records:
        shown = one["prompt"].rpartition("\n\n")[0] + "\n\n"
        sums = {label: total(one["prompt"], some) for label, some in words.items()}
        assert one["scores"]["sum"] == pytest.approx(sums, abs=1e-4)
        alone = {label: total(asked.format(""), some) for label, some in words.items()}
        expected = {label: sums[label] - alone[label] for label in words}
        assert one["scores"]["pmi"] == pytest.approx(expected, abs=2e-4)
        free = [
            np.array([total(shown + asked.format(text), some) for some in words.values()])
            for text in ("", "N/A")
        ]
        free = np.mean([np.exp(some) / np.exp(some).sum() for some in free], axis=0)
        calibrated = np.exp(list(sums.values())) / free
        expected = dict(zip(words, np.log(calibrated / calibrated.sum()), strict=True))
        assert one["scores"]["calibrated"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("score", ["calibrated", "pmi", "mean"])
def test_the_score_that_is_picked_decides(run, score):
    folder = run("--shots", "2", "--score", score)
    metrics = read_json(folder / "metrics.json")
    assert metrics["score"] == metrics["scores"][score]["mean"]
    for one in read_jsonl(folder / "predictions.jsonl"):
        assert one["prediction"] == one["predictions"][score]


@pytest.mark.parametrize("sampler", ["first", "random", "balanced", "nearest"])
def test_no_row_is_its_own_demonstration_under_any_sampler(run, data_folder, tmp_path, sampler):
    folder = tmp_path / "same"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, TRAIN[:12])))
    options = ("--shots", "4", "--sampler", sampler, "--dataset", str(folder), "--draws", "2")
    for one in read_jsonl(run(*options) / "predictions.jsonl"):
        *shown, asked = one["prompt"].split("\n\n")
        assert len(shown) == 4
        query = asked.partition("\n")[0]
        assert query not in [text.partition("\n")[0] for text in shown]


def test_nearest_by_embedding_asks_the_model(run):
    folder = run("--shots", "2", "--sampler", "nearest", "--nearest_by", "embedding")
    assert len(read_jsonl(folder / "predictions.jsonl")) == 9


def test_demonstrations_that_do_not_fit_are_dropped_whole_and_counted(run):
    whole = run("--shots", "6", "--max_length", "1024", output="whole")
    lengths = read_json(whole / "metrics.json")
    assert lengths["demonstrations_dropped"] == 0
    folder = run("--shots", "6", "--max_length", "200", output="cut")
    metrics = read_json(folder / "metrics.json")
    assert metrics["rows_with_dropped_demonstrations"] == 9
    records = read_jsonl(folder / "predictions.jsonl")
    left = sum(one["prompt"].count("The movie review is:") - 1 for one in records)
    assert metrics["demonstrations_dropped"] == 9 * 6 - left
    assert 0 < left < 9 * 6


def test_pairs_of_a_row_are_asked_under_the_same_demonstrations(run, tmp_path):
    folder = tmp_path / "news"
    folder.mkdir()
    topics = ["World", "Sports", "Business", "Sci/Tech"]
    rows = [{"text": f"story {n} {'on ' * n}", "label": topics[n % 4]} for n in range(12)]
    for split, some in (("train", rows), ("test", rows[:3])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
    options = ("--template", "next_sentence", "--dataset", str(folder), "--shots", "4")
    records = read_jsonl(run(*options, "--max_length", "330") / "predictions.jsonl")
    assert len(records) == 3
    for one in records:
        assert len(one["prompt"]) == 4
        assert len({text.count("Answer:") for text in one["prompt"]}) == 1


# Written answers ---------------------------------------------------------------------------------


def written(run, sums_folder, *more, **options):
    given = ("--template", "gsm8k", "--dataset", str(sums_folder), "--max_new_tokens", "8")
    return run(*given, *more, **options)


def test_reasoning_stands_in_the_demonstrations_unless_it_is_turned_off(run, sums_folder):
    with_reasoning = written(run, sums_folder, "--shots", "2", output="with")
    for one in read_jsonl(with_reasoning / "predictions.jsonl"):
        assert one["prompt"].count("\nThe answer is") == 2
        assert one["prompt"].count("=") >= 2
    without = written(run, sums_folder, "--shots", "2", "--reasoning", "none", output="without")
    for one in read_jsonl(without / "predictions.jsonl"):
        assert "The answer is" not in one["prompt"]
        assert "=" not in one["prompt"]
    assert not list(without.glob("*.png"))


def test_several_samples_vote(run, sums_folder):
    folder = written(run, sums_folder, "--shots", "1", "--samples", "3")
    metrics = read_json(folder / "metrics.json")
    assert (metrics["samples"], metrics["temperature"]) == (3, 0.7)
    assert all(len(one["generated"]) == 3 for one in read_jsonl(folder / "predictions.jsonl"))


def test_a_trigger_makes_the_model_reason_and_then_answer(run, sums_folder):
    folder = written(run, sums_folder, "--reasoning", "trigger")
    for one in read_jsonl(folder / "predictions.jsonl"):
        assert one["prompt"].count("Question:") == 1
        assert one["generated"].count("\nThe answer is") == 1
    assert read_json(folder / "metrics.json")["shots"] == 0


@pytest.mark.parametrize("template", ["squad", "wnut17", "alpaca", "esnli"])
def test_every_form_is_scored(run, tmp_path, template):
    from template_cases import CASES

    folder = tmp_path / "rows"
    folder.mkdir()
    rows = CASES[template].rows
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--dataset", str(folder), "--max_new_tokens", "4", "--max_length", "1200")
    out = run("--template", template, "--shots", "1", "--sampler", "first", *options)
    assert read_json(out / "metrics.json")["eval_rows"] == 3


# Models ------------------------------------------------------------------------------------------


def test_a_masked_model_fills_the_cloze(run, masked_folder):
    folder = run("--model_name_or_path", str(masked_folder), "--shots", "2")
    records = read_jsonl(folder / "predictions.jsonl")
    assert len(records) == 9
    assert all(one["prompt"].count("[MASK]") >= 1 for one in records)
    assert set(records[0]["scores"]) == set(KINDS)


def test_a_masked_model_without_label_words_is_one_line(run, masked_folder, sums_folder):
    with pytest.raises(UserError, match=r"gsm8k\.yaml: verbalizer: is missing; a masked model"):
        written(run, sums_folder, "--model_name_or_path", str(masked_folder))


def test_a_masked_model_reads_no_more_than_its_positions_and_writes_nothing(run, masked_folder):
    model = ["--model_name_or_path", str(masked_folder), "--max_length", "4096"]
    folder = run(*model, "--shots", "16")
    assert read_json(folder / "metrics.json")["demonstrations_dropped"] > 0
    with pytest.raises(UserError, match=r"--reasoning trigger: a masked model writes nothing"):
        run(*model, "--reasoning", "trigger")


def test_an_adapter_is_scored_on_the_model_it_was_trained_on(run, model_folder, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    tuned = run(
        "--adapter", str(tmp_path / "adapter"), "--shots", "1", "--model_name_or_path", "",
        output="tuned",
    )  # fmt: skip
    base = run("--shots", "1", output="base")
    scores, plain = (
        read_jsonl(one / "predictions.jsonl")[0]["scores"]["sum"] for one in (tuned, base)
    )
    assert max(abs(scores[label] - plain[label]) for label in plain) > 1e-3
    assert read_json(tuned / "metrics.json")["adapter"] == str(tmp_path / "adapter")


def test_a_trained_run_is_neither_written_over_nor_asked_otherwise_unsaid(
    run, model_folder, tmp_path, capsys
):
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"trainable_parameters": 5, "rendering": "chat"}')
    with pytest.raises(UserError, match="trained: holds a trained run; name another"):
        run(output="trained")
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules="all-linear")
    ).save_pretrained(folder)
    run("--adapter", str(folder), "--shots", "0")
    said = "warning: the adapter was trained with --rendering chat: ask so, too"
    assert said in capsys.readouterr().out


# What stops, goes on, or is shown ----------------------------------------------------------------


def test_rows_without_answers_are_predicted(run, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps({"sentence": row["sentence"]}) for row in ASKED[:3]))
    folder = run("--predict", str(file), "--shots", "2")
    records = read_jsonl(folder / "predictions_asked.jsonl")
    assert [one["row"] for one in records] == [0, 1, 2]
    assert all(one["prediction"] in ("negative", "positive") for one in records)
    assert not (folder / "metrics.json").exists()


def test_a_preview_shows_prompts_and_candidates_and_loads_no_model(run, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    folder = run("--preview", "2", "--shots", "2")
    said = capsys.readouterr().out
    assert said.count("The movie review is:") == 2 * 3
    assert "' positive'" in said
    assert not folder.exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--shots", "40"], "--shots 40: needs 40 different training rows besides"),
        (["--shots", "-1"], "--shots -1: must be 0 or more"),
        (["--samples", "2", "--temperature", "0"], "--samples: samples at --temperature 0 are all"),
        (["--predict", "nope.csv"], "--predict nope.csv: no such file or folder"),
        (["--adapter", "./nowhere"], "--adapter ./nowhere: no such folder"),
        (["--samples", "5"], "--samples 5: movie_reviews is answered by the likeliest label"),
        (
            ["--reasoning", "trigger", "--score", "calibrated"],
            "--score calibrated: answers of movie_reviews are written; leave it out",
        ),
        (["--max_length", "10"], "--max_length 10: no row fits; raise it"),
    ],
)
def test_a_mistake_is_one_line(run, argv, line):
    with pytest.raises(UserError) as caught:
        run(*argv)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_calibration_without_content_free_inputs_is_one_line(run, tmp_path):
    text = (ROOT / "data_templates" / "movie_reviews.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace('content_free: ["", "N/A"]\n', ""))
    with pytest.raises(UserError, match=r"--score calibrated: needs content_free in mine\.yaml"):
        run("--template", str(file), "--score", "calibrated")
    metrics = read_json(run("--template", str(file)) / "metrics.json")
    assert set(metrics["scores"]) == {"sum", "mean", "bytes"}


def test_an_adapter_in_a_pickle_is_refused(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors, and other formats can"):
        run("--adapter", str(tmp_path))


def test_an_evaluation_that_was_killed_goes_on_and_ends_as_one_that_was_not(
    run, model_folder, data_folder, tmp_path
):
    options = ("--shots", "3", "--draws", "3", "--eval_batch_tokens", "40")
    whole = run(*options, output="whole")
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "recipes" / "icl_eval.py"), *options]
    command += ["--model_name_or_path", str(model_folder), "--dataset", str(data_folder)]
    command += ["--output_dir", str(folder), "--max_length", "512", "--use_cpu", "true"]
    slow = (
        "import sys, time, runpy; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:];"
        "import recipelib.inference.journal as j; add = j.Journal.add;"
        "j.Journal.add = lambda *a: (add(*a), time.sleep(0.3));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", slow, str(ROOT / "recipes"), *command[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    file = folder / "partial" / "process-0.jsonl"
    deadline = time.time() + 90
    while not (file.exists() and file.read_bytes().count(b"\n") > 4):
        assert child.poll() is None, "it ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "metrics.json").exists()
    known = file.read_bytes().count(b"\n")
    run(*options, "--resume", "true", output="killed")
    assert known > 4
    for one, other in zip(
        *(read_jsonl(some / "predictions.jsonl") for some in (folder, whole)), strict=True
    ):
        assert one["prediction"] == other["prediction"]
        assert one["scores"]["sum"] == pytest.approx(other["scores"]["sum"], abs=1e-5)
    assert not (folder / "partial").exists()


def test_help_answers_without_importing_transformers():
    code = (
        "import sys; sys.argv = ['icl_eval.py', '--help']; import runpy\n"
        "try: runpy.run_path('recipes/icl_eval.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("--shots", "--sampler", "--draws", "--score", "--adapter", "--resume"):
        assert name in done.stdout
