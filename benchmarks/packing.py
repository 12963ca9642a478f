"""What `--packing true` gains: rows end to end in one line beside rows that are padded, on the CPU
in float32.

    python benchmarks/packing.py                          # about half an hour on two cores
    python benchmarks/packing.py --quick                  # fewer steps, one round: within 6 minutes
    python benchmarks/packing.py --data seeds.jsonl       # Alpaca's or Self-Instruct's columns
    python benchmarks/packing.py --lora

Both train all parameters (or LoRA, rank 16) with `RecipeTrainer` on the same instructions, in the
same steps of the same 8 rows, in turn, each in a process of its own whose first step does not
count. Instructions are of mixed length: many short, few long, so that a batch is mostly padding.
Tokens are those of the rows, without padding. Peak memory is what training takes beyond what the
process held before it loaded the model (`MemoryMeter`), beside the estimate that a
recipe shows before it trains.

The benchmark fails unless both saw equally many tokens and had the same loss in every step: rows
that stand in one line do not see one another. `ratio` is packed over padded in tokens per second.

Without --data the rows are made of drawn words, as long as Self-Instruct's seed tasks (Wang et al.
2023). The last line is one JSON object.
"""

import argparse
import hashlib
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from recipelib.models.loading import describe_model
from recipelib.runtime.console import printable
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import write_json, write_jsonl
from recipelib.runtime.installed import versions

ROWS_PER_STEP = 8
STEPS, QUICK_STEPS, ROUNDS = 20, 6, 2
LOSS_TOLERANCE = 1e-4  # absolute, in every step
ARMS = ("padded", "packed")
WORDS = (
    "the a of to and in is it for on with as that this by from at are be or an which one some many "
    "list write give name find make describe explain short long word number city river friend "
    "teacher story question answer reason example first last good new small different every day "
    "morning water music color animal paper garden winter market letter window mountain"
)


class ArmFailed(Exception):
    """A run ended badly or did other work than the rest; its text is one line."""


def generate_rows(count: int, seed: int = 0) -> list[dict]:
    """Instructions of drawn words, most of them with an input; their lengths are log-normal."""
    draw, words = random.Random(f"packing-{seed}"), WORDS.split()

    def text(median: float, sigma: float, longest: int) -> str:
        length = min(longest, max(1, round(draw.lognormvariate(math.log(median), sigma))))
        return " ".join(draw.choices(words, k=length))

    return [
        {
            "instruction": f"{text(12, 0.5, 100)}.",
            "input": text(20, 1.2, 600) if draw.random() < 0.7 else "",
            "output": f"{text(28, 1.3, 600)}.",
        }
        for _ in range(count)
    ]


