"""recipes/icl_eval.py run whole, on tiny models with random weights."""

from pathlib import Path

import icl_eval
import instruction_sft
import lora_sft
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipe_runs import REVIEWS, write_rows
from run_files import read_json, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipelib.adapters import merge_adapter
from recipelib.inference import Journal
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
KINDS = ["sum", "mean", "bytes", "pmi", "calibrated"]


@pytest.fixture(scope="module")
def model_folder(causal_model, tmp_path_factory) -> Path:
    """The tiny model with weights so large that a prompt's tokens show in its score."""
    folder = tmp_path_factory.mktemp("model")
    model = AutoModelForCausalLM.from_pretrained(causal_model)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(causal_model).save_pretrained(folder)
    return folder


@pytest.fixture
def run(runs, model_folder):
    """Runs the recipe; gives the output folder."""
    return runs(icl_eval, model_name_or_path=model_folder, max_length=512)


# Labels ------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_the_design_names(run, capsys):
    folder = run(shots=3, draws=2, whole=True)
    metrics = read_json(folder / "metrics.json")
    assert {
        "task", "method", "model", "metric", "score", "stderr", "base_score", "eval_rows",
        "train_rows", "train_tokens", "supervised_tokens", "padding_fraction", "tokens_per_second",
        "train_seconds", "eval_seconds", "trainable_parameters", "total_parameters",
        "peak_memory_bytes", "world_size", "distributed_type", "seed", "versions",
    } <= set(metrics)  # fmt: skip
    records = read_jsonl(folder / "predictions.jsonl")
    assert [(one["draw"], one["row"]) for one in records] == [
        (draw, row) for draw in range(2) for row in range(6)
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
    records = read_jsonl(run(shots=3) / "predictions.jsonl")
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
    folder = run(shots=2, score=score)
    metrics = read_json(folder / "metrics.json")
    assert metrics["score"] == metrics["scores"][score]["mean"]
    for one in read_jsonl(folder / "predictions.jsonl"):
        assert one["prediction"] == one["predictions"][score]


@pytest.mark.parametrize("sampler", ["first", "random", "balanced", "nearest"])
def test_no_row_is_its_own_demonstration_under_any_sampler(run, tmp_path, sampler):
    same = write_rows(tmp_path / "same", train=REVIEWS[:10], validation=REVIEWS[:10])
    folder = run(shots=4, sampler=sampler, dataset=same, draws=2)
    for one in read_jsonl(folder / "predictions.jsonl"):
        *shown, asked = one["prompt"].split("\n\n")
        assert len(shown) == 4
        query = asked.partition("\n")[0]
        assert query not in [text.partition("\n")[0] for text in shown]


def test_nearest_by_embedding_asks_the_model(run):
    folder = run(shots=2, sampler="nearest", nearest_by="embedding")
    assert len(read_jsonl(folder / "predictions.jsonl")) == 6


def test_demonstrations_that_do_not_fit_are_dropped_whole_and_counted(run):
    whole = run(shots=6, max_length=1024, output="whole")
    lengths = read_json(whole / "metrics.json")
    assert lengths["demonstrations_dropped"] == 0
    folder = run(shots=6, max_length=200, output="cut")
    metrics = read_json(folder / "metrics.json")
    assert metrics["rows_with_dropped_demonstrations"] == 6
    records = read_jsonl(folder / "predictions.jsonl")
    left = sum(one["prompt"].count("The movie review is:") - 1 for one in records)
    assert metrics["demonstrations_dropped"] == 6 * 6 - left
    assert 0 < left < 6 * 6


def test_pairs_of_a_row_are_asked_under_the_same_demonstrations(run, tmp_path):
    topics = ["World", "Sports", "Business", "Sci/Tech"]
    rows = [{"text": f"story {n} {'on ' * n}", "label": topics[n % 4]} for n in range(12)]
    news = write_rows(tmp_path / "news", train=rows, test=rows[:3])
    folder = run(template="next_sentence", dataset=news, shots=4, max_length=330)
    records = read_jsonl(folder / "predictions.jsonl")
    assert len(records) == 3
    for one in records:
        assert len(one["prompt"]) == 4
        assert len({text.count("Answer:") for text in one["prompt"]}) == 1


# Written answers ---------------------------------------------------------------------------------


@pytest.fixture
def written(runs, model_folder, sums):
    """Runs the recipe on a task whose answers are written; gives the output folder."""
    options = {"dataset": sums, "template": "gsm8k", "max_new_tokens": 8, "max_length": 512}
    return runs(icl_eval, model_name_or_path=model_folder, **options)


def test_reasoning_stands_in_the_demonstrations_unless_it_is_turned_off(written):
    with_reasoning = written(shots=2, output="with")
    for one in read_jsonl(with_reasoning / "predictions.jsonl"):
        assert one["prompt"].count("\nThe answer is") == 2
        assert one["prompt"].count("=") >= 2
    without = written(shots=2, reasoning="none", output="without")
    for one in read_jsonl(without / "predictions.jsonl"):
        assert "The answer is" not in one["prompt"]
        assert "=" not in one["prompt"]
    assert not list(without.glob("*.png"))


def test_several_samples_vote(written):
    folder = written(shots=1, samples=3)
    metrics = read_json(folder / "metrics.json")
    assert (metrics["samples"], metrics["temperature"]) == (3, 0.7)
    assert all(len(one["generated"]) == 3 for one in read_jsonl(folder / "predictions.jsonl"))


def test_a_trigger_makes_the_model_reason_and_then_answer(written):
    folder = written(reasoning="trigger")
    for one in read_jsonl(folder / "predictions.jsonl"):
        assert one["prompt"].count("Question:") == 1
        assert one["generated"].count("\nThe answer is") == 1
    assert read_json(folder / "metrics.json")["shots"] == 0


@pytest.mark.parametrize("template", ["squad", "wnut17", "alpaca", "esnli"])
def test_every_form_is_scored(run, tmp_path, template):
    from template_cases import CASES

    rows = dict.fromkeys(("train", "validation", "test"), CASES[template].rows)
    options = {"dataset": write_rows(tmp_path / "rows", **rows), "shots": 1, "sampler": "first"}
    folder = run(template=template, **options, max_new_tokens=4, max_length=1200)
    assert read_json(folder / "metrics.json")["eval_rows"] == 3


# Models ------------------------------------------------------------------------------------------


def test_a_masked_model_fills_the_cloze(run, masked_model):
    folder = run(model_name_or_path=masked_model, shots=1)
    records = read_jsonl(folder / "predictions.jsonl")
    assert len(records) == 6
    assert all(one["prompt"].count("[MASK]") >= 1 for one in records)
    assert read_json(folder / "metrics.json")["demonstrations_dropped"] == 0
    assert set(records[0]["scores"]) == set(KINDS)


def test_a_masked_model_without_label_words_is_one_line(written, masked_model):
    with pytest.raises(UserError, match=r"gsm8k\.yaml: verbalizer: is missing; a masked model"):
        written(model_name_or_path=masked_model)


def test_a_masked_model_reads_no_more_than_its_positions_and_writes_nothing(run, masked_model):
    model = {"model_name_or_path": masked_model, "max_length": 4096}
    folder = run(**model, shots=16)
    assert read_json(folder / "metrics.json")["demonstrations_dropped"] > 0
    with pytest.raises(UserError, match=r"--reasoning trigger: a masked model writes nothing"):
        run(**model, reasoning="trigger")


def test_an_adapter_is_scored_on_the_model_it_was_trained_on(run, model_folder, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    tuned = run(adapter=tmp_path / "adapter", shots=1, model_name_or_path="", output="tuned")
    base = run(shots=1, output="base")
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
    run(adapter=folder, shots=0, rendering="text")
    said = "warning: the adapter was trained with --rendering chat: ask so, too"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("trained", ["adapter", "merged", "of several"])
def test_a_run_is_scored_on_its_own_rows_unless_others_are_named(
    run, runs, trained, tmp_path, monkeypatch, capsys
):
    """The held-out rows that its training left alone, found from any folder."""
    monkeypatch.chdir(write_rows(tmp_path / "place", mine=REVIEWS))
    named, common = {"dataset": "mine.jsonl"}, {"max_steps": 1, "output": "trained"}
    if trained in ("adapter", "merged"):
        folder = runs(lora_sft)(**common, **named, rendering="text")
    else:
        templates = ["movie_reviews=mine.jsonl", "word_problems"]
        more = {"dataset": None, "template": templates[: 1 + (trained == "of several")]}
        folder = runs(instruction_sft)(**common, **more, max_train_samples=4, max_new_tokens=2)
    told = read_jsonl(folder / "predictions.jsonl")
    told = [one for one in told if one.get("task", "movie_reviews") == "movie_reviews"]
    if trained == "merged":  # twice: the first one is replaced
        folder, _ = (merge_adapter(str(folder), str(folder / "merged")) for _ in range(2))
    option = "adapter" if trained == "adapter" else "model_name_or_path"
    ask = {"model_name_or_path": "", option: folder, "dataset": None, "shots": 0}
    monkeypatch.chdir(tmp_path)
    if trained == "of several":
        with pytest.raises(UserError, match="was trained on movie_reviews, word_problems; pass"):
            run(**ask)
        ask["template"] = "movie_reviews"
    capsys.readouterr()
    scored = read_jsonl(run(**ask) / "predictions.jsonl")
    said = capsys.readouterr().out
    assert f"{folder}: is asked as it was trained, with its " in said
    assert f"its rows ({tmp_path}/place/mine.jsonl), --rendering " in said
    assert {one["prompt"] for one in scored} == {one["prompt"] for one in told}
    others = write_rows(tmp_path / "others", train=REVIEWS, validation=REVIEWS[:1])
    assert len(read_jsonl(run(**{**ask, "dataset": others}) / "predictions.jsonl")) == 1
    (tmp_path / "place" / "mine.jsonl").unlink()
    with pytest.raises(UserError, match=r"\.yaml: dataset\.path: .*: no such .*--dataset"):
        run(**ask)


def test_a_conversation_is_answered_by_any_model_with_a_chat_template(run, runs, tmp_path, capsys):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    data = write_rows(tmp_path / "chats", train=[{"messages": turns}] * 4)
    chats = {"dataset": data / "train.jsonl", "template": None, "max_new_tokens": 4}
    folder = runs(instruction_sft)(**{**chats, "template": []}, max_steps=1, output="trained")
    asked = write_rows(tmp_path, asked=[{"messages": turns[:1]}]) / "asked.jsonl"
    ask = {"model_name_or_path": folder, "dataset": None, "max_new_tokens": 4}
    run(**ask, predict=asked, preview=1)
    assert "Hello\n\n### Assistant:\n" in capsys.readouterr().out
    (one,) = read_jsonl(run(**ask, predict=asked) / "predictions_asked.jsonl")
    assert one["prompt"].endswith("Hello\n\n### Assistant:\n")
    assert (one["answer"], one["prediction"]) == ([], one["generated"].strip())
    assert read_json(run(**ask) / "metrics.json")["metric"] == "loss"


# What stops, goes on, or is shown ----------------------------------------------------------------


def test_rows_without_answers_are_predicted(run, tmp_path):
    asked = [{"sentence": row["sentence"]} for row in REVIEWS[:3]]
    folder = run(predict=write_rows(tmp_path, asked=asked) / "asked.jsonl", shots=2)
    records = read_jsonl(folder / "predictions_asked.jsonl")
    assert [one["row"] for one in records] == [0, 1, 2]
    assert all(one["prediction"] in ("negative", "positive") for one in records)
    assert not (folder / "metrics.json").exists()


def test_a_preview_shows_prompts_and_candidates_and_loads_no_model(run, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    folder = run(preview=2, shots=2)
    said = capsys.readouterr().out
    assert said.count("The movie review is:") == 2 * 3
    assert "' positive'" in said
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"shots": 40}, "--shots 40: needs 40 different training rows besides"),
        ({"shots": -1}, "--shots -1: must be 0 or more"),
        ({"samples": 2, "temperature": 0}, "--samples: samples at --temperature 0 are all"),
        ({"predict": "nope.csv"}, "--predict nope.csv: no such file or folder"),
        ({"adapter": "./nowhere"}, "--adapter ./nowhere: no such folder"),
        ({"samples": 5}, "--samples 5: movie_reviews is answered by the likeliest label"),
        (
            {"reasoning": "trigger", "score": "calibrated"},
            "--score calibrated: answers of movie_reviews are written; leave it out",
        ),
        ({"max_length": 10}, "--max_length 10: none of the 6 rows fits, even without demonstra"),
    ],
)
def test_a_mistake_is_one_line(run, options, line):
    with pytest.raises(UserError) as caught:
        run(**options)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_calibration_without_content_free_inputs_is_one_line(run, tmp_path):
    text = (ROOT / "data_templates" / "movie_reviews.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace('content_free: ["", "N/A"]\n', ""))
    with pytest.raises(UserError, match=r"--score calibrated: needs content_free in mine\.yaml"):
        run(template=file, score="calibrated")
    metrics = read_json(run(template=file) / "metrics.json")
    assert set(metrics["scores"]) == {"sum", "mean", "bytes"}


def test_an_adapter_in_a_pickle_is_refused(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors, and other formats can"):
        run(adapter=tmp_path)


def test_an_evaluation_that_was_killed_goes_on_and_ends_as_one_that_was_not(
    run, monkeypatch, tmp_path
):
    options = {"shots": 3, "draws": 3, "eval_batch_tokens": 40}
    file = tmp_path / "killed" / "partial" / "process-0.jsonl"
    add, computed, on_disk = Journal.add, [], []

    def watch(self, requests, results):
        add(self, requests, results)
        computed.extend(requests)
        if file.exists():
            on_disk.append(file.read_bytes())  # which stays, whatever happens to the process

    def watch_until_killed(self, requests, results):
        watch(self, requests, results)
        if len(on_disk) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", watch)
    whole = run(**options, output="whole")
    total = len(computed)
    monkeypatch.setattr(Journal, "add", watch_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(**options, output="killed")
    file.write_bytes(on_disk[-1])
    known = on_disk[-1].count(b"\n")
    assert known >= 5
    assert not (tmp_path / "killed" / "metrics.json").exists()
    computed.clear()
    monkeypatch.setattr(Journal, "add", watch)
    resumed = run(**options, resume=True, output="killed")
    assert len(computed) == total - known
    for one, other in zip(
        *(read_jsonl(folder / "predictions.jsonl") for folder in (resumed, whole)), strict=True
    ):
        assert one["prediction"] == other["prediction"]
        assert one["scores"]["sum"] == pytest.approx(other["scores"]["sum"], abs=1e-5)
    assert not (resumed / "partial").exists()
