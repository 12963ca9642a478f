"""A pipeline of two stages beside one process and beside FSDP2: memory of a process, time, and how
long processes wait for one another, on CPUs.

    python benchmarks/pipeline.py                         # about half an hour on two cores
    python benchmarks/pipeline.py --quick                 # one round, fewer micro-batches
    python benchmarks/pipeline.py --parts bubble --figure bubble.png

Each run is of a recipe in fresh processes, which share the cores, on rows that have one length.

- memory: all parameters, `peak_memory_bytes` of the largest process over that of one process, for
  the model and for one whose head is not tied to the embeddings, which else stand at both ends.
- bubble: `idle_fraction` of metrics.json, the share of the steps in which a process does not
  compute, beside (stages - 1) / (micro_batches + stages - 1), for LoRA.
- speed: tokens a second and memory beside FSDP2 with the same rows in each step.

Runs of a part take turns: those of memory once, the others in rounds, of which the least disturbed
counts. The last line is one JSON object; `ratio` is the pipeline's tokens a second over FSDP2's.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from measuring import (
    RunFailed,
    in_turn,
    launch_recipe,
    make_folder,
    parser_of,
    require_least,
    run_script,
    set_numbers,
    show_table,
)

from recipelib.runtime import UserError, versions, write_jsonl

PARTS = ("memory", "bubble", "speed")
ROWS = 8  # of a step
WORDS = ["a", "film", "was", "the", "long", "story", "that", "they", "never", "saw"]
ONE_ROW = {"micro_batches": ROWS, "per_device_train_batch_size": 1}
# Name -> processes, and the options of recipes/gpipe_sft.py.
MEMORY = {
    "one process": (1, {}),
    "one process, recomputing": (1, {"activation_checkpointing": True}),
    "gpipe": (2, {}),
    "gpipe, recomputing": (2, {"activation_checkpointing": True}),
    "1f1b": (2, {"schedule": "1f1b"}),
}
FULL = {"rounds": 2, "steps": 4}
QUICK = {"rounds": 1, "steps": 2}


def main(argv: list[str] | None = None) -> dict:
    """Make the runs, print the tables, draw the figure, and return what the last line holds.

    Raises:
        UserError: a number that makes no sense, or a figure that cannot be drawn.
        RunFailed: a recipe failed, or trained on other tokens than the rest.
    """
    parser = parser_of(__doc__, "one round, 1, 4 and 16 micro-batches")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--length", type=int, default=128, help="tokens of a row [128]")
    parser.add_argument("--rounds", type=int, help="of the runs that take turns [2]")
    parser.add_argument("--steps", type=int, help="of each run [4]")
    parser.add_argument("--figure", type=Path, help="where to draw the bubble")
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    require_least(args, "length", 16)
    if args.figure:
        if "bubble" not in args.parts:
            raise UserError("--figure: shows the bubble; add bubble to --parts")
        make_folder("--figure", args.figure.parent)
    with tempfile.TemporaryDirectory(prefix="pipeline-") as temporary:
        folder = Path(temporary)
        write_rows(folder / "data", args)
        measure = {"memory": memory, "bubble": bubbles, "speed": speed}
        found = {part: measure[part](args, folder) for part in args.parts}
    ratio = {"ratio": found["speed"]["ratio"]} if "speed" in found else {}
    settings = {name: getattr(args, name) for name in ("length", "rounds", "steps")}
    result = {**ratio, **found, **settings, "versions": versions()}
    if args.figure:
        draw(found["bubble"], args.figure)
    print(json.dumps(result))
    return result


def write_rows(folder: Path, args: argparse.Namespace) -> None:
    """Rows of more words than tokens are wanted: each is cut to the same length."""
    draw = random.Random(0)
    for split, count in (("train", 2 * ROWS * args.steps), ("validation", 2)):
        rows = [
            {
                "sentence": " ".join(draw.choices(WORDS, k=args.length)),
                "label": ("negative", "positive")[number % 2],
            }
            for number in range(count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)


def run(
    recipe: str, args: argparse.Namespace, folder: Path, processes: int, config: str, **options
) -> dict:
    """The metrics of a recipe's run."""
    data = folder / "data"
    several = recipe == "instruction_sft"  # which takes tasks with their data
    return launch_recipe(
        recipe,
        {
            "rendering": "text",
            "template": f"movie_reviews={data}" if several else "movie_reviews",
            "dataset": None if several else data,
            "model_name_or_path": args.model_name_or_path,
            "max_length": args.length,
            "max_steps": args.steps,
            "save_strategy": "no",
            **options,
        },
        config if processes > 1 else None,
        processes,
    )


def pipeline(args: argparse.Namespace, folder: Path, processes: int = 2, **options) -> dict:
    """The metrics of a run of recipes/gpipe_sft.py."""
    return run("gpipe_sft", args, folder, processes, "pipeline", **options)


