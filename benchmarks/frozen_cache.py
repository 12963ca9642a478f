"""What computing frozen layers once saves: time, memory and disk of training the last layers of a
model with the cache, without it, and of tuning all parameters; and what features cost beside a
plain forward pass. On the CPU in float32.

    python benchmarks/frozen_cache.py                     # a quarter of an hour on two cores
    python benchmarks/frozen_cache.py --quick             # few rows, one round
    python benchmarks/frozen_cache.py --template sst2 --dataset data/sst2 --rows 400

The same rows in the same order, three passes, in turn, each in a process of its own that has made
a forward pass before. The cache is made anew each time and counts. With it and without it the
losses of every step have to agree, and the first with that of full tuning. Peak memory is what
training takes beyond what the process held before it loaded the model.

Features, in one process and in turn: the pooled states of all layers of the same rows, and their
last states by one plain forward pass in the same batches.

`ratio` is the time without the cache over the time with it, `full_ratio` full tuning's over that,
`later_ratio` the second and third passes' without over with, `memory_ratio` the peak with the cache
over full tuning's, `features_ratio` features over the forward pass. The last line is one JSON
object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from measuring import (
    Examples,
    RunFailed,
    add_task_options,
    in_turn,
    parser_of,
    require_least,
    run_arm,
    run_script,
    set_numbers,
    show_table,
    threads,
)

from recipelib.models import describe_model
from recipelib.runtime import versions, write_json

FULL, QUICK = {"rows": 96, "rounds": 3}, {"rows": 24, "rounds": 1}
PASSES = 3
LOSS_TOLERANCE = 1e-4
ARMS = {"cached": "last {} layers, cached", "uncached": "last {} layers", "full": "all parameters"}
FEATURES = "features"


# In a process of its own -------------------------------------------------------------------------


def load(args: argparse.Namespace):
    """The tokenizer, the encoded rows and the model."""
    import torch

    from recipelib.data import parse_columns
    from recipelib.data.rows import load_rows
    from recipelib.encoding import PromptEncoder, encode_rows
    from recipelib.models import load_pretrained, load_tokenizer
    from recipelib.prompts import PromptTemplate

    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    found = load_rows(template, args.dataset, "train", max_samples=args.rows).rows
    tokenizer = load_tokenizer(args.model_name_or_path)
    encoded = encode_rows(PromptEncoder(template, tokenizer, 512), found)
    return tokenizer, encoded, load_pretrained(args.model_name_or_path, dtype=torch.float32)


def measure(args: argparse.Namespace) -> None:
    """Train, and write what was measured to `args.result`."""
    import torch
    from transformers import TrainerCallback

    from recipelib.activations import FrozenLayers, StateCache
    from recipelib.models import find_layers
    from recipelib.runtime import MemoryMeter
    from recipelib.training import RecipeConfig, RecipeTrainer

    training = RecipeConfig(
        output_dir=str(args.result.parent / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="batch_rebalance",
        num_train_epochs=PASSES,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    memory = MemoryMeter()
    tokenizer, encoded, model = load(args)
    cache = None
    if args.measure != "full":
        model.requires_grad_(False)
        for layer in [*find_layers(model).layers][-args.layers :]:
            layer.requires_grad_(True)
        frozen = FrozenLayers.of(model)
        if args.measure == "cached":
            place = Path(tempfile.mkdtemp(dir=args.result.parent))
            cache = StateCache(frozen, encoded.examples, place, torch.float32)
    with torch.no_grad():
        model(input_ids=torch.tensor([encoded.examples[0]["input_ids"]]))

    class Passes(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012

        def on_epoch_end(self, training, state, control, **kwargs):
            self.ends.append(time.perf_counter())

    task = Examples(encoded, tokenizer, memory=memory)
    trainer = RecipeTrainer(model, training, task, cache=cache, callbacks=[Passes()])
    start = time.perf_counter()
    trainer.train()
    files = [*cache.folder.iterdir()] if cache else []
    write_json(
        args.result,
        {
            "seconds": Passes.ends[-1] - start,
            "later_seconds": Passes.ends[-1] - Passes.ends[0],
            "making_seconds": cache.seconds if cache else 0.0,
            "tokens": trainer.tokens_seen,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "peak_memory_bytes": trainer.figures().peak_memory_bytes,
            "disk_bytes": sum(file.stat().st_size for file in files),
            "disk_tokens": encoded.counts.tokens,
        },
    )


def measure_features(args: argparse.Namespace) -> None:
    """Time features and a plain forward pass in turn, and write the seconds to `args.result`."""
    import torch

    from recipelib.activations import FrozenLayers, pooled_states
    from recipelib.encoding import pad_texts
    from recipelib.inference import CPU_PASS_TOKENS, plan_padded

    tokenizer, encoded, model = load(args)
    model.requires_grad_(False).eval()
    frozen = FrozenLayers.of(model)
    texts, pad = encoded.examples["input_ids"][:], tokenizer.pad_token_id

    def forward() -> None:
        with torch.no_grad():
            for planned in plan_padded([len(text) for text in texts], CPU_PASS_TOKENS):
                batch = pad_texts([texts[member] for member in planned.members], pad)
                model.base_model(**batch, use_cache=False)

    ways = {
        "forward": forward,
        "features": lambda: pooled_states(model, frozen.layers, texts, pad),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):  # the first is the warm-up
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    write_json(args.result, times)


# The comparison ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict | None:
    """Run all in turn, print the tables, and return what the last line holds.

    Raises:
        UserError: arguments that will not do.
        RunFailed: a run failed, or they did not do the same work.
    """
    args = parse(argv)
    if args.measure:
        return (measure_features if args.measure == FEATURES else measure)(args)
    with tempfile.TemporaryDirectory(prefix="frozen-cache-") as folder:
        times = run_arm(__file__, FEATURES, args, Path(folder))
        runs = in_turn(
            [*ARMS],
            args.rounds,
            lambda arm, _: run_arm(__file__, arm, args, Path(folder)),
            lambda run: f"{run['seconds']:.1f} s",
            check_same_work,
        )
    result = summarize(runs, times) | {
        "layers": args.layers,
        "rows": args.rows,
        "passes": PASSES,
        "rounds": args.rounds,
        "template": args.template,
        "model": describe_model(args.model_name_or_path),
        "omp_num_threads": threads(),
        "versions": versions(),
    }
    print_tables(result)
    print(json.dumps(result))
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `rows` and `rounds` are always set."""
    parser = parser_of(__doc__, f"{QUICK['rows']} rows, one round")
    add_task_options(parser)
    parser.set_defaults(rows=None)
    parser.add_argument("--layers", type=int, default=5, help="that are trained, the last [5]")
    parser.add_argument("--rounds", type=int, help=f"runs of each [{FULL['rounds']}]")
    parser.add_argument("--measure", choices=[*ARMS, FEATURES], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    require_least(args, "layers", 1)
    return args


def check_same_work(arm: str, run: dict, first: dict) -> None:
    """A run against the first one, with the cache.

    Raises:
        RunFailed: other tokens; another loss, of full tuning in the first step, else in any.
    """
    if run["tokens"] != first["tokens"]:
        raise RunFailed(f"{arm}: {run['tokens']} tokens, but {first['tokens']} with the cache")
    steps = 1 if arm == "full" else len(first["losses"])
    for step in range(steps):
        found, wanted = run["losses"][step], first["losses"][step]
        if not abs(found - wanted) <= LOSS_TOLERANCE:
            raise RunFailed(
                f"{arm}: loss {found:.6f} in step {step + 1}, but {wanted:.6f} with the cache"
            )


def summarize(runs: dict[str, list[dict]], times: dict) -> dict:
    """The ratios and the figures of all, over all rounds."""
    arms = {
        arm: {
            **{
                name: sum(run[f"{name}"] for run in several) / len(several)
                for name in ("seconds", "later_seconds", "making_seconds")
            },
            "all_seconds": [run["seconds"] for run in several],
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in several),
        }
        for arm, several in runs.items()
    }
    cached, uncached, full = (arms[arm] for arm in ARMS)
    one = runs["cached"][0]
    difference = max(
        abs(with_cache - without)
        for with_cache, without in zip(one["losses"], runs["uncached"][0]["losses"], strict=True)
    )
    return {
        "ratio": uncached["seconds"] / cached["seconds"],
        "full_ratio": full["seconds"] / cached["seconds"],
        "later_ratio": uncached["later_seconds"] / cached["later_seconds"],
        "memory_ratio": cached["peak_memory_bytes"] / full["peak_memory_bytes"],
        "features_ratio": median(times["features"]) / median(times["forward"]),
        "loss_difference": difference,
        "disk_bytes_per_token": one["disk_bytes"] / one["disk_tokens"],
        "arms": arms,
        "features_seconds": {name: median(some) for name, some in times.items()},
    }


