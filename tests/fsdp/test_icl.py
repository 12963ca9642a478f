"""Evaluation over two processes finds what one process finds, sharded or not, and never hangs."""

import icl_eval
import in_step
import pytest
from launching import ICL, icl_options, records
from run_files import read_json

from recipelib.cli import parse_arguments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(root):
    for kind in ICL:
        argv = [*icl_options(root, kind, f"alone_{kind}"), "--use_cpu", "true"]
        icl_eval.main(*parse_arguments(icl_eval.IclArguments, "", icl_eval.DEFAULTS, argv))
    (root / "in_step_alone").mkdir()
    for kind in ("llama", "mistral"):
        in_step.main(root / "in_step_alone", "plain", kind)
    return root


@pytest.mark.parametrize("prefix", ["two_icl", "ddp_icl"])
@pytest.mark.parametrize("kind", ICL)
def test_two_processes_predict_what_one_does(root, two, data_parallel, alone, prefix, kind):
    assert two.failed == [], two.errors
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


def test_the_model_is_sharded(two):
    for kind in ICL:
        said = two.said[f"two_icl_{kind}"]
        assert "sharded by FSDP2" in said
        assert "in each of 2 processes" in said


@pytest.mark.parametrize("how", ["plain", "uneven", "little_memory"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_uneven_rows_stops_and_retries_hang_nothing_and_change_nothing(root, two, alone, how, kind):
    assert two.failed == [], two.errors
    expected = read_json(root / "in_step_alone" / f"{kind}-plain-0.json")
    for rank in range(2):
        found = read_json(root / "in_step" / f"{kind}-{how}-{rank}.json")
        for name in ("scores", "one"):
            for one, other in zip(found[name], expected[name], strict=True):
                assert one == pytest.approx(other, abs=1e-3)
        assert found["texts"] == expected["texts"]
        assert found["samples"] == expected["samples"]
    assert len({text for (text,) in expected["texts"]}) > 3
