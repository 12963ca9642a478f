"""How close the estimate of memory per process comes to what training then takes, on CPUs.

    python benchmarks/memory_estimate.py                  # about 15 minutes on two cores
    python benchmarks/memory_estimate.py --quick          # batches of 2 only, about 5 minutes
    python benchmarks/memory_estimate.py --processes 2 --config accelerate_configs/ddp.yaml

Trains LoRA (rank 16) and all parameters for a few steps on rows of random tokens, alone and in two
processes under FSDP2, each in a fresh process. `estimated` is what a recipe shows before training,
`measured` the largest process's peak while it trains (`MemoryMeter`), `resident` the
same with the holes in glibc's heap. The last line is one JSON object; `largest_error` is the
largest difference between estimated and measured, as a part of measured.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, Examples

ANSWER = 50  # supervised tokens of each row


def measure(args: argparse.Namespace) -> None:
    """Train in this process, and print what was estimated and measured as a line of JSON."""
    import torch
    from peft import LoraConfig, get_peft_model

    from recipelib.encoding import EncodedRows
    from recipelib.models import load_pretrained, load_tokenizer
    from recipelib.runtime import MemoryMeter, say
    from recipelib.training import RecipeConfig, RecipeTrainer

    training = RecipeConfig(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch[0],
        max_steps=args.steps,
        activation_checkpointing=args.activation_checkpointing,
        save_strategy="no",
        disable_tqdm=True,
    )
    draw = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(args.model_name_or_path)
    examples = []
    for _ in range(args.batch[0] * training.world_size * args.steps):
        length = args.length - int(torch.randint(args.length // 8 + 1, (1,), generator=draw))
        ids = torch.randint(len(tokenizer), (length,), generator=draw).tolist()
        prompt = max(1, length - ANSWER)
        examples.append((ids, [-100] * prompt + ids[prompt:]))

    task = Examples(EncodedRows.of(examples), tokenizer, memory=MemoryMeter())
    model = load_pretrained(args.model_name_or_path, dtype=training.model_dtype[0])
    if args.methods == ["lora"]:
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    trainer = RecipeTrainer(model, training, task)
    trainer.train()
    figures = trainer.figures()
    found = {
        "estimated": figures.estimated_memory_bytes,
        "measured": figures.peak_memory_bytes,
        "resident": figures.peak_resident_bytes,
        **{name: value for name, value in vars(trainer.estimated).items() if name != "note"},
    }
    say(json.dumps(found))


def run(args: argparse.Namespace, processes: int, method: str, batch: int) -> dict:
    """Measure one case in processes of its own.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = str(one.getsockname()[1])
        command += ["-m", "accelerate.commands.launch", "--config_file", str(args.config)]
        command += ["--num_processes", str(processes), "--main_process_port", port]
    command += [str(Path(__file__)), "--measure", "--methods", method, "--batch", str(batch)]
    command += ["--processes", str(processes), "--length", str(args.length)]
    command += ["--steps", str(args.steps)]
    if args.model_name_or_path:
        command += ["--model_name_or_path", args.model_name_or_path]
    if args.activation_checkpointing:
        command.append("--activation_checkpointing")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--output_dir", folder],
            capture_output=True,
            text=True,
            # On CPUs, whatever the machine has.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    error = found["estimated"] / found["measured"] - 1
    case = {"processes": processes, "method": method, "batch": batch, "error": round(error, 4)}
    return case | found


def main(argv: list[str] | None = None) -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batches of 2 only")
    parser.add_argument("--model_name_or_path", help="the bundled model by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="rows per process")
    parser.add_argument("--length", type=int, default=200, help="tokens of the longest rows")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--activation_checkpointing", action="store_true")
    config = ROOT / "accelerate_configs" / "fsdp2.yaml"
    parser.add_argument("--config", type=Path, default=config, help="for several processes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output_dir", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(args)
        return
    gib = 2**30
    print("| processes | method | rows | estimated | measured | error | resident |", flush=True)
    print("|---|---|---|---|---|---|---|")
    cases = []
    for processes in args.processes:
        for method in args.methods:
            for batch in [2] if args.quick else args.batch:
                one = run(args, processes, method, batch)
                cases.append(one)
                sizes = [f"{one[name] / gib:.2f} GiB" for name in ("estimated", "measured")]
                cells = [str(processes), method, str(batch), *sizes, f"{one['error']:+.1%}"]
                print(f"| {' | '.join(cells)} | {one['resident'] / gib:.2f} GiB |", flush=True)
    print(json.dumps({"largest_error": max(abs(one["error"]) for one in cases), "cases": cases}))


if __name__ == "__main__":
    main()
