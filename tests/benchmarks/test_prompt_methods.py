"""The benchmark of methods: run whole on a tiny model, and what it makes of known runs."""

import importlib.util
import json
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
def test_a_benchmark_that_is_started_again_repeats_no_run(tmp_path, capsys):
    folder, keep = save_tiny_llama(tmp_path / "model"), tmp_path / "keep"
    words = ["--quick", "--methods", "soft_prompt", "lora", "--regimes", "few", "--draws", "1"]
    words += ["--model_name_or_path", str(folder), "--keep", str(keep)]
    result = bench.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    runs = result["tasks"]["movie_reviews"]
    assert runs.keys() == {"zero", "soft_prompt-few", "lora-few"}
    assert runs["soft_prompt-few"]["trainable_parameters"] == 16 * 32
    assert (keep / "prompt_methods.png").stat().st_size > 10_000
    # LoRA trained the rows that the soft prompt drew: 4 of each class.
    rows = read_jsonl(keep / "movie_reviews-lora-few" / "rows_0" / "train.jsonl")
    assert sorted(row["label"] for row in rows) == ["negative"] * 4 + ["positive"] * 4
    times = {path: path.stat().st_mtime_ns for path in keep.rglob("metrics.json")}
    assert len(times) == 3
    assert bench.main(words) == result
    assert {path: path.stat().st_mtime_ns for path in keep.rglob("metrics.json")} == times
    with pytest.raises(UserError, match="was run with other settings"):
        bench.main([*words, "--rows", "7"])


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
