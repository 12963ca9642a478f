"""The benchmark of prompt tuning: run whole on a tiny model, its checks on made-up runs."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_llama import save_tiny_llama

from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/soft_prompt_speed.py"
SPEC = importlib.util.spec_from_file_location("prompt_tuning_benchmark", ROOT / SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_a_run_compares_the_same_work_and_ends_with_a_line_of_json(tmp_path, arms_here, capsys):
    arms_here(bench)
    folder = save_tiny_llama(tmp_path / "model")
    bench.main(["--quick", "--steps", "2", "--model_name_or_path", str(folder)])
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert next(iter(result)) == "ratio"
    arms = result["arms"]
    assert result["ratio"] == pytest.approx(
        arms["ours"]["steps_per_second"] / arms["plain"]["steps_per_second"]
    )
    assert result["loss_difference"] < 1e-4
    assert all(one["peak_memory_bytes"] > 0 for one in arms.values())
    assert f"ratio {result['ratio']:.2f}" in shown


RUN = {"seconds": 2.0, "first_loss": 3.5, "peak_memory_bytes": 100, "rows": 32}
RUN |= {"mean_length": 20.0, "vocabulary": 300}


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"first_loss": 3.6}, "loss 3.600000"), ({"rows": 31}, "31 rows, but 32")],
)
def test_other_work_is_refused(changed, said):
    bench.check_same_work("ours", RUN, RUN)
    with pytest.raises(bench.ArmFailed, match=said):
        bench.check_same_work("ours", RUN | changed, RUN)


def test_the_ratio_is_over_all_rounds():
    runs = {"plain": [RUN, RUN | {"seconds": 4.0}], "ours": [RUN | {"peak_memory_bytes": 80}] * 2}
    found = bench.summarize(runs, steps=10)
    assert found["ratio"] == pytest.approx(1.5)
    assert found["memory_ratio"] == pytest.approx(0.8)


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="--rows 7: must be 8 or more"):
        bench.parse(["--rows", "7"])
