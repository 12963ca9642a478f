"""The benchmark of methods: run whole on a tiny model, and what it makes of known runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import read_jsonl
from tiny_llama import save_tiny_llama

from common.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/prompt_methods.py"
SPEC = importlib.util.spec_from_file_location("prompt_methods", ROOT / SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.mark.slow
def test_a_benchmark_that_is_started_again_repeats_no_run(tmp_path):
    folder, keep = save_tiny_llama(tmp_path / "model"), tmp_path / "keep"
    words = [sys.executable, SCRIPT, "--quick", "--methods", "soft_prompt", "lora"]
    words += ["--regimes", "few", "--draws", "1", "--model_name_or_path", str(folder)]
    done = subprocess.run([*words, "--keep", keep], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    runs = result["tasks"]["movie_reviews"]
    assert runs.keys() == {"zero", "soft_prompt-few", "lora-few"}
    assert runs["soft_prompt-few"]["trainable_parameters"] == 16 * 32
    assert (keep / "prompt_methods.png").stat().st_size > 10_000
    # LoRA trained the rows that the soft prompt drew: 4 of each class.
    rows = read_jsonl(keep / "movie_reviews-lora-few" / "rows_0" / "train.jsonl")
    assert sorted(row["label"] for row in rows) == ["negative"] * 4 + ["positive"] * 4
    times = {path: path.stat().st_mtime_ns for path in keep.rglob("metrics.json")}
    assert len(times) == 3
    again = subprocess.run([*words, "--keep", keep], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(again.stdout.splitlines()[-1]) == result
    assert {path: path.stat().st_mtime_ns for path in keep.rglob("metrics.json")} == times
    changed = [*words, "--keep", keep, "--rows", "7"]
    refused = subprocess.run(changed, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "was run with other settings" in refused.stderr.splitlines()[-1]


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(UserError, match="--tasks sst2: needs --data"):
        bench.parse(["--tasks", "sst2"])
    with pytest.raises(UserError, match="--draws 0: must be 1 or more"):
        bench.parse(["--draws", "0"])
    with pytest.raises(UserError, match=r"sst2/train.jsonl: no such file; python benchmarks/prep"):
        bench.data_folder("sst2", tmp_path)


def test_several_draws_are_shown_with_their_deviation():
    assert bench.spread([0.5]) == "0.500"
    assert bench.spread([0.4, 0.6]) == "0.500 ± 0.141"
