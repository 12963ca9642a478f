"""The benchmark of training on a GPU, tried on a CPU, and the operations that it counts."""

import io
import json
from contextlib import redirect_stdout

import datasets
import flops
import gpu_arm
import gpu_throughput
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from recipelib.adapters.bottleneck import BottleneckConfig

TINY = flops.SHAPES["tiny"]


def test_both_sides_train_the_same_tokens_from_the_same_loss(monkeypatch, tmp_path, capsys):
    def run_arm(spec: dict, deadline: float) -> dict:
        files = tmp_path / "spec.json", tmp_path / "result.json"
        files[0].write_text(json.dumps(spec))
        with redirect_stdout(io.StringIO()):  # it goes into a file of the arm's own
            gpu_arm.main(*map(str, files))
        return json.loads(files[1].read_text())

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_throughput, "run_arm", run_arm)
    words = ["--tiny", "--rounds", "1", "--steps", "2", "--peak_tflops", "0.5"]
    words += ["--methods", "lora", "adapter", "--attn_implementation", "sdpa"]
    gpu_throughput.main(words)
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert next(iter(result)) == "ratio"
    rows = result["rows"]
    assert [(row["method"], row["side"], row["status"]) for row in rows] == [
        ("lora", "ours", "ok"),
        ("lora", "trl", "ok"),
        ("adapter", "ours", "ok"),
    ]
    data = gpu_throughput.make_rows(512, gpu_throughput.TINY_LENGTHS, 7 * 8)
    tokens = sum(len(row["input_ids"]) for row in data[5 * 8 :])  # after five steps of warm-up
    for row in rows:
        assert row["tokens"] == tokens
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], abs=1e-5)
        used = row["tokens_per_second"] * row["flops_per_token"]
        assert row["mfu"] == pytest.approx(used / 0.5e12)
    ours, theirs = (row["tokens_per_second"] for row in rows[:2])
    assert result["ratio"] == pytest.approx(ours / theirs)
    assert len(table) == 2 + len(rows)
    assert f"| tiny | lora | sdpa | base | ours | {ours:,.0f} |" in table[2]


# The formula ----------------------------------------------------------------------------------


def test_the_flops_of_an_8b_model_are_those_computed_by_hand():
    # A layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336.
    layers, head = 32 * 218_103_808, 128_256 * 4096
    attention = 12 * 32 * 4096 * 1000
    shape = flops.SHAPES["Llama-3.1-8B"]
    full = flops.flops_per_token(shape, rank=None, context=1000, supervised=0.5)
    assert full == 6 * (layers + 0.5 * head) + attention
    # Adapters of rank 16: 16 x (8192 + 2 x 5120 + 8192 + 3 x 18432) a layer.
    adapters = 32 * 16 * 81_920
    first = 4096 * (4096 + 2 * 1024) + 3 * 16 * 4096  # q, k, v and their A
    lora = flops.flops_per_token(shape, rank=16, context=1000, supervised=0.5)
    assert lora == 4 * (layers + 0.5 * head) + 6 * adapters + attention - 2 * first


@pytest.mark.parametrize("name", ["tiny", "Llama-3.1-8B"])
def test_adapters_of_equal_size_have_as_many_parameters_as_lora(name):
    shape = flops.SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
        lora = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        count = lora.get_nb_trainable_parameters()[0]
        size = flops.equal_bottleneck(shape, 16)
        adapters = get_peft_model(lora.unload(), BottleneckConfig(bottleneck_size=size))
    assert adapters.get_nb_trainable_parameters()[0] == pytest.approx(count, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "adapter", "full"])
def test_the_flops_are_those_that_torch_counts(method):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation="eager"))
    if method == "adapter":
        model = get_peft_model(model, BottleneckConfig(bottleneck_size=8))
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    ids = torch.randint(3, TINY["vocab_size"], (4, 48))
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=24, use_cache=False).logits.sum().backward()
    formula = flops.flops_per_token(
        TINY,
        rank=16 if method == "lora" else None,
        bottleneck=8 if method == "adapter" else None,
        context=48,
        supervised=0.5,
    )
    assert counter.get_total_flops() == pytest.approx(ids.numel() * formula, rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_the_shapes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**flops.SHAPES[name]))
    assert model.num_parameters() == parameters


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("CPU", None),
    ],
)
def test_a_peak_is_known_by_the_device_s_name_or_not_at_all(device, peak):
    assert flops.peak_flops(device) == peak
