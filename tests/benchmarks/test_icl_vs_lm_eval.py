"""The benchmark beside lm-eval, which a stand-in plays: run whole on a tiny model, its parts on
made-up answers.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/icl_vs_lm_eval.py"
# lm-eval as far as it is called here: the continuation is what the whole text has behind the
# context's tokens, and every request is a pass of its own.
STAND_IN = {
    "lm_eval/api/instance.py": """
from dataclasses import dataclass


@dataclass
class Instance:
    request_type: str
    doc: dict
    arguments: tuple
    idx: int
""",
    "lm_eval/models/huggingface.py": """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class HFLM:
    def __init__(self, pretrained, dtype, device, batch_size):
        assert dtype == "float32" and device == "cpu" and batch_size > 0
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)

    def loglikelihood(self, requests, disable_tqdm):
        assert disable_tqdm and {one.request_type for one in requests} == {"loglikelihood"}
        return [(self.score(*one.arguments), False) for one in requests]

    @torch.no_grad()
    def score(self, context, continuation):
        ids = self.tokenizer.encode(context + continuation)
        found = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(self.tokenizer.encode(context))
        return sum(found[place - 1, ids[place]].item() for place in range(first, len(ids)))
""",
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load("word_problems")  # first: the benchmark imports it
bench, arm = load("icl_vs_lm_eval"), load("few_shot_arm")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # weights so large that a prompt's tokens show in its scores
        for weight in model.parameters():
            weight *= 8 if weight.dim() > 1 else 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder from which `lm_eval` can be imported."""
    folder = tmp_path_factory.mktemp("stand-in")
    for name, text in STAND_IN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few rows of each data set, as prepare_data.py writes them."""
    folder = tmp_path_factory.mktemp("data")
    reviews = [{"sentence": f"a film\u2028number {n} .", "label": n % 2} for n in range(40)]
    questions = [
        {"question": f"What is {n} to a {label} ?", "label": label}
        for n in range(4)
        for label in bench.LABELS
    ]
    problems = [{"question": f"{n} + 1?", "answer": f"\n#### {n + 1}"} for n in range(3)]
    for name, rows in {
        "sst2/train": reviews,
        "sst2/validation": reviews[30:],
        "trec/train": questions,
        "trec/test": questions[-7:],
        "gsm8k/train": problems * 10,
    }.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return folder


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


# The whole benchmark


@pytest.mark.slow
def test_the_last_line_and_the_table_hold_every_case(model_folder, stand_in):
    peer = ["--model_name_or_path", model_folder, "--lm_eval_python", sys.executable]
    arguments = [*peer, "--rows", 3, "--quick", "--cases", "zero", "written"]
    done = command(*arguments, PYTHONPATH=str(stand_in))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert next(iter(result)) == "ratio"
    assert list(result["cases"]) == ["zero", "written"]
    assert result["ratio"] == result["cases"]["zero"]["ratio"]
    for one in result["cases"].values():
        ours, theirs = one["seconds"]
        assert len(ours) == len(theirs) == 1
        assert one["ratio"] == pytest.approx(sum(theirs) / sum(ours))
        for loaded, peak in zip(one["loaded_bytes"], one["peak_bytes"], strict=True):
            assert 50 * 2**20 < loaded <= peak < 20 * 2**30
        assert re.search(rf"│ {one['title'][:20]}.* │ +{one['ratio']:.1f} │", done.stdout)
    zero, written = result["cases"].values()
    assert (zero["rows"], zero["peer"]) == (3, "lm_eval")
    assert zero["difference"] < 1e-4
    assert zero["accuracy"][0] == zero["accuracy"][1]
    assert zero["floor"] > 0
    assert (written["rows"], written["peer"]) == (6, "generate")
    assert written["same_texts"] >= 5


def test_a_side_that_ends_is_one_line_with_its_last_words(model_folder):
    arguments = ["--rows", 2, "--cases", "zero", "--lm_eval_python", "true"]
    done = command("--model_name_or_path", model_folder, *arguments)
    assert done.returncode == 1
    assert done.stderr == "error: lm_eval: ended: no output\n"


def test_a_benchmark_that_is_ended_leaves_nothing_running(model_folder):
    words = [sys.executable, SCRIPT, "--model_name_or_path", model_folder, "--cases", "written"]
    benchmark = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 60
    try:
        while len(children) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            children = psutil.Process(benchmark.pid).children()
        benchmark.terminate()
        assert benchmark.wait(30) == 143
        assert psutil.wait_procs(children, 30)[1] == []
    finally:
        benchmark.kill()


# The sides


@pytest.mark.parametrize("name", ["few", "classes", "zero"])
def test_the_sides_score_the_same_prompts_alike(name, model_folder, stand_in, data, monkeypatch):
    monkeypatch.syspath_prepend(stand_in)
    case = bench.make_cases(data, 5, 1, [name])[name]
    ours, theirs = (
        np.array(side(str(model_folder), 2)[0](case)["results"]) for side in (arm.ours, arm.lm_eval)
    )
    assert ours.shape == (5, 6 if name == "classes" else 2)
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.ptp(ours, axis=0).min() > 1e-3  # rows differ by more than that


def test_the_sides_write_the_same_answers(model_folder, data):
    case = bench.make_cases(data, 1, 3, ["written"])["written"] | {"max_new_tokens": 12}
    ours, theirs = (
        side(str(model_folder), 2)[0](case)["results"] for side in (arm.ours, arm.generate)
    )
    ours, theirs = ([bench.cut(text, case["stop"]) for text in some] for some in (ours, theirs))
    assert ours == theirs
    assert len(set(ours)) > 1


def test_the_tokens_that_ours_computes_are_counted(model_folder):
    answer, speed = arm.ours(str(model_folder), 1)
    case = {"prompts": ["the capital of France is"], "choices": [["Z"]]}
    answer(case)  # at first it tries out whether the model can share
    length = answer(case)["tokens"]
    assert 1 < length < len(case["prompts"][0])
    twice = {"prompts": case["prompts"] * 2, "choices": case["choices"] * 2}
    assert answer(twice)["tokens"] == length
    assert speed() > 0


# The comparison


class MadeUp:
    """A side with a given answer, which notes what it is asked."""

    def __init__(self, side: str, asked: list, **answer):
        self.side, self.asked, self.answer = side, asked, {"peak_bytes": 2, **answer}

    def read(self) -> dict:
        return {"loaded_bytes": 1}

    def ask(self, **request) -> dict:
        self.asked.append((self.side, Path(request.get("case", "speed")).stem))
        return {"speed": 10.0} if "speed" in request else self.answer


LABELS = {
    "title": "labels",
    "prompts": ["", ""],
    "choices": [["a", "b"]] * 2,
    "golds": [0, 1],
    "sha256": {},
}
TEXTS = {"title": "texts", "prompts": [""] * 3, "stop": ["\n"], "sha256": None}


def compared(case, ours, theirs, rounds=1):
    asked = []
    sides = [
        MadeUp("ours", asked, results=ours, seconds=2.0, tokens=5),
        MadeUp("peer", asked, results=theirs, seconds=3.0),
    ]
    name = "zero" if "choices" in case else "written"
    return bench.run_case(name, case, Path("folder"), sides, rounds), asked


def test_the_sides_take_turns_after_a_warm_up():
    scores = [[-1.0, -2.0], [-3.0, -2.0]]
    result, asked = compared(LABELS, scores, scores, rounds=2)
    assert asked[:3] == [("ours", "zero-warm-up"), ("peer", "zero-warm-up"), ("ours", "speed")]
    assert asked[3:] == [("ours", "zero"), ("peer", "zero")] * 2
    assert result["ratio"] == pytest.approx(1.5)
    assert result["seconds"] == [[2.0, 2.0], [3.0, 3.0]]
    assert result["floor"] == pytest.approx(5 / 10 / 2)
    assert (result["difference"], result["accuracy"]) == (0, [1, 1])


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([[-1.0, -2.0], [-3.0, -2.002]], "differ by 0.002, accuracies are 1.000 and 1.000"),
        ([[-1.0, -2.0], [-3.0, math.nan]], "differ by nan"),
        ([[-1.0005, -1.0004], [-3.0, -2.0]], "accuracies are 1.000 and 0.500"),
    ],
)
def test_other_scores_or_decisions_are_no_comparison(theirs, said):
    ours = [[-1.0, -1.0004], [-3.0, -2.0]] if "0.500" in said else [[-1.0, -2.0], [-3.0, -2.0]]
    with pytest.raises(bench.ArmFailed, match=said):
        compared(LABELS, ours, theirs)


def test_one_text_may_differ_and_what_follows_a_stop_does_not_count():
    result, _ = compared(TEXTS, ["a\nx", "b", "c"], ["a\ny", "b", "d"])
    assert result["same_texts"] == 2
    with pytest.raises(bench.ArmFailed, match="texts: 1 texts of 3 are the same"):
        compared(TEXTS, ["a", "b", "c"], ["a", "c", "d"])


# The cases


@pytest.mark.parametrize(("name", "shots"), [("few", 16), ("zero", 0), ("classes", 12)])
def test_all_prompts_have_the_same_demonstrations_equally_many_of_each_class(name, shots, data):
    case = bench.make_cases(data, 5, 1, [name])[name]
    parts = [prompt.rpartition("\n\n") for prompt in case["prompts"]]
    assert len({asked for _, _, asked in parts}) == 5
    (shown,) = {shown for shown, _, _ in parts}
    words = case["choices"][0]
    answers = [re.sub(r"(?s).*(It asks for:|review is)", "", one) for one in shown.split("\n\n")]
    assert Counter(filter(None, answers)) == {word: shots // len(words) for word in words if shots}
    assert all(not prompt.endswith(" ") for prompt in case["prompts"])


def test_golds_are_the_rows_classes_and_the_files_hashes_are_kept(data):
    case = bench.make_cases(data, 7, 1, ["classes"])["classes"]
    assert case["golds"] == [5, 0, 1, 2, 3, 4, 5]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in case["sha256"].values())
    assert list(case["sha256"]) == ["train.jsonl", "test.jsonl"]


def test_without_data_the_bundled_rows_are_taken_and_trec_is_left_out():
    cases = bench.make_cases(None, 40, 6, list(bench.GOALS))
    assert list(cases) == ["few", "zero", "written"]
    assert [len(one["prompts"]) for one in cases.values()] == [40, 40, 6]
    assert set(cases["few"]["golds"]) == {0, 1}
    assert cases["written"]["prompts"][0].count("The answer is") == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows, --rounds, --batch_size: must be 1 or more"),
        (["--batch_size", "0"], "--rows, --rounds, --batch_size: must be 1 or more"),
        (["--cases", "classes"], "--cases classes: needs --data"),
        (["--data", "none"], "none/sst2/train.jsonl: cannot be read"),
        (["--lm_eval_python", "./none", "--cases", "zero"], "--lm_eval_python ./none: No such"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, model_folder):
    with pytest.raises(UserError) as error:
        bench.main(["--model_name_or_path", str(model_folder), *arguments])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["[1]", '{"sentence": "a"}', '{"sentence": "a", "label": 2}', "x"])
def test_a_file_of_another_kind_is_one_line_with_its_number(line, data, tmp_path):
    good = (data / "sst2" / "train.jsonl").read_text(encoding="utf-8").split("\n")[0]
    path = tmp_path / "train.jsonl"
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train.jsonl:2: not as prepare_data.py writes it"):
        bench.read_rows(path, {0: " negative", 1: " positive"}, "{sentence}")


# lm-eval's environment


def test_lm_evals_environment_is_made_once_and_only_taken_when_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, codes = [], [1, 0]

    def create(folder, with_pip, clear):
        made.append(clear)
        folder.mkdir(parents=True, exist_ok=True)

    def install(words):
        assert words[-2:] == ["-r", str(ROOT / "benchmarks" / "requirements-lm-eval.txt")]
        return subprocess.CompletedProcess(words, codes.pop(0))

    monkeypatch.setattr(bench.venv, "create", create)
    monkeypatch.setattr(bench.subprocess, "run", install)
    with pytest.raises(UserError, match=r"requirements-lm-eval.txt: cannot be installed"):
        bench.lm_eval_python()
    python = bench.lm_eval_python()
    assert python == bench.lm_eval_python()
    assert Path(python).is_relative_to(tmp_path)
    assert made == [True, True]
