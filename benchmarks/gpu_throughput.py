"""Training throughput on a GPU: our trainer beside TRL's own script, without any download.

    python benchmarks/gpu_throughput.py --quick
    python benchmarks/gpu_throughput.py --packing --attn_implementation sdpa flash_attention_2
    python benchmarks/gpu_throughput.py --tiny          # a CPU will do; says nothing about speed

The models have random weights in the shapes of `flops.SHAPES`, the rows 512 to 2048 random tokens
(seeded, lengths uniform), of which the second half is supervised. Both sides train the same rows
in the same order with the same settings: LoRA (r=16 on all linear layers, dropout 0) or full
tuning, sdpa, nothing recomputed, weights and arithmetic in bfloat16 where the GPU computes it
fast. Bottleneck adapters with as many parameters as LoRA are a row of ours only.

Each training has a process of its own, in turn ours and TRL's; one that fails (out of memory, a
library that is missing) is a row that says so. Time runs after a warm-up; `--rounds` trainings
are added up.

TRL's side is `trl/scripts/sft.py`, unchanged, run with `runpy`; the stopwatch gets in through
transformers' list of default callbacks. Its model lies in a temporary folder (TMPDIR) as long as
it is measured: 2 bytes a parameter, 16 GB for Llama-3.1-8B.

Reported are tokens without padding per second; MFU, the share of the device's dense bfloat16 peak
(`flops.PEAKS`, or `--peak_tflops`; blank where not known) that the training's necessary operations
come to: tokens per second x FLOPs per token / peak, where forward and backward pass of a token take

    full: 6 (N + s V) + 12 layers hidden l
    LoRA: 4 (N + s V) + 6 A + 12 layers hidden l - 2 (first layer's q, k and v)
    adapter: as LoRA, but for the first layer's attention, which has no backward pass

with N weights in the layers, V in the head, s the supervised share, A adapter weights, l the row's
length (`flops.flops_per_token` says why); the peak memory; and the loss of the first step.

Variants, each a flag and rows of its own, for each attention implementation:

- packing: TRL packs rows into sequences of the greatest length, about as many tokens a step. Ours
  refuses that; `grouped`, on both sides, is what it has instead: the same rows in micro-batches of
  similar length (batch_rebalance).
- compile: torch.compile.
- fused_loss: TRL's only loss is fused with the head, so its base row has it already, and ours gets
  it here instead of its own. Liger's fused loss is refused by TRL; `liger` has its other kernels.
- activation_checkpointing.

The last line is JSON; `ratio` is our tokens per second over TRL's, first model, LoRA, no variant.
"""

import argparse
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flops import SHAPES, equal_bottleneck, flops_per_token, peak_flops

WARMUP = 5  # steps; compiling for changing lengths takes the first three
LENGTHS = (512, 2048)
TINY_LENGTHS = (16, 64)
MICRO_BATCHES = 4  # of the grouped variant
SEED = 42
RANK = 16
QUICK_SECONDS = 350  # what is not measured by then is a row that says so

