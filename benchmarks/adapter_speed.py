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
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from recipelib.models.loading import describe_model
from recipelib.runtime.console import printable
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import write_json
from recipelib.runtime.installed import versions

ROWS_PER_STEP = 8
STEPS, QUICK_STEPS, ROUNDS, WARM_UP = 25, 4, 3, 1
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


class ArmFailed(Exception):
    """A run ended badly or did other work than the others; its text is one line."""


# In a process of its own -------------------------------------------------------------------------


def adapted(model, arm: str, size: int):
    """The model with what an arm trains, at a start that changes nothing."""
    from peft import LoraConfig, get_peft_model

    from recipelib.adapters.bottleneck import BottleneckConfig

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
    """The tokenizer and examples of the task."""
    from recipelib.data.rows import load_rows, parse_columns
    from recipelib.encoding.examples import encode_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.models.loading import load_tokenizer
    from recipelib.prompts.template import PromptTemplate

    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    found = load_rows(template, args.dataset, "train", max_samples=min(rows, args.rows)).rows
    tokenizer = load_tokenizer(args.model_name_or_path)
    return tokenizer, encode_rows(PromptEncoder(template, tokenizer, 512), found).examples


def measure(args: argparse.Namespace) -> None:
    """Train, and write what was measured to `args.result`."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed

    from recipelib.models.loading import load_pretrained
    from recipelib.runtime.memory import MemoryMeter
    from recipelib.training.config import RecipeConfig
    from recipelib.training.trainer import RecipeTrainer

    class Stopwatch(TrainerCallback):
        """Notes time and tokens where the warm-up ends and where the last step does."""

        trainer, marks = None, ()

        def on_step_end(self, training, state, control, **kwargs):
            if state.global_step in (WARM_UP, state.max_steps):
                self.marks = (*self.marks, (time.perf_counter(), self.trainer.tokens_seen))

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
    tokenizer, examples = encode(args, training.max_steps * ROWS_PER_STEP)
    memory = MemoryMeter()
    set_seed(training.seed)
    model = adapted(
        load_pretrained(args.model_name_or_path, dtype=torch.float32),
        args.measure,
        args.bottleneck_size,
    )
    watch = Stopwatch()
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    watch.trainer = trainer
    memory.restart()
    trainer.train()
    peak = memory.stop()
    (start, before), (end, after) = watch.marks
    write_json(
        args.result,
        {
            "seconds": end - start,
            "tokens": after - before,
            "first_loss": trainer.state.log_history[0]["loss"],
            "peak_memory_bytes": peak,
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
    from recipelib.models.loading import load_pretrained

    tokenizer, examples = encode(args, ROWS_PER_STEP)
    rows = [torch.tensor(one["input_ids"]) for one in examples]
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
                    raise ArmFailed(f"{name}: wrote {text.shape[1] - len(rows[0])} tokens")
                if number:
                    times[name]["score"].append(middle - start)
                    times[name]["write"].append((time.perf_counter() - middle) / written)
    write_json(args.result, times)


def run_arm(arm: str, args: argparse.Namespace, folder: Path) -> dict:
    """What `measure` or `measure_latency` finds in a process of its own.

    Raises:
        ArmFailed: it ended with another code than 0.
    """
    result = folder / "result.json"
    command = [sys.executable, __file__, "--measure", arm, "--result", str(result)]
    given = ("template", "dataset", "model_name_or_path", "steps", "rows", "rounds")
    for name in (*given, "bottleneck_size"):
        command += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    command += ["--columns", *args.columns] if args.columns else []
    command += ["--quick"] if args.quick else []
    environment = os.environ | {"OMP_NUM_THREADS": threads(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ArmFailed(f"{arm}: ended with exit code {done.returncode}: {said}")
    return json.loads(result.read_text(encoding="utf-8"))


def threads() -> str:
    """OMP_NUM_THREADS, for all: as it is set, else one for each core."""
    return os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())


# The comparison ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict | None:
    """Run all in turn, print the tables, and return what the last line holds.

    Raises:
        UserError: arguments that will not do.
        ArmFailed: a run failed, or they did not do the same work.
    """
    args = parse(argv)
    if args.measure:
        return (measure_latency if args.measure == "latency" else measure)(args)
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        for number in range(1, args.rounds + 1):
            for arm in ARMS:
                run = run_arm(arm, args, Path(folder))
                speed = run["tokens"] / run["seconds"]
                print(f"round {number}, {arm}: {speed:.0f} tokens/s", flush=True)
                runs[arm].append(run)
                check_same_work(arm, run, runs["adapter"][0])
        times = run_arm("latency", args, Path(folder))
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one round")
    parser.add_argument("--template", default="movie_reviews", help="the task [movie_reviews]")
    parser.add_argument("--dataset", help="its rows [the template's]")
    parser.add_argument("--columns", nargs="+", default=[], help="variable=column, as in a recipe")
    parser.add_argument("--bottleneck_size", type=int, default=64, help="of the adapters [64]")
    parser.add_argument("--steps", type=int, help=f"that count, of {ROWS_PER_STEP} rows [{STEPS}]")
    parser.add_argument("--rounds", type=int, help=f"runs of each [{ROUNDS}]")
    parser.add_argument("--rows", type=int, default=400, help="most rows that are used [400]")
    parser.add_argument("--model_name_or_path", help="folder, .gguf file or hub id [the bundled]")
    parser.add_argument("--measure", choices=[*ARMS, "latency"], help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = QUICK_STEPS if args.quick else STEPS
    if args.rounds is None:
        args.rounds = 1 if args.quick else ROUNDS
    for name, least in (("steps", 1), ("rounds", 1), ("bottleneck_size", 1), ("rows", 8)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    return args


def check_same_work(arm: str, run: dict, first: dict) -> None:
    """A run against the first one of the adapters.

    Raises:
        ArmFailed: other tokens, or another loss in step 1.
    """
    if run["tokens"] != first["tokens"]:
        raise ArmFailed(f"{arm}: {run['tokens']} tokens, but {first['tokens']} with adapters")
    found, wanted = run["first_loss"], first["first_loss"]
    if not abs(found - wanted) <= LOSS_TOLERANCE:
        raise ArmFailed(f"{arm}: loss {found:.6f} in step 1, but {wanted:.6f} with adapters")


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
    """The figures of all; plain text outside a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(**({} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}))
    title = (
        f"{result['model']}, bottleneck of {result['bottleneck_size']}, float32, "
        f"{result['omp_num_threads']} threads, {result['steps']} steps of {ROWS_PER_STEP} rows of "
        f"{result['template']}, {result['rounds']} rounds"
    )
    table = Table(title=printable(title), title_justify="left")
    table.add_column("training")
    for name in ("trained parameters", "tokens/s", "of adapters'", "peak memory"):
        table.add_column(name, justify="right")
    own = result["arms"]["adapter"]["tokens_per_second"]
    for arm, one in result["arms"].items():
        speed, memory = one["tokens_per_second"], one["peak_memory_bytes"] / 2**30
        figures = (f"{one['trainable_parameters']:,}", f"{speed:.0f}", f"{speed / own:.2f}")
        table.add_row(ARMS[arm], *figures, f"{memory:.2f} GiB")
    console.print(table)
    table = Table(title="Latency, median")
    table.add_column("trained")
    for name in (f"{ROWS_PER_STEP} rows scored", "of base's", "a token written", "of base's"):
        table.add_column(name, justify="right")
    base = result["latency_seconds"]["base"]
    for name, one in result["latency_seconds"].items():
        cells = [
            cell
            for what in ("score", "write")
            for cell in (f"{one[what] * 1000:.1f} ms", f"{one[what] / base[what]:.2f}")
        ]
        table.add_row(LATENCY[name], *cells)
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
