"""Evaluation over two processes finds what one process finds, sharded or not, and never hangs."""

import icl_eval
import in_step
import pytest
from launching import records
from run_files import read_json, read_jsonl

from recipelib.cli import arguments

pytestmark = pytest.mark.slow


KINDS = ["labels", "nearest", "written"]


@pytest.fixture(scope="module")
def alone(root, evaluation):
    """The same in one process."""
    for kind in [*KINDS, "turns"]:
        given = evaluation(kind, f"alone_{kind}")
        icl_eval.main(*arguments(icl_eval, **given, use_cpu=True))
    folder = root / "in_step_alone"
    folder.mkdir()
    for kind in in_step.KINDS:
        in_step.main(folder, "plain", kind)
    return root


@pytest.mark.parametrize("prefix", ["machines", "ddp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_predict_what_one_does(root, machines, data_parallel, alone, prefix, kind):
    found, expected = records(root / f"{prefix}_{kind}"), records(root / f"alone_{kind}")
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("row", "draw", "prompt", "answer", "prediction", "score"):
            assert one[name] == other[name]
        if kind == "written":
            assert one["generated"] == other["generated"]
            continue
        for way, scores in other["scores"].items():
            assert one["scores"][way] == pytest.approx(scores, abs=1e-5), way
    metrics, single = (
        read_json(root / name / "metrics.json") for name in (f"{prefix}_{kind}", f"alone_{kind}")
    )
    assert metrics["world_size"] == 2
    assert metrics["score"] == single["score"]
    assert metrics["eval_rows"] == 7


@pytest.mark.parametrize("prefix", ["machines", "ddp"])
def test_two_processes_write_the_turns_that_one_does(root, machines, data_parallel, alone, prefix):
    found, expected = (
        read_jsonl(root / f"{name}_turns" / "predictions_turns.jsonl") for name in (prefix, "alone")
    )
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        assert (one["prompt"], one["generated"]) == (other["prompt"], other["generated"])


@pytest.mark.parametrize("how", in_step.HOW)
@pytest.mark.parametrize("kind", in_step.KINDS)
def test_uneven_rows_stops_and_retries_hang_nothing_and_change_nothing(
    root, machines, alone, how, kind
):
    expected = read_json(root / "in_step_alone" / f"{kind}-plain-0.json")
    for rank in range(2):
        found = read_json(root / "in_step" / f"{kind}-{how}-{rank}.json")
        for name in ("scores", "one"):
            for one, other in zip(found[name], expected[name], strict=True):
                assert one == pytest.approx(other, abs=1e-3)
        assert found["texts"] == expected["texts"]
        assert found["samples"] == expected["samples"]
    assert len({text for (text,) in expected["texts"]}) > 3
