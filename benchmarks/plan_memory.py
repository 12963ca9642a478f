"""How close the memory that `recipes/plan.py` states comes to what runs then take, on CPUs.

    python benchmarks/plan_memory.py                # a quarter of an hour on two cores
    python benchmarks/plan_memory.py --quick        # LoRA only
    python benchmarks/plan_memory.py --arms lora_ddp full_fsdp2

Runs recipes for two steps in float32, alone and in two processes, on rows that all have the same
length, so that a plan knows the shapes. `planned` is the plan's memory of a GPU, `measured` the
`peak_memory_bytes` of metrics.json: the largest process's, while it trains. The last line is one
JSON object; `largest_error` is the largest difference, as a part of measured.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from measuring import launch_recipe, parser_of, require_least, run_script, show_table

from recipelib.runtime import versions, write_jsonl

STEPS = 2  # the optimizer's states exist in the second
MICRO_BATCHES = 4  # of a step, in all processes together


class Arm(NamedTuple):
    """A run.

    Attributes:
        recipe: that makes it.
        method, layout: the plan that it is held against.
        config: the accelerate config of its two processes; None: one process.
        options: further ones of the recipe.
    """

    recipe: str
    method: str
    layout: str
    config: str | None = None
    options: Mapping[str, str] = MappingProxyType({})


LORA, FULL = "LoRA", "all parameters"
TEXT = {"rendering": "text"}  # as the other recipes do, so that the rows are as long
ARMS = {
    "lora": Arm("lora_sft", LORA, "one GPU"),
    "lora_ddp": Arm("lora_sft", LORA, "DDP", "ddp"),
    "lora_fsdp2": Arm("lora_sft", LORA, "FSDP2", "fsdp2"),
    "lora_pipeline": Arm("gpipe_sft", LORA, "pipeline 2", "pipeline", {"peft": "lora"}),
    "full": Arm("instruction_sft", FULL, "one GPU", options=TEXT),
    "full_ddp": Arm("instruction_sft", FULL, "DDP", "ddp", TEXT),
    "full_fsdp2": Arm("instruction_sft", FULL, "FSDP2", "fsdp2", TEXT),
    "full_pipeline": Arm("gpipe_sft", FULL, "pipeline 2", "pipeline"),
}


def main(argv: list[str] | None = None) -> dict:
    """Run all arms and print the table.

    Returns:
        What the last line holds.
    """
    parser = parser_of(__doc__, "LoRA only")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], help="[all]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row [256]")
    parser.add_argument("--micro_batch", type=int, default=2, help="rows of a forward pass [2]")
    args = parser.parse_args(argv)
    for name in ("length", "micro_batch"):
        require_least(args, name, 1)
    quick = [name for name, arm in ARMS.items() if arm.method == LORA]
    cases = []
    for name in args.arms or (quick if args.quick else ARMS):
        with tempfile.TemporaryDirectory(prefix="plan-memory-") as folder:
            metrics = run(ARMS[name], args, Path(folder))
        case = {"arm": name, "planned": planned(ARMS[name], args, metrics)}
        case["measured"] = metrics["peak_memory_bytes"]
        case["ratio"] = round(case["planned"] / case["measured"], 4)
        print(f"{name}: {case['ratio']:.3f} of what was measured", flush=True)
        cases.append(case)
    result = {
        "largest_error": max(abs(case["ratio"] - 1) for case in cases),
        "cases": cases,
        "length": args.length,
        "micro_batch": args.micro_batch,
        "model": metrics["model"],
        "versions": versions(),
    }
    show_table(
        f"{result['model']}, float32, {args.micro_batch} rows of {args.length} tokens at a time",
        ("trained", "in each process", "planned, GiB", "measured, GiB", "ratio"),
        [
            (
                ARMS[case["arm"]].method,
                ARMS[case["arm"]].layout,
                *(f"{case[one] / 2**30:.2f}" for one in ("planned", "measured")),
                f"{case['ratio']:.2f}",
            )
            for case in cases
        ],
        names=2,
    )
    print(json.dumps(result))
    return result


def run(arm: Arm, args: argparse.Namespace, folder: Path) -> dict:
    """The metrics of a recipe's run, made in processes of its own.

    Args:
        folder: for its rows.
    Raises:
        RunFailed: it ended with another code than 0.
    """
    draw, vocabulary = random.Random(0), "a film was the long story that they never saw in town"
    for split, rows in (("train", STEPS * MICRO_BATCHES * args.micro_batch), ("validation", 2)):
        # More words than tokens are wanted: the recipe cuts each text to fill a row.
        texts = [" ".join(draw.choices(vocabulary.split(), k=args.length)) for _ in range(rows)]
        reviews = [
            {"sentence": text, "label": ("negative", "positive")[number % 2]}
            for number, text in enumerate(texts)
        ]
        write_jsonl(folder / f"{split}.jsonl", reviews)
    processes = 2 if arm.config else 1
    options = {
        "dataset": folder,
        "template": "movie_reviews",
        "model_name_or_path": args.model_name_or_path,
        "max_length": args.length,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": MICRO_BATCHES // processes,
        "max_steps": STEPS,
        "dataset_cache": False,
        "save_strategy": "no",
        "use_cpu": True,
        **arm.options,
    }
    if arm.recipe == "gpipe_sft":
        options |= {"gradient_accumulation_steps": 1, "micro_batches": MICRO_BATCHES}
    if arm.recipe == "instruction_sft":
        options["template"] = f"movie_reviews={options.pop('dataset')}"
    return launch_recipe(arm.recipe, options, arm.config, processes)


def planned(arm: Arm, args: argparse.Namespace, metrics: dict) -> int:
    """The bytes that a GPU would need by the plan, for a run's shapes in float32."""
    from recipelib.planning import GPUS, Workload, compare_strategies, read_config

    tokens = metrics["train_examples"] * args.length
    work = Workload(
        gpus=2 if arm.config else 1,
        batch=MICRO_BATCHES * args.micro_batch,
        micro_batch=args.micro_batch,
        length=args.length,
        supervised=metrics["supervised_tokens"] / tokens,
        dtype="float32",
        schedule="gpipe",
    )
    plans = compare_strategies(read_config(args.model_name_or_path), work, GPUS["h100"])
    (plan,) = (one for one in plans if (one.method, one.layout) == (arm.method, arm.layout))
    return plan.memory.total


if __name__ == "__main__":
    run_script(main)
