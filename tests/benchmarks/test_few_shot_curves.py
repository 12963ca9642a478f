"""The curves over shots: with a stand-in for the recipe, and once with the recipe itself."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_llama import save_tiny_llama

from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/few_shot_curves.py"
SPEC = importlib.util.spec_from_file_location("few_shot_curves", ROOT / SCRIPT)
curves = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(curves)

# Writes what the benchmark reads of the recipe's metrics.json; its scores tell the runs apart.
STAND_IN = """
import argparse
import json
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
for name in "template dataset shots draws max_eval_samples output_dir resume use_cpu".split():
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--model_name_or_path")
parser.add_argument("--columns", nargs="+")
args = parser.parse_args()
here, folder = Path(__file__).parent, Path(args.output_dir)
with (here / "asked.jsonl").open("a") as file:
    file.write(json.dumps(vars(args)) + "\\n")
print("at work")
if args.shots == "4" and (here / "broken").exists():
    print("error: no memory is left", file=sys.stderr)
    sys.exit(2)
shots, draws = int(args.shots), int(args.draws)
scores = [0.5 + shots / 100 + draw / 10 for draw in range(draws if shots else 1)]
metrics = {
    "scores": {
        "sum": {"draws": scores},
        "calibrated": {"draws": [score + 0.1 for score in scores]},
    },
    "stderr": 0.034,
    "classes": {"a": {"rows": 3.0 * len(scores)}, "b": {"rows": 1.0 * len(scores)}},
    "eval_rows": int(args.max_eval_samples),
    "eval_rows_left_out": 0,
    "demonstrations_dropped": 0,
    "eval_seconds": 1.5,
    "peak_memory_bytes": 2,
}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """The stand-in, in a folder of its own."""
    path = tmp_path / "recipe" / "stand_in.py"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    monkeypatch.setattr(curves, "RECIPE", path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Files in which nobody looks for rows."""
    for name in ("sst2/train", "sst2/validation", "trec/train", "trec/test"):
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "data"


def asked(recipe: Path) -> list[dict]:
    """What the stand-in was called with."""
    lines = (recipe.parent / "asked.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_each_task_is_run_with_each_number_of_shots_on_the_same_rows(recipe, data, tmp_path):
    keep = tmp_path / "keep"
    tasks = ["--data", str(data), "--tasks", "sst2", "trec", "--keep", str(keep)]
    curves.main([*tasks, "--shots", "4", "0", "--draws", "3", "--rows", "7"])
    runs = asked(recipe)
    assert [(one["template"], one["shots"]) for one in runs] == [
        ("sst2", "0"),
        ("sst2", "4"),
        ("trec", "0"),
        ("trec", "4"),
    ]
    for one in runs:
        assert one["dataset"] == str(data / one["template"])
        assert one["output_dir"] == str(keep / f"{one['template']}-{one['shots']}")
        assert (one["draws"], one["max_eval_samples"], one["resume"]) == ("3", "7", "True")
    columns = [one["columns"] for one in runs]
    assert columns == [None, None, *[["text=question", "label=label"]] * 2]


def test_the_last_line_holds_all_figures_and_the_table_shows_them(recipe, data, tmp_path, capsys):
    figure = tmp_path / "figures" / "shots.png"
    arguments = ["--data", str(data), "--tasks", "sst2", "--shots", "0", "4", "--quick"]
    result = curves.main([*arguments, "--figure", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    run = result["tasks"]["sst2"]["4"]
    assert run["uncalibrated"] == pytest.approx([0.54, 0.64])
    assert run["calibrated"] == pytest.approx([0.64, 0.74])
    assert (run["most_frequent_class"], run["rows"]) == (0.75, 40)
    assert (result["rows"], result["draws"]) == (40, 2)
    assert result["sha256"]["sst2"] == {
        f"{split}.jsonl": hashlib.sha256(f"sst2/{split}".encode()).hexdigest()
        for split in ("train", "validation")
    }
    assert result["versions"]["python"]
    cells = [re.split(r" *│ *", line.strip("│ ")) for line in lines if line.startswith("│")]
    assert cells == [
        ["SST-2, 40 rows", "0", "0.500", "0.600", "± 0.034", "0.750"],
        ["4", "0.590 ± 0.071", "0.690 ± 0.071", "± 0.034", "0.750"],
    ]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_benchmark_goes_on_where_it_stopped(recipe, data, tmp_path):
    keep = tmp_path / "keep"
    arguments = ["--data", str(data), "--tasks", "sst2", "--keep", str(keep)]
    (recipe.parent / "broken").touch()
    with pytest.raises(curves.RunFailed) as error:
        curves.main(arguments)
    said = "SST-2, 4 shots: ended with exit code 2: error: no memory is left (--keep DIR keeps"
    assert str(error.value).startswith(said)
    assert "at work" in (keep / "sst2-4" / "log.txt").read_text()
    (recipe.parent / "broken").unlink()
    result = curves.main(arguments)
    assert [one["shots"] for one in asked(recipe)] == ["0", "1", "4", "4", "16"]
    assert list(result["tasks"]["sst2"]) == ["0", "1", "4", "16"]
    assert (keep / "few_shot_curves.png").exists()
    curves.main(arguments)
    assert len(asked(recipe)) == 5


@pytest.mark.parametrize(
    ("change", "key"),
    [(["--rows", "8"], "rows"), (["--draws", "4"], "draws"), ([], "sha256")],
)
def test_kept_runs_with_other_settings_are_refused(change, key, recipe, data, tmp_path):
    arguments = ["--data", str(data), "--tasks", "sst2", "--shots", "0", "--keep", str(tmp_path)]
    curves.main([*arguments, "--rows", "7", "--draws", "3"])
    if key == "sha256":
        (data / "sst2" / "train.jsonl").write_text("other rows")
    with pytest.raises(UserError, match=rf"sst2-0 was run with other settings \({key}, "):
        curves.main([*arguments, "--rows", "7", "--draws", "3", *change])
    assert len(asked(recipe)) == 1


def test_without_data_the_bundled_reviews_are_asked(recipe):
    result = curves.main(["--shots", "0"])
    assert list(result["tasks"]) == ["movie_reviews"]
    assert (result["rows"], result["draws"]) == (curves.ROWS, curves.DRAWS)
    folder = Path(asked(recipe)[0]["dataset"])
    assert (folder / "validation.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shots", "2", "-1"], "--shots -1: must be 0 or more"),
        (["--draws", "0"], "--draws 0: must be 1 or more"),
        (["--rows", "0"], "--rows 0: must be 1 or more"),
        (["--tasks", "movie_reviews", "rte"], "--tasks rte: needs --data"),
        (
            ["--data", "none"],
            "none/sst2/train.jsonl: No such file or directory; python "
            "benchmarks/prepare_data.py sst2 --output none/sst2",
        ),
        (["--keep", "README.md/a"], "--keep README.md/a: Not a directory; pass another place"),
        (["--figure", "README.md/a.png"], "--figure README.md: File exists"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        curves.main(arguments)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_benchmark_that_is_ended_leaves_nothing_running(tmp_path):
    folder = save_tiny_llama(tmp_path)
    words = [sys.executable, SCRIPT, "--model_name_or_path", folder, "--shots", "0"]
    benchmark = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 60
    try:
        while not children:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            children = psutil.Process(benchmark.pid).children()
        benchmark.terminate()
        assert benchmark.wait(30) == 143
        assert psutil.wait_procs(children, 30)[1] == []
    finally:
        benchmark.kill()


def test_the_recipe_itself_gives_the_figures(recipes_here, tmp_path):
    recipes_here(curves)
    folder, keep = save_tiny_llama(tmp_path / "model"), tmp_path / "keep"
    words = ["--model_name_or_path", folder, "--keep", keep, "--rows", "6", "--draws", "2"]
    result = curves.main([*map(str, words), "--shots", "0", "2"])
    for shots, draws in (("0", 1), ("2", 2)):
        run = result["tasks"]["movie_reviews"][shots]
        metrics = json.loads((keep / f"movie_reviews-{shots}" / "metrics.json").read_text())
        assert (metrics["shots"], metrics["draws"], run["rows"]) == (int(shots), draws, 6)
        assert run["uncalibrated"] == metrics["draw_scores"]
        assert len(run["calibrated"]) == draws
        assert 0.5 <= run["most_frequent_class"] <= 1
    assert (keep / "few_shot_curves.png").read_bytes().startswith(b"\x89PNG")
