"""Evaluation over two processes finds what one process finds, sharded or not, and never hangs."""

import icl_eval
import in_step
import pytest
from launching import CONFIGS, ROOT, records
from run_files import read_json

from common.arguments import parse_arguments

pytestmark = pytest.mark.slow

STEP = str(ROOT / "tests" / "fsdp" / "in_step.py")
EVAL = str(ROOT / "recipes" / "icl_eval.py")


def options(root, name: str, **more) -> list[str]:
    defaults = {
        "model_name_or_path": root / "model",
        "dataset": root / "reviews",
        "output_dir": root / name,
        "max_length": 128,
        "shots": 2,
        "draws": 2,
        "eval_batch_tokens": 150,
    }
    return [str(part) for key, value in (defaults | more).items() for part in (f"--{key}", value)]


RUNS = {
    "labels": {},
    "nearest": {"sampler": "nearest", "nearest_by": "embedding", "draws": 1},
    "written": {"template": "gsm8k", "shots": 1, "max_new_tokens": 6, "samples": 2},
}


def run_options(root, kind: str, name: str) -> list[str]:
    more = dict(RUNS[kind])
    if kind == "written":
        more |= {"dataset": root / "sums", "max_length": 256}
    return options(root, name, **more)


@pytest.fixture(scope="module")
def launched(root, launch):
    (root / "in_step").mkdir()
    found = {}
    for config in ("fsdp2.yaml", "ddp.yaml"):
        runs = {
            f"{config}_{kind}": [EVAL, *run_options(root, kind, f"{config}_{kind}")]
            for kind in RUNS
        }
        if config == "fsdp2.yaml":
            for how in ("plain", "uneven", "little_memory"):
                for kind in ("llama", "mistral"):
                    runs[f"{how}_{kind}"] = [STEP, str(root / "in_step"), how, kind]
        found[config] = launch(CONFIGS / config, 2, runs)
        assert found[config].failed == [], (
            f"{config}: {list(found[config].said)[-1:]}: {found[config].errors[-9000:]}"
        )
    return found


@pytest.fixture(scope="module")
def alone(root):
    for kind in RUNS:
        argv = [*run_options(root, kind, f"alone_{kind}"), "--use_cpu", "true"]
        icl_eval.main(*parse_arguments(icl_eval.IclArguments, "", icl_eval.DEFAULTS, argv))
    (root / "in_step_alone").mkdir()
    for kind in ("llama", "mistral"):
        in_step.main(root / "in_step_alone", "plain", kind)
    return root


@pytest.mark.parametrize("config", ["fsdp2.yaml", "ddp.yaml"])
@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_predict_what_one_does(root, launched, alone, config, kind):
    found, expected = records(root / f"{config}_{kind}"), records(root / f"alone_{kind}")
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
        read_json(root / name / "metrics.json") for name in (f"{config}_{kind}", f"alone_{kind}")
    )
    assert metrics["world_size"] == 2
    assert metrics["score"] == single["score"]
    assert metrics["eval_rows"] == 7


def test_the_model_is_sharded(launched):
    for kind in RUNS:
        said = launched["fsdp2.yaml"].said[f"fsdp2.yaml_{kind}"]
        assert "sharded by FSDP2" in said
        assert "in each of 2 processes" in said


@pytest.mark.parametrize("how", ["plain", "uneven", "little_memory"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_uneven_rows_stops_and_retries_hang_nothing_and_change_nothing(
    root, launched, alone, how, kind
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
