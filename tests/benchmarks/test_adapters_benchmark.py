"""The benchmark of adapters: run whole on a tiny model, its checks on made-up runs."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama

from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/adapter_speed.py"
SPEC = importlib.util.spec_from_file_location("adapters_benchmark", ROOT / SCRIPT)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_a_run_compares_the_same_work_and_ends_with_a_line_of_json(tmp_path, arms_here, capsys):
    arms_here(bench)
    words = ["--quick", "--steps", "2", "--bottleneck_size", "8"]
    bench.main([*words, "--model_name_or_path", str(save_tiny_llama(tmp_path))])
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert list(result)[:2] == ["ratio", "top_ratio"]
    arms = result["arms"]
    speed = {arm: one["tokens_per_second"] for arm, one in arms.items()}
    assert result["ratio"] == pytest.approx(speed["adapter"] / speed["lora"])
    count = {arm: one["trainable_parameters"] for arm, one in arms.items()}
    assert count["top"] == count["adapter"] / 2  # one of two layers
    assert abs(count["lora"] / count["adapter"] - 1) < 0.25
    assert count["full"] > 5 * count["adapter"]
    losses = [one["first_loss"] for one in arms.values()]
    assert max(losses) - min(losses) < 1e-4
    assert set(result["latency_seconds"]) == set(bench.LATENCY)
    assert all(min(one.values()) > 0 for one in result["latency_seconds"].values())
    assert "LoRA of equal size" in shown
    assert "lowest third dropped" in shown


def test_an_arm_that_fails_is_one_line(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], 2, "", "a bar\nerror: no such model\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **options: ended)
    with pytest.raises(bench.ArmFailed, match=r"^adapter: .* code 2: error: no such"):
        bench.run_arm("adapter", bench.parse(["--quick"]), tmp_path)


def test_the_rank_of_equal_size():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=100,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert bench.equal_rank(model, 64) == 15  # 4.58 against 4.46 million


RUN = {"seconds": 2.0, "tokens": 100, "first_loss": 3.5, "peak_memory_bytes": 100}
RUN |= {"trainable_parameters": 7}


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"first_loss": 3.6}, "loss 3.600000"), ({"tokens": 99}, "99 tokens, but 100")],
)
def test_other_work_is_refused(changed, said):
    bench.check_same_work("lora", RUN, RUN)
    with pytest.raises(bench.ArmFailed, match=said):
        bench.check_same_work("lora", RUN | changed, RUN)


def test_the_ratios_are_over_all_rounds():
    slow = RUN | {"seconds": 4.0}
    runs = {"adapter": [RUN, slow], "lora": [slow, slow], "top": [RUN, RUN], "full": [slow, slow]}
    found = bench.summarize(runs, {"base": {"score": [1.0, 2.0, 9.0], "write": [1.0]}})
    assert found["ratio"] == pytest.approx(8 / 6)
    assert found["top_ratio"] == pytest.approx(1.5)
    assert found["latency_seconds"]["base"]["score"] == 2.0


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="--rows 7: must be 8 or more"):
        bench.parse(["--rows", "7"])
