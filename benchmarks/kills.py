"""Kills runs at random instants, restarts them, and compares what they end with to a run that
nobody disturbed.

    python benchmarks/kills.py                            # 30 kills of each kind: some hours
    python benchmarks/kills.py --quick                    # two of each kind
    python benchmarks/kills.py --kinds one sharded --kills 5 --seed 1

A tiny model of random weights is trained by a recipe that evaluates and saves on the way. SIGKILL
comes at an instant drawn from the whole time that an undisturbed run takes, in turn to all
processes and to the launcher alone, as for want of memory. The same command line follows, with
`--resume_from_checkpoint auto`, and has to finish.

- one: one process, LoRA; the weights have to be equal bit for bit.
- full, sharded: FSDP2 over two processes with full and with sharded checkpoints, LoRA; within 1e-6.
- pipeline: two stages of `gpipe_sft.py`, all parameters; within 1e-6.

The table counts the kills by what the run had come to, as its folder shows. The benchmark fails
where a run does not finish or ends with other weights. The last line is one JSON object.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from measuring import (
    ROOT,
    RunFailed,
    failure,
    parser_of,
    run_script,
    set_numbers,
    show_table,
    words,
)

from recipelib.runtime import is_whole, versions, write_jsonl

# Kind -> the recipe, the accelerate config of its two processes, how far weights may be apart.
KINDS = {
    "one": ("lora_sft", None, 0.0),
    "full": ("lora_sft", "fsdp2", 1e-6),
    "sharded": ("lora_sft", "fsdp2_sharded", 1e-6),
    "pipeline": ("gpipe_sft", "pipeline", 1e-6),
}
STAGES = ("starting", "preparing", "training", "saving", "ending")
OPTIONS = {
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "disable_tqdm": True,
    "resume_from_checkpoint": "auto",
}


class Run:
    """A run in a folder of its own, with a cache of its own, so that it prepares its rows too."""

    def __init__(self, kind: str, options: Mapping[str, Any], folder: Path):
        self.kind, self.folder, self._cache = kind, folder / "run", folder / "cache"
        self._log = folder / "log.txt"
        folder.mkdir(parents=True)
        self._options = {**options, "output_dir": self.folder}

    def command(self) -> list[str]:
        """What starts or goes on with it."""
        recipe, config, _ = KINDS[self.kind]
        launch = [sys.executable]
        if config:
            with socket.socket() as one:
                one.bind(("127.0.0.1", 0))
                port = one.getsockname()[1]
            file = ROOT / "accelerate_configs" / f"{config}.yaml"
            given = {"config_file": file, "num_processes": 2, "main_process_port": port}
            launch += ["-m", "accelerate.commands.launch", *words(given)]
        return [*launch, str(ROOT / "recipes" / f"{recipe}.py"), *words(self._options)]

    def start(self) -> subprocess.Popen:
        """Launch it, in a session of its own."""
        with self._log.open("a") as log:
            return subprocess.Popen(
                self.command(),
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
                | {"HF_DATASETS_CACHE": str(self._cache)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> float:
        """Launch it and wait; the seconds that it took.

        Raises:
            RunFailed: it ended with another code than 0.
        """
        start = time.monotonic()
        process = self.start()
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # this benchmark was ended
                os.killpg(process.pid, signal.SIGKILL)
        if code:
            raise failure(self.kind, code, self._log.read_text(errors="replace"))
        return time.monotonic() - start

    def kill(self, after: float, everything: bool) -> str | None:
        """Launch it and kill it; what it had come to, None where it had ended."""
        process = self.start()
        try:
            process.wait(after)
            return None
        except subprocess.TimeoutExpired:
            stage = self.stage()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL) if everything else process.kill()
        process.wait()
        return stage

    def stage(self) -> str:
        """What the run has come to, as its folder shows."""
        checkpoints = [*self.folder.glob("checkpoint-*")]
        if [*self.folder.glob("*.safetensors")]:
            return "ending"
        if any(not is_whole(folder) for folder in checkpoints):
            return "saving"
        if checkpoints:
            return "training"
        return "preparing" if self.folder.exists() else "starting"

    def weights(self) -> dict:
        """What was trained, by name."""
        from safetensors.torch import load_file

        return {
            name: weight
            for file in self.folder.glob("*.safetensors")
            for name, weight in load_file(file).items()
        }


def make_inputs(folder: Path) -> dict[str, Path]:
    """A tiny model and rows, as the options that name them."""
    import torch
    from tiny_architectures import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ends)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"sentence": f"{'so ' * (number % 5)}{word} film, number {number}", "label": label}
        for number in range(24)
        for word, label in (("good", "positive"), ("bad", "negative"))
    ]
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "train.jsonl", rows)
    write_jsonl(folder / "rows" / "validation.jsonl", rows[:6])
    return {"model_name_or_path": folder / "model", "dataset": folder / "rows"}


def difference(run: Run, undisturbed: Run) -> float:
    """The largest between any two weights.

    Raises:
        RunFailed: one has other weights than the other.
    """
    ours, theirs = run.weights(), undisturbed.weights()
    if not theirs or ours.keys() != theirs.keys():
        raise RunFailed(f"{run.kind}: {len(ours)} weights were saved, not {len(theirs)}")
    return max((ours[name] - weight).abs().max().item() for name, weight in theirs.items())


def measure(kind: str, args, inputs: Mapping[str, Path], folder: Path) -> dict:
    """Kill and restart runs of a kind.

    Raises:
        RunFailed: one did not finish, or ended with other weights.
    """
    options, draw = {**OPTIONS, **inputs, "max_steps": args.steps}, random.Random(args.seed)
    undisturbed = Run(kind, options, folder / f"{kind}-undisturbed")
    took, stages, largest = undisturbed.finish(), Counter(), 0.0
    print(f"{kind}: undisturbed {took:.0f} s", flush=True)
    attempts = count()
    while stages.total() < args.kills:
        run, after = Run(kind, options, folder / f"{kind}-{next(attempts)}"), draw.uniform(0, took)
        stage = run.kill(after, everything=stages.total() % 2 == 0)
        if stage is None:  # it was faster than the first, whose files were not in memory yet
            took = after
            continue
        run.finish()
        apart = difference(run, undisturbed)
        print(f"{kind}: killed after {after:.1f} s, {stage}: {apart:.2g}", flush=True)
        if apart > KINDS[kind][2]:
            raise RunFailed(f"{kind}: killed while {stage}, ended with weights {apart:.2g} apart")
        stages[stage] += 1
        largest = max(largest, apart)
    return {"seconds": took, "stages": dict(stages), "largest_difference": largest}


def main(argv: list[str] | None = None) -> None:
    """Kill and restart runs, and print a table."""
    parser = parser_of(__doc__, "two kills of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="[all]")
    parser.add_argument("--kills", type=int, help="of each kind [30]")
    parser.add_argument("--steps", type=int, help="of a run [120]")
    parser.add_argument("--seed", type=int, default=0, help="of the instants [0]")
    args = parser.parse_args(argv)
    set_numbers(args, {"kills": 30, "steps": 120}, {"kills": 2, "steps": 40})
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        inputs = make_inputs(Path(place))
        if args.model_name_or_path:
            inputs["model_name_or_path"] = args.model_name_or_path
        found = {kind: measure(kind, args, inputs, Path(place)) for kind in args.kinds}
    show_table(
        f"{args.kills} kills of each kind: what they hit, and what was lost",
        ["kind", *STAGES, "weights apart by at most"],
        [
            [
                kind,
                *(str(one["stages"].get(stage, 0)) for stage in STAGES),
                f"{one['largest_difference']:.2g}",
            ]
            for kind, one in found.items()
        ],
    )
    print(json.dumps({"kills": args.kills, "kinds": found, "versions": versions()}))


if __name__ == "__main__":
    run_script(main)