def print_tables(result: dict) -> None:
    """The figures of all."""
    base, rows = result["arms"]["uncached"]["seconds"], []
    for arm, one in result["arms"].items():
        rows.append(
            (
                ARMS[arm].format(result["layers"]),
                f"{one['seconds']:.1f} s",
                f"{one['seconds'] / base:.2f}",
                f"{one['making_seconds']:.1f} s",
                f"{one['later_seconds'] / (PASSES - 1):.1f} s",
                f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
            )
        )
    show_table(
        f"{result['model']}, float32, {result['omp_num_threads']} threads, {result['rows']} rows of"
        f" {result['template']}, {PASSES} passes, {result['rounds']} rounds",
        ("trained", "time", "of uncached's", "making it", "a later pass", "peak memory"),
        rows,
        caption=f"{result['disk_bytes_per_token']:,.0f} bytes of disk a token; losses differ by "
        f"{result['loss_difference']:.1e} at most",
    )
    names = {"forward": "a plain forward pass", "features": "features of all layers"}
    show_table(
        "Features, median",
        ("what is computed", "time", "of the forward pass"),
        [
            (names[name], f"{seconds:.1f} s", f"{seconds / times['forward']:.2f}")
            for times in [result["features_seconds"]]
            for name, seconds in times.items()
        ],
    )


if __name__ == "__main__":
    run_script(main)