# One run, in a process of its own ----------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Train on `args.rows`, and write what was measured to `args.result`."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, set_seed

    from recipelib.encoding.examples import encode_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.models.loading import load_pretrained, load_tokenizer
    from recipelib.prompts.template import PromptTemplate
    from recipelib.runtime.memory import MemoryMeter
    from recipelib.training.config import RecipeConfig
    from recipelib.training.memory import estimate_memory
    from recipelib.training.trainer import RecipeTrainer

    class Stopwatch(TrainerCallback):
        """Takes time and tokens where the first step ends and where the last one does."""

        marks = ()

        def on_step_end(self, training, state, control, **kwargs):
            if state.global_step in (1, state.max_steps):
                mark = (time.perf_counter(), trainer.tokens_seen, trainer.slots_seen)
                self.marks = (*self.marks, mark)

    training = RecipeConfig(
        output_dir=str(args.result.parent / "out"),
        packing=args.measure == "packed",
        per_device_train_batch_size=ROWS_PER_STEP,
        max_steps=args.steps + 1,
        learning_rate=5e-4 if args.lora else 2e-5,
        lr_scheduler_type="constant",
        train_sampling_strategy="random",
        max_length=args.max_length,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(args.model_name_or_path)
    encoder = PromptEncoder(PromptTemplate.load("alpaca"), tokenizer, args.max_length)
    encoded = encode_rows(encoder, rows)
    memory = MemoryMeter()
    model = load_pretrained(args.model_name_or_path, dtype=training.model_dtype[0])
    set_seed(training.seed)
    if args.lora:
        lora = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    watch = Stopwatch()
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(encoded.examples),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    estimated = estimate_memory(model, training, encoded.examples)
    trainer.shard()
    memory.restart()
    trainer.train()
    peak = memory.stop()
    (start, *before), (end, *after) = watch.marks
    tokens, slots = (now - then for now, then in zip(after, before, strict=True))
    lengths = [len(one["input_ids"]) for one in encoded.examples]
    write_json(
        args.result,
        {
            "seconds": end - start,
            "tokens": tokens,
            "slots": slots,
            "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
            "peak_memory_bytes": peak,
            "estimated_memory_bytes": estimated.total,
            "mean_length": sum(lengths) / len(lengths),
            "longest": max(lengths),
        },
    )


def run_arm(arm: str, args: argparse.Namespace, folder: Path) -> dict:
    """What `measure` finds in a process of its own.

    Raises:
        ArmFailed: it ended with another code than 0.
    """
    result = folder / "result.json"
    command = [sys.executable, __file__, "--measure", arm, "--result", str(result)]
    command += ["--rows", str(folder / "rows.jsonl"), "--max_length", str(args.max_length)]
    command += ["--steps", str(args.steps), *(["--lora"] if args.lora else [])]
    if args.model_name_or_path:
        command += ["--model_name_or_path", args.model_name_or_path]
    environment = os.environ | {"OMP_NUM_THREADS": threads(), "CUDA_VISIBLE_DEVICES": ""}
    # An error's own line stands last on stderr, be it the benchmark's or Python's.
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ArmFailed(f"{arm}: ended with exit code {done.returncode}: {said}")
    return json.loads(result.read_text(encoding="utf-8"))


def threads() -> str:
    """OMP_NUM_THREADS, for both: as it is set, else one for each core."""
    return os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())


