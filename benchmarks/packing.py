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
import json
import math
import random
import tempfile
from pathlib import Path

from measuring import (
    Examples,
    RunFailed,
    add_arm_options,
    in_turn,
    parser_of,
    require_least,
    run_arm,
    run_script,
    set_numbers,
    sha256_of,
    show_table,
    stopwatch,
    threads,
)

from recipelib.models import describe_model
from recipelib.runtime import UserError, versions, write_json, write_jsonl

ROWS_PER_STEP = 8
FULL, QUICK = {"steps": 20, "rounds": 2}, {"steps": 6, "rounds": 1}
LOSS_TOLERANCE = 1e-4  # absolute, in every step
ARMS = ("padded", "packed")
WORDS = (
    "the a of to and in is it for on with as that this by from at are be or an which one some many "
    "list write give name find make describe explain short long word number city river friend "
    "teacher story question answer reason example first last good new small different every day "
    "morning water music color animal paper garden winter market letter window mountain"
)


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
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from recipelib.encoding import PromptEncoder, encode_rows
    from recipelib.models import load_pretrained, load_tokenizer
    from recipelib.prompts import PromptTemplate
    from recipelib.runtime import MemoryMeter
    from recipelib.training import RecipeConfig, RecipeTrainer

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
    task = Examples(encode_rows(encoder, rows), tokenizer, memory=MemoryMeter())
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
    watch = stopwatch(warm_up=1)
    watch.trainer = trainer = RecipeTrainer(model, training, task, callbacks=[watch])
    trainer.train()
    figures = trainer.figures()
    lengths = [len(one["input_ids"]) for one in task.encoded.examples]
    write_json(
        args.result,
        {
            **watch.measured(),
            "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
            "peak_memory_bytes": figures.peak_memory_bytes,
            "estimated_memory_bytes": figures.estimated_memory_bytes,
            "mean_length": sum(lengths) / len(lengths),
            "longest": max(lengths),
        },
    )


# The comparison ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict | None:
    """Run both in turn, print the table, and return what the last line holds.

    Raises:
        UserError: arguments or a data file that will not do.
        RunFailed: a run failed, or the two did not do the same work.
    """
    args = parse(argv)
    if args.measure:
        return measure(args)
    rows = read_rows(args)
    with tempfile.TemporaryDirectory(prefix="packing-") as folder:
        file = Path(folder, "rows.jsonl")
        write_jsonl(file, rows)
        sha256 = sha256_of(file)[file.name]
        runs = in_turn(
            ARMS,
            args.rounds,
            lambda arm, _: run_arm(__file__, arm, args, Path(folder), rows=file),
            lambda run: f"{run['tokens'] / run['seconds']:.1f} tokens/s",
            check_same_work,
        )
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
    parser = parser_of(__doc__, f"{QUICK['steps']} steps, one round")
    parser.add_argument("--data", type=Path, help="JSON lines: instruction, input, output")
    parser.add_argument("--lora", action="store_true", help="LoRA instead of all parameters")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row [1024]")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    add_arm_options(parser, ARMS, FULL)
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    require_least(args, "max_length", 1)
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
    from recipelib.prompts import PromptTemplate

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
        RunFailed: other tokens or steps, or another loss in any step.
    """
    for unit, count, wanted in (
        ("tokens", run["tokens"], first["tokens"]),
        ("steps", len(run["losses"]), len(first["losses"])),
    ):
        if count != wanted:
            raise RunFailed(f"{arm}: {count} {unit}, but {wanted} when padded: not the same work")
    for step, (found, wanted) in enumerate(zip(run["losses"], first["losses"], strict=True), 1):
        if not abs(found - wanted) <= LOSS_TOLERANCE:
            raise RunFailed(
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
    """The figures of both."""
    rows = []
    for arm, one in result["arms"].items():
        memory = (one[f"{kind}_memory_bytes"] / 2**30 for kind in ("peak", "estimated"))
        rows.append(
            (
                arm,
                f"{one['tokens_per_second']:.1f}",
                f"{sum(one['seconds']):.1f}",
                f"{one['padding_fraction']:.1%}",
                *(f"{size:.2f} GiB" for size in memory),
            )
        )
    show_table(
        f"{result['model']}, {result['method']}, float32, {result['omp_num_threads']} threads, "
        f"{result['steps']} steps of {ROWS_PER_STEP} rows ({result['rows_from']}, "
        f"{result['mean_length']:.0f} tokens, at most {result['longest']})",
        ("", "tokens/s", "seconds", "padding", "peak memory", "estimated"),
        rows,
        caption=f"ratio {result['ratio']:.2f}; losses of all {len(result['losses'])} steps differ "
        f"by {result['max_loss_difference']:.1e} at most",
    )


if __name__ == "__main__":
    run_script(main)
