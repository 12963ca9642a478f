"""The GPU benchmark, on a model so small that a CPU trains it, and the formula behind its MFU."""

import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from recipelib.adapters.bottleneck import BottleneckConfig
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other

import flops  # noqa: E402
import gpu_arm  # noqa: E402
import gpu_throughput  # noqa: E402

TINY = flops.SHAPES["tiny"]
BOTH = gpu_throughput.BOTH


def spec_and_result(spec: dict, folder: Path) -> tuple[str, str]:
    (folder / "spec.json").write_text(json.dumps(spec))
    return str(folder / "spec.json"), str(folder / "result.json")


def trainings_here(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Trainings in this process, which saves the seconds that another one needs to start."""
    import datasets

    def run_arm(spec: dict, deadline: float) -> dict:
        with redirect_stdout(io.StringIO()):  # it goes into a file of the arm's own
            gpu_arm.main(*spec_and_result(spec, folder))
        return json.loads((folder / "result.json").read_text())

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    patch.setattr(gpu_throughput, "run_arm", run_arm)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[list[str], dict]:
    """The table's lines and the JSON of the last one, with an attention that cannot be had."""
    words = ["--tiny", "--quick", "--steps", "2", "--peak_tflops", "0.5"]
    words += ["--attn_implementation", "sdpa", "no_such_attention"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        trainings_here(patch, tmp_path_factory.mktemp("arms"))
        gpu_throughput.main(words)
    lines = shown.getvalue().splitlines()
    return lines[:-1], json.loads(lines[-1])


def trained_tokens() -> int:
    """Without padding, in two steps of eight rows after the five of the warm-up."""
    data = gpu_throughput.make_rows(512, gpu_throughput.TINY_LENGTHS, 7 * 8)
    return sum(len(row["input_ids"]) for row in data[5 * 8 :])


def test_both_sides_train_the_same_tokens_from_the_same_loss(measured):
    ours, theirs = measured[1]["rows"][:2]
    assert (ours["side"], theirs["side"]) == BOTH
    for row in (ours, theirs):
        assert row["status"] == "ok"
        assert row["tokens"] == trained_tokens()
        assert row["peak_memory_bytes"] > 0
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=1e-5)


def test_the_figures_follow_from_one_another(measured):
    rows = measured[1]["rows"][:2]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        used = row["tokens_per_second"] * row["flops_per_token"]
        assert row["mfu"] == pytest.approx(used / 0.5e12)
    assert next(iter(measured[1])) == "ratio"
    quotient = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    assert measured[1]["ratio"] == pytest.approx(quotient)


def test_what_cannot_be_trained_is_a_row_that_says_why(measured):
    failed = measured[1]["rows"][2:]
    assert [row["side"] for row in failed] == list(BOTH)
    for row in failed:
        assert row["attention"] == "no_such_attention"
        assert 'attn_implementation="no_such_attention"' in row["status"]
        assert "tokens_per_second" not in row


def test_the_table_has_a_line_for_each_row(measured):
    table, rows = measured[0], measured[1]["rows"]
    assert table[0].startswith("| model | method |")
    assert len(table) == 2 + len(rows)
    assert f"| tiny | lora | sdpa | base | ours | {rows[0]['tokens_per_second']:,.0f} |" in table[2]
    assert {line.replace("\\|", "").count("|") for line in table} == {table[0].count("|")}
    assert "is not supported" in table[4]


@pytest.fixture
def train_here(monkeypatch, tmp_path):
    """Gives a function that measures in this process."""
    trainings_here(monkeypatch, tmp_path)

    def measure(*arguments: str) -> dict:
        options = ["--tiny", "--steps", "2", "--rounds", "1", *arguments]
        rows = gpu_throughput.measure("tiny", gpu_throughput.parse(options), str(tmp_path))
        return {(row["variant"], row["side"]): row for row in rows}

    return measure


@pytest.mark.slow
def test_every_variant_is_a_row_that_trains_what_it_should(train_here):
    flags = ["--packing", "--fused_loss", "--activation_checkpointing"]
    rows = train_here("--methods", "lora", *flags)
    assert list(rows) == [
        ("base", "ours"),
        ("base", "trl"),
        ("packing", "trl"),
        ("grouped", "ours"),
        ("grouped", "trl"),
        ("fused_loss", "ours"),
        ("liger", "ours"),
        ("liger", "trl"),
        ("activation_checkpointing", "ours"),
        ("activation_checkpointing", "trl"),
    ]
    for side in BOTH:
        assert "liger" in rows.pop(("liger", side))["status"]  # needs a GPU, so not installed here
    assert {row["status"] for row in rows.values()} == {"ok"}
    base = rows["base", "ours"]
    for same in (("fused_loss", "ours"), *(("activation_checkpointing", s) for s in BOTH)):
        assert rows[same]["tokens"] == base["tokens"]
        assert rows[same]["first_loss"] == pytest.approx(base["first_loss"], abs=1e-5)
    ours, theirs = (rows["grouped", side] for side in BOTH)
    assert ours["tokens"] == theirs["tokens"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=1e-5)
    assert rows["packing", "trl"]["tokens"] == pytest.approx(base["tokens"], rel=0.25)


def test_full_tuning_is_equal_on_both_sides_too(train_here):
    rows = train_here("--methods", "full").values()
    assert [row["tokens"] for row in rows] == [trained_tokens()] * 2
    ours, theirs = (row["first_loss"] for row in rows)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_adapters_of_lora_s_size_are_a_row_of_ours(train_here, measured):
    rows = train_here("--methods", "adapter", "--packing")
    assert list(rows) == [("base", "ours"), ("grouped", "ours")]
    lora, row = measured[1]["rows"][0], rows["base", "ours"]
    assert row["tokens"] == lora["tokens"]
    assert row["first_loss"] == pytest.approx(lora["first_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."), "out of memory"),
        (MemoryError(), "out of memory"),
        (UserError("--packing: leave it out"), "--packing: leave it out"),
        (ImportError("not installed\nsee there"), "ImportError: not installed"),
    ],
)
def test_a_failure_becomes_one_line(error, line):
    assert gpu_arm.reason(error) == line