# The comparison ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict | None:
    """Run both in turn, print the table, and return what the last line holds.

    Raises:
        UserError: arguments or a data file that will not do.
        ArmFailed: a run failed, or the two did not do the same work.
    """
    args = parse(argv)
    if args.measure:
        return measure(args)
    rows = read_rows(args)
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="packing-") as folder:
        file = Path(folder, "rows.jsonl")
        write_jsonl(file, rows)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        for number in range(1, args.rounds + 1):
            for arm in ARMS:
                run = run_arm(arm, args, Path(folder))
                speed = run["tokens"] / run["seconds"]
                print(f"round {number}, {arm}: {speed:.1f} tokens/s", flush=True)
                runs[arm].append(run)
                check_same_work(arm, run, runs["padded"][0])
    result = summarize(runs) | {
        "method": "lora" if args.lora else "full",
        "rows_per_step": ROWS_PER_STEP,
        "steps": args.steps,
        "rounds": args.rounds,
        "rows_from": args.data.name if args.data else "generated",
        "rows_sha256": sha256,
        "model": describe_model(args.model_name_or_path),
        "omp_num_threads": threads(),
        "versions": versions(),
    }
    print_table(result)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `steps` and `rounds` are always set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one round")
    parser.add_argument("--data", type=Path, help="JSON lines: instruction, input, output")
    parser.add_argument("--lora", action="store_true", help="LoRA instead of all parameters")
    parser.add_argument("--steps", type=int, help=f"that count, of {ROWS_PER_STEP} rows [{STEPS}]")
    parser.add_argument("--rounds", type=int, help=f"runs of each [{ROUNDS}]")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row [1024]")
    parser.add_argument("--model_name_or_path", help="folder, .gguf file or hub id [the bundled]")
    parser.add_argument("--measure", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = QUICK_STEPS if args.quick else STEPS
    if args.rounds is None:
        args.rounds = 1 if args.quick else ROUNDS
    for name in ("steps", "rounds", "max_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args


def read_rows(args: argparse.Namespace) -> list[dict]:
    """As many rows as all steps need, the first one included; of a file a random draw.

    Raises:
        UserError: a file that cannot be read, or with too few rows.
    """
    needed = (args.steps + 1) * ROWS_PER_STEP
    if args.data is None:
        return generate_rows(needed)
    from recipelib.data.rows import load_rows
    from recipelib.prompts.template import PromptTemplate

    rows = load_rows(PromptTemplate.load("alpaca"), str(args.data), "train", max_samples=needed)
    if len(rows.rows) < needed:
        raise UserError(
            f"{args.data}: holds {len(rows.rows)} rows; {needed} are needed: lower --steps"
        )
    return [
        {name: row.get(name) for name in ("instruction", "input", "output")} for row in rows.rows
    ]


def check_same_work(arm: str, run: dict, first: dict) -> None:
    """A run against the first padded one.

    Raises:
        ArmFailed: other tokens or steps, or another loss in any step.
    """
    for unit, count, wanted in (
        ("tokens", run["tokens"], first["tokens"]),
        ("steps", len(run["losses"]), len(first["losses"])),
    ):
        if count != wanted:
            raise ArmFailed(f"{arm}: {count} {unit}, but {wanted} when padded: not the same work")
    for step, (found, wanted) in enumerate(zip(run["losses"], first["losses"], strict=True), 1):
        if not abs(found - wanted) <= LOSS_TOLERANCE:
            raise ArmFailed(
                f"{arm}: loss {found:.6f} in step {step}, but {wanted:.6f} when padded: rows are "
                "not kept apart"
            )


def summarize(runs: dict[str, list[dict]]) -> dict:
    """`ratio` and the figures of both, over all rounds."""
    arms = {}
    for arm, several in runs.items():
        tokens, slots = several[0]["tokens"], several[0]["slots"]
        seconds = [run["seconds"] for run in several]
        arms[arm] = {
            "tokens_per_second": tokens * len(several) / sum(seconds),
            "seconds": seconds,
            "tokens": tokens,
            "padding_fraction": 1 - tokens / slots,
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in several),
            "estimated_memory_bytes": several[0]["estimated_memory_bytes"],
        }
    pairs = zip(runs["packed"][0]["losses"], runs["padded"][0]["losses"], strict=True)
    first = runs["padded"][0]
    return {
        "ratio": arms["packed"]["tokens_per_second"] / arms["padded"]["tokens_per_second"],
        "padding_fraction": arms["packed"]["padding_fraction"],
        "max_loss_difference": max(abs(one - other) for one, other in pairs),
        "losses": first["losses"],
        "arms": arms,
        "mean_length": first["mean_length"],
        "longest": first["longest"],
    }


def print_table(result: dict) -> None:
    """The figures of both; plain text outside a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(**({} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}))
    table = Table(
        title=printable(
            f"{result['model']}, {result['method']}, float32, {result['omp_num_threads']} threads, "
            f"{result['steps']} steps of {ROWS_PER_STEP} rows ({result['rows_from']}, "
            f"{result['mean_length']:.0f} tokens, at most {result['longest']})"
        ),
        title_justify="left",
        caption=f"ratio {result['ratio']:.2f}; losses of all {len(result['losses'])} steps differ "
        f"by {result['max_loss_difference']:.1e} at most",
        caption_justify="left",
    )
    table.add_column()
    for name in ("tokens/s", "seconds", "padding", "peak memory", "estimated"):
        table.add_column(name, justify="right")
    for arm, one in result["arms"].items():
        memory = (one[f"{kind}_memory_bytes"] / 2**30 for kind in ("peak", "estimated"))
        table.add_row(
            arm,
            f"{one['tokens_per_second']:.1f}",
            f"{sum(one['seconds']):.1f}",
            f"{one['padding_fraction']:.1%}",
            *(f"{size:.2f} GiB" for size in memory),
        )
    console.print(table)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that trains is ended, too
    try:
        main()
    except (UserError, ArmFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
