"""What bottleneck adapters cost beside LoRA of equal size and full tuning: speed and memory of
training, and latency of what was trained, on the CPU in float32.

    python benchmarks/adapter_speed.py                    # a quarter of an hour on two cores
    python benchmarks/adapter_speed.py --quick            # a few steps, one round
    python benchmarks/adapter_speed.py --template sst2 --dataset data/sst2

Training: adapters after both sublayers of all layers; LoRA on all linear layers, of the rank whose
number of parameters is nearest; adapters in the top third of the layers; all parameters. The same
8 rows in every step, in turn, each in a process of its own whose first steps do not count. All
start at exactly the base model, so the losses of step 1 have to agree. Peak memory is what training
takes beyond what the process held before it loaded the model.

Latency, in one process and in turn: the time to score rows, 8 at once, and the time per written
token, one row at a time, of the base model, with adapters, with those of the lowest third dropped
(AdapterDrop), with LoRA beside the weights, and with LoRA merged into them.

`ratio` is the adapters' tokens per second over LoRA's, `top_ratio` the top third's over all
layers'. The last line is one JSON object.
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
    add_arm_options,
    add_task_options,
    in_turn,
    parser_of,
    require_least,
    run_arm,
    run_script,
    set_numbers,
    show_table,
    stopwatch,
    threads,
)

from recipelib.models import describe_model
from recipelib.runtime import versions, write_json

ROWS_PER_STEP = 8
FULL, QUICK = {"steps": 25, "rounds": 3}, {"steps": 4, "rounds": 1}
WARM_UP = 1
LOSS_TOLERANCE = 1e-4
ARMS = {
    "adapter": "adapters",
    "lora": "LoRA of equal size",
    "top": "adapters, top third",
    "full": "all parameters",
}
LATENCY = {
    "base": "base model",
    "adapter": "adapters",
    "dropped": "adapters, lowest third dropped",
    "lora": "LoRA, beside the weights",
    "merged": "LoRA, merged",
}
WRITTEN, QUICK_WRITTEN = 32, 8  # tokens


# In a process of its own -------------------------------------------------------------------------


def adapted(model, arm: str, size: int):
    """The model with what an arm trains, at a start that changes nothing."""
    from peft import LoraConfig, get_peft_model

    from recipelib.adapters import BottleneckConfig

    if arm in ("full", "base"):
        return model
    if arm == "lora":
        rank = equal_rank(model, size)
        config = LoraConfig(r=rank, init_lora_weights="gaussian", target_modules="all-linear")
    else:
        config = BottleneckConfig(bottleneck_size=size, init_weights="identity", train_norms=False)
    if arm == "top":
        count = model.config.num_hidden_layers
        config.layers_to_transform = [*range(count - max(1, count // 3), count)]
    return get_peft_model(model, config)


def equal_rank(model, size: int) -> int:
    """The rank at which LoRA on all linear layers but the head has as many parameters as adapters
    of a size, as nearly as whole ranks allow.
    """
    import torch

    head = model.get_output_embeddings()
    linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    per_rank = sum(one.in_features + one.out_features for one in linear if one is not head)
    width = model.config.hidden_size
    wanted = 2 * model.config.num_hidden_layers * (2 * width * size + size + width)
    return max(1, round(wanted / per_rank))


def encode(args: argparse.Namespace, rows: int):
    """The tokenizer and the encoded rows of the task."""
    from recipelib.data import parse_columns
    from recipelib.data.rows import load_rows
    from recipelib.encoding import PromptEncoder, encode_rows
    from recipelib.models import load_tokenizer
    from recipelib.prompts import PromptTemplate

    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    found = load_rows(template, args.dataset, "train", max_samples=min(rows, args.rows)).rows
    tokenizer = load_tokenizer(args.model_name_or_path)
    return tokenizer, encode_rows(PromptEncoder(template, tokenizer, 512), found)


def measure(args: argparse.Namespace) -> None:
    """Train, and write what was measured to `args.result`."""
    import torch
    from transformers import set_seed

    from recipelib.models import load_pretrained
    from recipelib.runtime import MemoryMeter
    from recipelib.training import RecipeConfig, RecipeTrainer

    training = RecipeConfig(
        output_dir=str(args.result.parent / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ROWS_PER_STEP // 2,
        train_sampling_strategy="batch_rebalance",
        max_steps=args.steps + WARM_UP,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    tokenizer, encoded = encode(args, training.max_steps * ROWS_PER_STEP)
    task = Examples(encoded, tokenizer, memory=MemoryMeter())
    set_seed(training.seed)
    model = adapted(
        load_pretrained(args.model_name_or_path, dtype=torch.float32),
        args.measure,
        args.bottleneck_size,
    )
    watch = stopwatch(WARM_UP)
    watch.trainer = trainer = RecipeTrainer(model, training, task, callbacks=[watch])
    trainer.train()
    write_json(
        args.result,
        {
            **watch.measured(),
            "first_loss": trainer.state.log_history[0]["loss"],
            "peak_memory_bytes": trainer.figures().peak_memory_bytes,
            "trainable_parameters": sum(
                one.numel() for one in model.parameters() if one.requires_grad
            ),
        },
    )


def measure_latency(args: argparse.Namespace) -> None:
    """Score and write with each model in turn, and write the times to `args.result`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from recipelib.adapters.bottleneck import BottleneckLayer, layer_number
    from recipelib.models import load_pretrained

    tokenizer, encoded = encode(args, ROWS_PER_STEP)
    rows = [torch.tensor(one["input_ids"]) for one in encoded.examples]
    masks = [torch.ones_like(one) for one in rows]
    batch = {"input_ids": pad_sequence(rows, True), "attention_mask": pad_sequence(masks, True)}
    models = {}
    for name in LATENCY:
        arm = {"dropped": "adapter", "merged": "lora"}.get(name, name)
        model = adapted(
            load_pretrained(args.model_name_or_path, dtype=torch.float32), arm, args.bottleneck_size
        )
        if name == "merged":
            model = model.merge_and_unload()
        if name == "dropped":
            third = max(1, model.config.num_hidden_layers // 3)
            for place, one in model.named_modules():
                if isinstance(one, BottleneckLayer) and layer_number(place) < third:
                    one.passed_over = True
        models[name] = model.eval()
    times: dict[str, dict[str, list[float]]] = {name: {"score": [], "write": []} for name in models}
    written = QUICK_WRITTEN if args.quick else WRITTEN
    with torch.no_grad():
        for number in range(args.rounds + 1):  # the first is the warm-up
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch, logits_to_keep=1)
                middle = time.perf_counter()
                text = model.generate(
                    input_ids=rows[0][None],
                    attention_mask=masks[0][None],
                    max_new_tokens=written,
                    min_new_tokens=written,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                if text.shape[1] != len(rows[0]) + written:
                    raise RunFailed(f"{name}: wrote {text.shape[1] - len(rows[0])} tokens")
                if number:
                    times[name]["score"].append(middle - start)
                    times[name]["write"].append((time.perf_counter() - middle) / written)
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
        return (measure_latency if args.measure == "latency" else measure)(args)
    with tempfile.TemporaryDirectory(prefix="adapter-speed-") as folder:
        runs = in_turn(
            [*ARMS],
            args.rounds,
            lambda arm, _: run_arm(__file__, arm, args, Path(folder)),
            lambda run: f"{run['tokens'] / run['seconds']:.0f} tokens/s",
            check_same_work,
        )
        times = run_arm(__file__, "latency", args, Path(folder))
    result = summarize(runs, times) | {
        "bottleneck_size": args.bottleneck_size,
        "steps": args.steps,
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
    """The command line; `steps` and `rounds` are always set."""
    parser = parser_of(__doc__, f"{QUICK['steps']} steps, one round")
    add_task_options(parser)
    parser.add_argument("--bottleneck_size", type=int, default=64, help="of the adapters [64]")
    add_arm_options(parser, [*ARMS, "latency"], FULL)
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    require_least(args, "bottleneck_size", 1)
    require_least(args, "rows", ROWS_PER_STEP)
    return args


def check_same_work(arm: str, run: dict, first: dict) -> None:
    """A run against the first one of the adapters.

    Raises:
        RunFailed: other tokens, or another loss in step 1.
    """
    if run["tokens"] != first["tokens"]:
        raise RunFailed(f"{arm}: {run['tokens']} tokens, but {first['tokens']} with adapters")
    found, wanted = run["first_loss"], first["first_loss"]
    if not abs(found - wanted) <= LOSS_TOLERANCE:
        raise RunFailed(f"{arm}: loss {found:.6f} in step 1, but {wanted:.6f} with adapters")


def summarize(runs: dict[str, list[dict]], times: dict) -> dict:
    """The ratios and the figures of all, over all rounds."""
    arms = {
        arm: {
            "tokens_per_second": sum(run["tokens"] for run in several)
            / sum(run["seconds"] for run in several),
            "seconds": [run["seconds"] for run in several],
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in several),
            "trainable_parameters": several[0]["trainable_parameters"],
            "first_loss": several[0]["first_loss"],
        }
        for arm, several in runs.items()
    }
    speed = {arm: one["tokens_per_second"] for arm, one in arms.items()}
    return {
        "ratio": speed["adapter"] / speed["lora"],
        "top_ratio": speed["top"] / speed["adapter"],
        "arms": arms,
        "latency_seconds": {
            name: {what: median(some) for what, some in one.items()} for name, one in times.items()
        },
    }


def print_tables(result: dict) -> None:
    """The figures of all."""
    own, rows = result["arms"]["adapter"]["tokens_per_second"], []
    for arm, one in result["arms"].items():
        speed, memory = one["tokens_per_second"], one["peak_memory_bytes"] / 2**30
        figures = (f"{one['trainable_parameters']:,}", f"{speed:.0f}", f"{speed / own:.2f}")
        rows.append((ARMS[arm], *figures, f"{memory:.2f} GiB"))
    show_table(
        f"{result['model']}, bottleneck of {result['bottleneck_size']}, float32, "
        f"{result['omp_num_threads']} threads, {result['steps']} steps of {ROWS_PER_STEP} rows of "
        f"{result['template']}, {result['rounds']} rounds",
        ("training", "trained parameters", "tokens/s", "of adapters'", "peak memory"),
        rows,
    )
    base, rows = result["latency_seconds"]["base"], []
    for name, one in result["latency_seconds"].items():
        cells = [
            cell
            for what in ("score", "write")
            for cell in (f"{one[what] * 1000:.1f} ms", f"{one[what] / base[what]:.2f}")
        ]
        rows.append((LATENCY[name], *cells))
    headings = (f"{ROWS_PER_STEP} rows scored", "of base's", "a token written", "of base's")
    show_table("Latency, median", ("trained", *headings), rows)


if __name__ == "__main__":
    run_script(main)