# Memory ------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace, folder: Path) -> dict:
    """The peak of each way, in bytes, by whether the head is tied."""
    found = {}
    for name, model in heads(args, folder / "untied").items():

        def one(way: str, _: int, model=model) -> dict:
            processes, options = MEMORY[way]
            options = {**ONE_ROW, **options, "model_name_or_path": model}
            return pipeline(args, folder, processes, **options)

        runs = in_turn(
            [*MEMORY],
            1,
            one,
            lambda metrics: f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB",
            same_tokens,
        )
        found[name] = {way: metrics["peak_memory_bytes"] for way, (metrics,) in runs.items()}
        alone, again = (size for way, size in found[name].items() if way.startswith("one"))
        show_table(
            f"All parameters, head {name}, {ROWS} micro-batches of one row of {args.length} tokens",
            ("", "peak of a process", "of one process's, likewise"),
            [
                (
                    way,
                    f"{size / 2**30:.2f} GiB",
                    f"{size / (again if 'recomputing' in way else alone):.2f}",
                )
                for way, size in found[name].items()
            ],
        )
    return found


def heads(args: argparse.Namespace, folder: Path) -> dict[str, Path | str | None]:
    """The model, and if its head is tied to the embeddings also one with a head of its own, which
    starts as the embeddings; by whether they are tied.

    Args:
        folder: for the second.
    """
    from torch import nn

    from recipelib.models import load_pretrained, load_tokenizer

    model = load_pretrained(args.model_name_or_path, dtype="float32")
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        return {"untied": args.model_name_or_path}
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    load_tokenizer(args.model_name_or_path).save_pretrained(folder)
    return {"tied": args.model_name_or_path, "untied": folder}


# The bubble --------------------------------------------------------------------------------------


def bubbles(args: argparse.Namespace, folder: Path) -> dict:
    """Of each number of micro-batches the share of time in which a process waits, in theory and
    measured.
    """
    counts = [1, 4, 16] if args.quick else [1, 2, 4, 8, 16]

    def one(arm: str, _: int) -> dict:
        parts = int(arm)
        # As many rows in each step.
        rows = {"micro_batches": parts, "per_device_train_batch_size": 16 // parts}
        return pipeline(args, folder, peft="lora", **rows)

    runs = in_turn(
        [str(count) for count in counts],
        args.rounds,
        one,
        lambda metrics: f"{metrics['idle_fraction']:.3f} of the time idle",
        same_tokens,
    )
    found = {
        arm: {
            "theory": metrics[0]["bubble"],
            "measured": min(each["idle_fraction"] for each in metrics),
            "seconds": min(each["train_seconds"] for each in metrics),
        }
        for arm, metrics in runs.items()
    }
    show_table(
        f"Two stages, LoRA, 16 rows of {args.length} tokens in each step",
        ("micro-batches", "bubble in theory", "measured idle", "time"),
        [
            (arm, f"{one['theory']:.3f}", f"{one['measured']:.3f}", f"{one['seconds']:.1f} s")
            for arm, one in found.items()
        ],
    )
    return found


def same_tokens(arm: str, metrics: dict, first: dict) -> None:
    """Raise unless a run trained on as many tokens as the first."""
    if metrics["train_tokens"] != first["train_tokens"]:
        raise RunFailed(f"{arm}: was trained on other tokens than the first run")


def draw(found: dict, path: Path) -> None:
    """The measured share beside the one in theory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.5, 3.8))
    counts = [int(count) for count in found]
    for kind, color, style, title in (
        ("theory", "#7f7f7f", "--", "(stages − 1) / (micro-batches + stages − 1)"),
        ("measured", "#1f6f8b", "o-", "measured"),
    ):
        values = [one[kind] for one in found.values()]
        panel.plot(counts, values, style, color=color, label=title, markersize=5)
    for count, one in zip(counts, found.values(), strict=True):
        panel.annotate(
            f"{one['measured']:.0%}",
            (count, one["measured"]),
            xytext=(5, 6),
            textcoords="offset points",
            color="#1f6f8b",
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.set_ylim(0, None)
    panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    panel.set_xlabel("micro-batches of a step")
    panel.set_ylabel("share of a step spent waiting")
    panel.grid(axis="y", color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    panel.set_title("Two stages: the bubble", loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# Beside FSDP2 ------------------------------------------------------------------------------------


def speed(args: argparse.Namespace, folder: Path) -> dict:
    """Tokens a second and memory of both, all parameters trained."""

    def one(arm: str, _: int) -> dict:
        if arm == "pipeline":
            return pipeline(args, folder, **ONE_ROW, schedule="1f1b")
        rows = {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 1}
        return run("instruction_sft", args, folder, 2, "fsdp2", **rows)

    runs = in_turn(
        ["pipeline", "FSDP2"],
        args.rounds,
        one,
        lambda metrics: f"{metrics['tokens_per_second']:.0f} tokens/s",
        same_tokens,
    )
    found = {
        arm: {
            "tokens_per_second": max(each["tokens_per_second"] for each in metrics),
            "peak_memory_bytes": max(each["peak_memory_bytes"] for each in metrics),
        }
        for arm, metrics in runs.items()
    }
    show_table(
        f"All parameters over two processes, {ROWS} rows of {args.length} tokens in each step",
        ("", "tokens a second", "peak of a process"),
        [
            (
                arm,
                f"{one['tokens_per_second']:.0f}",
                f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
            )
            for arm, one in found.items()
        ],
    )
    rates = [found[arm]["tokens_per_second"] for arm in ("pipeline", "FSDP2")]
    return {"ratio": rates[0] / rates[1], **found}


if __name__ == "__main__":
    run_script(main)
