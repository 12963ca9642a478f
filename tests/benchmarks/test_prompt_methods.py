"""The benchmark of methods: run whole on a tiny model, and what it makes of known runs."""

import importlib.util
import json
from pathlib import Path

import pytest
from run_files import read_jsonl
from tiny_llama import save_tiny_llama

from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/prompt_methods.py"
SPEC = importlib.util.spec_from_file_location("prompt_methods", ROOT / SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_a_benchmark_that_is_started_again_repeats_no_run(recipes_here, tmp_path, capsys):
    made = recipes_here(bench)
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
    assert len(made) == 3
    assert bench.main(words) == result
    assert len(made) == 3
    with pytest.raises(UserError, match="was run with other settings"):
        bench.main([*words, "--rows", "7"])


def test_a_recipe_runs_in_a_process_of_its_own_and_fails_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "recipes").mkdir()
    script = "import sys\nprint('starting')\nsys.exit(f'error: {sys.argv[1:3]} will not do')"
    (tmp_path / "recipes" / "no_such.py").write_text(script)
    said = r"run: ended with exit code 1: error: \['--max_steps', '3'\] will not do \(--keep DIR"
    with pytest.raises(bench.RunFailed, match=said):
        bench.run_recipe("no_such", {"max_steps": 3}, tmp_path / "run", "movie_reviews")


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