METHODS = ["lora", "adapter", "full"]
MODELS = [name for name in SHAPES if name != "tiny"]
BOTH = ("ours", "trl")
# flag: rows (name, sides, changes to the training arguments)
VARIANTS = {
    "packing": [
        ("packing", ("trl",), {"packing": True}),
        ("grouped", BOTH, {"train_sampling_strategy": "batch_rebalance"}),
    ],
    "compile": [("compile", BOTH, {"torch_compile": True})],
    "fused_loss": [("fused_loss", ("ours",), {}), ("liger", BOTH, {"use_liger_kernel": True})],
    "activation_checkpointing": [
        ("activation_checkpointing", BOTH, {"activation_checkpointing": True})
    ],
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; --quick and --tiny are worked in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, short rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--attn_implementation", nargs="+", default=["sdpa"])
    for flag in VARIANTS:
        parser.add_argument(f"--{flag}", action="store_true", help="see above")
    parser.add_argument("--batch_size", type=_count, default=8, help="rows a step")
    parser.add_argument("--steps", type=_count, default=20, help="measured steps a training")
    parser.add_argument("--rounds", type=_count, default=2, help="trainings of each kind")
    parser.add_argument("--peak_tflops", type=float, help="the device's dense bfloat16 peak")
    parser.add_argument(
        "--quick", action="store_true", help="first model, LoRA, 10 steps, one round, six minutes"
    )
    args = parser.parse_args(arguments)
    if args.tiny:
        args.models = ["tiny"]
    args.deadline = math.inf
    if args.quick:
        args.deadline = time.monotonic() + QUICK_SECONDS
        args.models, args.methods = args.models[:1], ["lora"]
        args.steps, args.rounds = min(args.steps, 10), 1
    return args


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def make_rows(vocabulary: int, lengths: tuple[int, int], count: int) -> list[dict]:
    """Rows of random tokens, of which the second half is supervised, as `lora_sft.py` has them."""
    draw = random.Random(SEED)
    rows = []
    for _ in range(count):
        ids = draw.choices(range(3, vocabulary), k=draw.randint(*lengths))  # below 3: control
        half = len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return rows


def training_arguments(args: argparse.Namespace, rows: list[dict], changes: dict) -> dict:
    """What both sides' trainers are told, by the names of `SFTConfig`."""
    longest = max(len(row["input_ids"]) for row in rows)
    size, parts = args.batch_size, 1
    if "packing" in changes:
        tokens = sum(len(row["input_ids"]) for row in rows)
        size = max(1, round(size * tokens / len(rows) / longest))
    if "train_sampling_strategy" in changes:
        parts = math.gcd(size, MICRO_BATCHES)
    return {
        "max_steps": WARMUP + args.steps,
        "per_device_train_batch_size": size // parts,
        "gradient_accumulation_steps": parts,
        "max_length": longest,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "logging_first_step": True,
        "logging_steps": WARMUP + args.steps + 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | changes


def run_arm(spec: dict, deadline: float = math.inf) -> dict:
    """What `gpu_arm.py` reports of one training, or how its process ended without a word."""
    spec_file, result_file, log_file = (
        Path(spec["folder"], name) for name in ("spec.json", "result.json", "log.txt")
    )
    spec_file.write_text(json.dumps(spec))
    result_file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        # TRL refuses several GPUs in one process.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": f"{spec['folder']}/cache",
        # Not the user's, where a training that was killed would leave half a library.
        "TORCHINDUCTOR_CACHE_DIR": f"{spec['folder']}/compiled",
    }
    script = Path(__file__).with_name("gpu_arm.py")
    command = [sys.executable, str(script), str(spec_file), str(result_file)]
    left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
    with log_file.open("w") as log:
        try:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=left)
        except subprocess.TimeoutExpired:
            return {"status": "left out: the time of --quick is over"}
    if result_file.exists():
        return json.loads(result_file.read_text())
    if done.returncode == -signal.SIGKILL:
        return {"status": "killed by the system, out of memory"}
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return {"status": lines[-1] if lines else f"ended with exit code {done.returncode}"}


