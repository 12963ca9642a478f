"""The benchmark of adapters' scores: its runs made here on a tiny model, its figure on made-up
ones.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_llama import save_tiny_llama

from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "adapter_methods", ROOT / "benchmarks" / "adapter_methods.py"
)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_every_method_is_run_once_and_kept(recipes_here, tmp_path, capsys):
    made, folder = recipes_here(bench, "--max_steps", "1"), save_tiny_llama(tmp_path / "model")
    words = ["--quick", "--model_name_or_path", str(folder), "--keep", str(tmp_path / "kept")]
    result = bench.main(words)
    methods = result["tasks"]["movie_reviews"]["methods"]
    assert [one.name for one in made] == [f"movie_reviews-{method}-42" for method in bench.METHODS]
    counts = {method: one["trainable_parameters"] for method, one in methods.items()}
    assert counts["adapter_8"] < counts["adapter_64"] < counts["adapter_256"]
    assert counts["full"] == result["tasks"]["movie_reviews"]["total_parameters"]
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) == result
    assert "adapters, m = 256" in shown
    assert (tmp_path / "kept" / "adapter_methods.png").stat().st_size > 0
    assert not list((tmp_path / "kept").glob("*full*/model*.safetensors"))
    assert bench.main(words) == result
    assert len(made) == len(bench.METHODS)
    with pytest.raises(UserError, match=r"run with other settings \(see movie_reviews.json\)"):
        bench.main([*words, "--train_rows", "8"])


@pytest.mark.parametrize("other", ["train_tokens", "eval_rows"])
def test_other_rows_are_refused_and_each_seed_has_its_own(other, monkeypatch, tmp_path):
    def run(task, method, seed, *_):
        counts = dict.fromkeys(("trainable_parameters", "total_parameters"), 7)
        counts |= {"train_tokens": seed, "eval_rows": 7}
        counts |= {other: different.pop()} if seed == 44 else {}
        return {"score": 0.5, "train_seconds": 1, "base_score": 0.4, **counts}

    monkeypatch.setattr(bench, "run_recipe", run)
    args = bench.parse(["--quick", "--seeds", "2"])
    found = bench.run_task("movie_reviews", args, tmp_path)
    assert found["methods"]["lora"]["scores"] == [0.5, 0.5]
    different = [90, 100]
    args = bench.parse(["--quick", "--seeds", "3"])
    with pytest.raises(
        bench.RunFailed, match="adapter_64, seed 44: was trained or scored on other"
    ):
        bench.run_task("movie_reviews", args, tmp_path)


def test_a_run_that_fails_is_one_line(monkeypatch, tmp_path):
    def run(command, stdout, **options):
        stdout.write(b"a bar\nerror: no such model\n")
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
    with pytest.raises(bench.RunFailed, match="ended with exit code 2: error: no such model"):
        bench.main(["--quick", "--keep", str(tmp_path)])


COUNTS = (622_080, 4_462_080, 17_602_560, 4_497_216, 4_884_480, 134_515_008)


def test_the_table_and_the_figure_of_two_tasks(tmp_path, capsys):
    def found(*means):
        methods = {
            method: {
                "scores": [middle - 0.01, middle + 0.01],
                "trainable_parameters": count,
                "train_seconds": 1.0,
            }
            for method, middle, count in zip(bench.METHODS, means, COUNTS, strict=True)
        }
        return {
            "rows": 872,
            "base_score": 0.6,
            "total_parameters": 134_515_008,
            "methods": methods,
        }

    result = {
        "tasks": {
            "sst2": found(0.88, 0.9, 0.91, 0.89, 0.9, 0.91),
            "trec": found(0.7, 0.9, 0.9, 0.88, 0.9, 0.95),
        },
        "seeds": 2,
        "train_rows": 800,
        "model": "a model",
    }
    bench.print_table(result)
    shown = capsys.readouterr().out
    assert "0.880 ± 0.014" in shown
    assert "3.3%" in shown
    bench.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "sst2"], "--tasks sst2: needs --data"),
        (["--seeds", "0"], "--seeds 0: must be 1 or more"),
        (["--rows", "-1"], "--rows -1: must be 1 or more"),
        (["--train_rows", "0"], "--train_rows 0: must be 1 or more"),
    ],
)
def test_arguments_that_will_not_do(words, said):
    with pytest.raises(UserError, match=said):
        bench.parse(words)


def test_data_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"prepare_data.py sst2 --output"):
        bench.main(["--data", str(tmp_path), "--tasks", "sst2"])