def test_a_training_that_breaks_off_is_a_row_too(monkeypatch, tmp_path):
    script = tmp_path / "gpu_arm.py"
    monkeypatch.setattr(gpu_throughput, "__file__", str(tmp_path / "gpu_throughput.py"))
    spec = {"folder": str(tmp_path)}
    for code, status in [
        ("import os; os.kill(os.getpid(), 9)", "killed by the system, out of memory"),
        ("print('a flag is wrong'); raise SystemExit(2)", "a flag is wrong"),
        ("raise SystemExit(3)", "ended with exit code 3"),
    ]:
        script.write_text(code)
        assert gpu_throughput.run_arm(spec) == {"status": status}


def test_quick_starts_nothing_that_would_end_too_late(tmp_path):
    spec = {"folder": str(tmp_path)}
    late = gpu_throughput.run_arm(spec, time.monotonic())
    assert late == {"status": "left out: the time of --quick is over"}


def test_a_round_that_failed_is_not_averaged_away():
    good = {"status": "ok", "tokens": 10, "seconds": 2.0, "peak_memory_bytes": 5}
    good |= {"first_loss": 6.0, "device": "NVIDIA A100-SXM4-80GB", "bf16": True}
    both = gpu_throughput.combine([good, good | {"seconds": 3.0}], 7.8e9, None)
    assert both["tokens_per_second"] == 4.0
    assert both["mfu"] == pytest.approx(4 * 7.8e9 / 312e12)
    failed = gpu_throughput.combine([good, {"status": "out of memory"}], 7.8e9, None)
    assert failed == {"status": "out of memory"}


def test_without_a_gpu_only_the_tiny_model_is_tried(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_throughput.main(["--quick"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "no GPU here; pass --tiny to try the benchmark on a CPU\n"


# The formula


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
