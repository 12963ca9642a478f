"""The benchmark of packing: run whole on a tiny model, its parts on made-up runs."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_llama import save_tiny_llama

from recipelib.models.loading import load_tokenizer
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/packing.py"
SPEC = importlib.util.spec_from_file_location("packing_benchmark", ROOT / SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def command(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


# The whole benchmark


def test_a_run_compares_the_same_work_and_ends_with_a_line_of_json(model_folder, arms_here, capsys):
    arms_here(bench)
    bench.main(["--quick", "--steps", "2", "--model_name_or_path", str(model_folder)])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert next(iter(result)) == "ratio"
    padded, packed = result["arms"]["padded"], result["arms"]["packed"]
    assert result["ratio"] == pytest.approx(
        packed["tokens_per_second"] / padded["tokens_per_second"]
    )
    assert padded["tokens"] == packed["tokens"] > 1000
    assert padded["padding_fraction"] > 0.3
    assert packed["padding_fraction"] == result["padding_fraction"] == 0
    assert len(result["losses"]) == 3  # the first one's too
    assert result["max_loss_difference"] < 1e-4
    assert result["method"] == "full"
    for one in (padded, packed):
        assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"][0])
        assert one["peak_memory_bytes"] > 0  # tests/common/test_memory.py holds it to the estimate
    assert packed["estimated_memory_bytes"] < padded["estimated_memory_bytes"]
    text = "\n".join(lines)
    for arm in bench.ARMS:
        assert re.search(rf"│ {arm} +│ +\d", text)


def test_a_run_that_is_ended_leaves_nothing_running(model_folder):
    words = [sys.executable, SCRIPT, "--model_name_or_path", model_folder]
    benchmark = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 60
    try:
        while not any(one.cpu_times().user > 0.3 for one in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            children = psutil.Process(benchmark.pid).children()
        benchmark.terminate()
        assert benchmark.wait(30) == 143
        assert psutil.wait_procs(children, 30)[1] == []
    finally:
        benchmark.kill()


def test_lora_trains_the_same_rows(model_folder, tmp_path):
    losses = {}
    rows, result = tmp_path / "rows.jsonl", tmp_path / "result.json"
    bench.write_jsonl(rows, bench.generate_rows(16))
    for options in ([], ["--lora"]):
        words = ["--measure", "packed", "--rows", rows, "--result", result, "--steps", 1, *options]
        bench.main([*map(str, words), "--model_name_or_path", str(model_folder)])
        losses[bool(options)] = json.loads(result.read_text())["losses"]
    assert losses[True][0] == pytest.approx(losses[False][0], abs=1e-5)  # B is zero
    assert losses[True][1] != losses[False][1]


@pytest.mark.slow
def test_an_arm_that_fails_is_one_line_with_its_last_words(tmp_path, monkeypatch):
    args = bench.parse(["--model_name_or_path", str(tmp_path)])
    bench.write_jsonl(tmp_path / "rows.jsonl", bench.generate_rows(8))
    with pytest.raises(bench.ArmFailed, match=r"padded: ended with exit code 2: error: .*config"):
        bench.run_arm("padded", args, tmp_path)


# Its parts


def fake(seconds=2.0, tokens=100, slots=100, losses=(2.0, 1.5)):
    return {
        "seconds": seconds,
        "tokens": tokens,
        "slots": slots,
        "losses": list(losses),
        "peak_memory_bytes": 2**30,
        "estimated_memory_bytes": 2**30,
        "mean_length": 10.0,
        "longest": 20,
    }


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs `main` with made-up runs; gives its result and the order of the runs."""

    def run(*argv, **made):
        order = []

        def run_arm(arm, args, folder):
            order.append(arm)
            return made.get(arm, fake())

        monkeypatch.setattr(bench, "run_arm", run_arm)
        result = bench.main(list(argv))
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
        return result, order

    return run


def test_rounds_alternate(start):
    result, order = start("--rounds", "2", padded=fake(3.0, slots=250))
    assert order == ["padded", "packed"] * 2
    assert result["ratio"] == pytest.approx(1.5)
    assert result["arms"]["padded"]["padding_fraction"] == pytest.approx(0.6)
    assert result["arms"]["padded"]["seconds"] == [3.0, 3.0]
    assert result["steps"] == bench.STEPS


def test_a_quick_run_is_one_round_of_few_steps(start):
    result, order = start("--quick")
    assert order == ["padded", "packed"]
    assert result["steps"] == bench.QUICK_STEPS


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (fake(tokens=101), "packed: 101 tokens, but 100 when padded"),
        (fake(losses=[2.0]), "packed: 1 steps, but 2 when padded"),
        (fake(losses=[2.0, 1.5002]), "packed: loss 1.500200 in step 2, but 1.500000"),
        (fake(losses=[float("nan"), 1.5]), "packed: loss nan in step 1"),
    ],
)
def test_other_work_is_no_comparison(start, other, said):
    with pytest.raises(bench.ArmFailed, match=said):
        start("--quick", packed=other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps 0: must be 1 or more"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--data", "README.md"], "README.md"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys):
    done = command(*arguments)
    assert done.returncode == 2
    assert re.match(rf"error: .*{re.escape(said)}.*\n$", done.stderr)


def test_a_file_is_read_by_its_columns_and_must_hold_enough(tmp_path):
    rows = [{"instruction": f"do {n}", "input": None, "output": "it is done"} for n in range(24)]
    file = tmp_path / "rows.jsonl"
    bench.write_jsonl(file, rows)
    found = bench.read_rows(bench.parse(["--data", str(file), "--steps", "2"]))
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, rows))
    with pytest.raises(UserError, match="holds 24 rows; 32 are needed: lower --steps"):
        bench.read_rows(bench.parse(["--data", str(file), "--steps", "3"]))


# The rows


def test_generated_rows_are_the_same_every_time():
    rows = bench.generate_rows(50)
    assert rows == bench.generate_rows(50)
    assert rows[:20] == bench.generate_rows(20)
    assert rows != bench.generate_rows(50, seed=1)


def test_generated_rows_are_as_long_as_self_instructs_and_spread_as_much():
    # Of Self-Instruct's 175 seed tasks, with the bundled tokenizer: medians and 90 % quantiles.
    seeds = {"instruction": (13, 27), "input": (21, 103), "output": (32, 137)}
    encode = load_tokenizer().encode
    rows = bench.generate_rows(2000)
    assert np.mean([bool(row["input"]) for row in rows]) == pytest.approx(0.71, abs=0.05)
    for part, (median, high) in seeds.items():
        lengths = [len(encode(row[part])) for row in rows if row[part]]
        assert np.median(lengths) == pytest.approx(median, rel=0.2), part
        assert np.percentile(lengths, 90) == pytest.approx(high, rel=0.25), part
