"""The benchmark beside TRL's script."""

import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import lora_sft
import pytest
import sft_throughput
from run_files import read_json

from recipelib.cli import parse_arguments


def run_here(command: list[str], log: Path, cache: Path, arm: str) -> int:
    """In place of `run_process`, in this process."""
    with log.open("w") as file, redirect_stdout(file), pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        if arm == sft_throughput.OURS:
            kind = lora_sft.LoraArguments
            lora_sft.main(*parse_arguments(kind, "", lora_sft.DEFAULTS, command[2:]))
        else:
            patch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1], run_name="__main__")
    return 2**30


def test_all_arms_train_the_same_work_from_the_same_loss(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_throughput, "run_process", run_here)
    monkeypatch.setattr(sft_throughput, "resolve_apart", str)
    result, shown = start(sft_throughput, "--quick", "--steps", 2, "--keep", tmp_path)
    assert next(iter(result)) == "ratio"
    speeds = {arm: one["tokens_per_second"] for arm, one in result["arms"].items()}
    ours = speeds.pop("ours")
    assert result["ratio_without_dropout"] == pytest.approx(
        ours / speeds.pop(sft_throughput.TRL_BARE)
    )
    assert result["faster_trl"] == max(speeds, key=speeds.get)
    assert result["ratio"] == pytest.approx(ours / max(speeds.values()))
    assert len({one["tokens"] for one in result["arms"].values()}) == 1
    assert result["first_loss_difference"] < 1e-4
    targets = []
    for arm in sft_throughput.ARMS:
        config = read_json(tmp_path / f"{arm}_1".replace(" ", "_") / "adapter_config.json")
        assert (config["r"], config["lora_alpha"]) == (16, 32)
        bare = arm in (sft_throughput.OURS, sft_throughput.TRL_BARE)
        assert config["lora_dropout"] == (0.0 if bare else 0.05)
        targets.append(sorted(config["target_modules"]))
    assert all(target == targets[0] for target in targets)
    assert "loss of every step" in shown