def measure(name: str, args: argparse.Namespace, folder: str) -> list[dict]:
    """The table's rows for one model: each method, attention implementation and variant, both
    sides. Every row is printed as soon as it is known.
    """
    shape = SHAPES[name]
    lengths = TINY_LENGTHS if name == "tiny" else LENGTHS
    data = make_rows(shape["vocab_size"], lengths, (WARMUP + args.steps) * args.batch_size)
    Path(folder, "data").mkdir()
    Path(folder, "data", "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in data))
    prepare = {"side": "prepare", "shape": shape, "folder": folder}
    saved = run_arm(prepare, args.deadline)["status"]

    variants = [("base", BOTH, {})]
    variants += [one for flag, found in VARIANTS.items() if getattr(args, flag) for one in found]
    rows = []
    for method, attention, (variant, sides, changes) in itertools.product(
        args.methods, args.attn_implementation, variants
    ):
        spec = {
            "shape": shape,
            "folder": folder,
            "rank": RANK if method == "lora" else None,
            "bottleneck": equal_bottleneck(shape, RANK) if method == "adapter" else None,
            "attention": attention,
            "fused_loss": variant == "fused_loss",
            "training": training_arguments(args, data, changes),
            "warmup": WARMUP,
            "steps": args.steps,
        }
        if method == "adapter":  # TRL's script has none
            sides = [side for side in sides if side == "ours"]
        results = {side: [] for side in sides}
        for side in sides * args.rounds:
            if side == "trl" and saved != "ok":
                result = {"status": f"its model could not be saved: {saved}"}
            elif any(one["status"] != "ok" for one in results[side]):
                continue  # it would fail again
            else:
                result = run_arm({**spec, "side": side}, args.deadline)
            results[side].append(result)
        for side in sides:
            row = {"model": name, "method": method, "attention": attention, "variant": variant}
            row["side"] = side
            row |= combine(results[side], flops(spec, data), args.peak_tflops)
            rows.append(row)
            print(table_line(row), flush=True)
    return rows


def flops(spec: dict, data: list[dict]) -> float:
    """FLOPs per token of what a spec trains, averaged over the rows."""
    lengths = [len(row["input_ids"]) for row in data]
    supervised = sum(label != -100 for row in data for label in row["labels"])
    return flops_per_token(
        spec["shape"],
        rank=spec["rank"],
        bottleneck=spec["bottleneck"],
        context=sum(length**2 for length in lengths) / sum(lengths),
        supervised=supervised / sum(lengths),
    )


def combine(results: list[dict], flops_per_token: float, peak_tflops: float | None) -> dict:
    """The figures of several rounds of the same training; the first failure stands for all."""
    failed = [one for one in results if one["status"] != "ok"]
    if failed:
        return {"status": failed[0]["status"]}
    tokens, seconds = (sum(one[key] for one in results) for key in ("tokens", "seconds"))
    peak = peak_flops(results[0]["device"]) if results[0]["bf16"] else None
    if peak_tflops:
        peak = peak_tflops * 1e12
    return {
        "status": "ok",
        "tokens_per_second": tokens / seconds,
        "mfu": tokens / seconds * flops_per_token / peak if peak else None,
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in results),
        "first_loss": results[0]["first_loss"],
        "tokens": tokens,
        "seconds": seconds,
        "rounds": [one["tokens"] / one["seconds"] for one in results],
        "flops_per_token": flops_per_token,
        "device": results[0]["device"],
        "bf16": results[0]["bf16"],
    }


HEADER = """\
| model | method | attention | variant | side | tokens/s | MFU | peak memory | first loss |
|---|---|---|---|---|---:|---:|---:|---:|"""


def table_line(row: dict) -> str:
    """A row of the Markdown table."""
    cells = [row[key] for key in ("model", "method", "attention", "variant", "side")]
    if row["status"] != "ok":
        cells += [row["status"].replace("|", "\\|"), "", "", ""]
    else:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
        cells += [f"{row['tokens_per_second']:,.0f}", mfu, memory, f"{row['first_loss']:.4f}"]
    return f"| {' | '.join(cells)} |"


def ratio(rows: list[dict], model: str, attention: str) -> float | None:
    """Our tokens per second over TRL's with LoRA and no variant; None where one side has none."""
    wanted = {"model": model, "method": "lora", "attention": attention, "variant": "base"}
    speed = {
        row["side"]: row["tokens_per_second"]
        for row in rows
        if row["status"] == "ok" and wanted.items() <= row.items()
    }
    return speed["ours"] / speed["trl"] if len(speed) == 2 else None


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for and print the table and the JSON line."""
    args = parse(arguments)
    if not args.tiny:
        import torch

        if not torch.cuda.is_available():
            print("no GPU here; pass --tiny to try the benchmark on a CPU", file=sys.stderr)
            raise SystemExit(2)
    print(HEADER, flush=True)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, args, folder)
    speedup = ratio(rows, args.models[0], args.attn_implementation[0])
    print(json.dumps({"ratio": speedup, "rows": rows}))


if __name__ == "__main__":
    main()
