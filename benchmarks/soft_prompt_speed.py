"""What prompt tuning gains by reading the cloze's mask only: our trainer beside a plain loop of
PEFT and transformers' Trainer, which computes the logits of all places, on the CPU in float32.

    python benchmarks/soft_prompt_speed.py                    # about ten minutes on two cores
    python benchmarks/soft_prompt_speed.py --quick            # fewer steps, one round
    python benchmarks/soft_prompt_speed.py --template sst2 --dataset data/sst2

Both train the same soft prompt, from the same start, on the same 8 rows in every step, in turn,
each in a process of its own whose first steps do not count. The plain loop learns the first label
word as text (cross-entropy over the vocabulary), ours the right one among the labels; before they
start, both compute the loss of the first rows' words, which has to agree. Peak memory is what
training takes beyond what the process held before it loaded the model.

`ratio` is ours over the plain loop's in steps per second. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

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

ROWS_PER_STEP, VIRTUAL_TOKENS = 8, 16
FULL, QUICK = {"steps": 30, "rounds": 3}, {"steps": 12, "rounds": 1}
WARM_UP = 2
LOSS_TOLERANCE = 1e-4
ARMS = ("plain", "ours")


# One run, in a process of its own ----------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Train, and write what was measured to `args.result`."""
    import torch
    from datasets import Dataset
    from peft import PromptTuningConfig, get_peft_model
    from transformers import Trainer, set_seed

    from recipelib.adapters import compute_prompt_once
    from recipelib.data import parse_columns
    from recipelib.data.rows import load_rows
    from recipelib.encoding import (
        PromptEncoder,
        asker_of,
        cloze_encoding,
        encode_cloze_rows,
        encode_into,
    )
    from recipelib.inference import score_examples
    from recipelib.models import load_pretrained, load_tokenizer
    from recipelib.prompts import PromptTemplate
    from recipelib.runtime import MemoryMeter, Store
    from recipelib.training import ClozeTrainer, RecipeConfig

    training = RecipeConfig(
        output_dir=str(args.result.parent / "out"),
        per_device_train_batch_size=ROWS_PER_STEP,
        max_steps=args.steps + WARM_UP,
        learning_rate=0.03,
        lr_scheduler_type="constant",
        train_sampling_strategy="random",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    needed = training.max_steps * ROWS_PER_STEP
    rows = load_rows(template, args.dataset, "train", max_samples=min(needed, args.rows)).rows
    tokenizer = load_tokenizer(args.model_name_or_path)
    asker = asker_of(PromptEncoder(template, tokenizer, 512), False, False)
    cloze = encode_cloze_rows(asker, rows)
    memory = MemoryMeter()
    model = load_pretrained(args.model_name_or_path, dtype=torch.float32)
    set_seed(training.seed)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    model = get_peft_model(model, config)
    with torch.no_grad():
        ids = torch.arange(VIRTUAL_TOKENS) + 100
        model.prompt_encoder["default"].embedding.weight.copy_(
            model.get_input_embeddings().weight[ids]
        )
    watch = stopwatch(WARM_UP)
    if args.measure == "ours":
        compute_prompt_once(model)
        encoded = encode_into(Store(), rows, cloze_encoding(asker))
        task = Examples(encoded, tokenizer, facts={"combine": "logsumexp"})
        trainer = ClozeTrainer(model, training, task, callbacks=[watch])
    else:
        rows = [
            asker.encoder.training_example(one.questions[0])[:2] for one in cloze.asked
        ]  # prompt and first label word with its end marker, which is left out below
        rows = [{"input_ids": ids[:-1], "labels": labels[:-1]} for ids, labels in rows]
        trainer = Trainer(
            model,
            training,
            train_dataset=Dataset.from_list(rows),
            data_collator=pad_right,
            callbacks=[watch],
        )
    first = [cloze.examples[index] for index in range(ROWS_PER_STEP)]
    if args.measure == "ours":
        places = [one["word_labels"].index(one["labels"]) for one in first]
        words = score_examples(model, first)
        loss = -sum(words[row, place].item() for row, place in enumerate(places))
    else:
        with torch.no_grad():
            batch = pad_right([trainer.train_dataset[index] for index in range(ROWS_PER_STEP)])
            count = (batch["labels"] != -100).sum().item()
            loss = model(**batch).loss.item() * count
    memory.restart()
    trainer.train()
    peak = memory.stop()
    lengths = [len(one["input_ids"]) for one in cloze.examples]
    write_json(
        args.result,
        {
            **watch.measured(),
            "first_loss": loss / ROWS_PER_STEP,
            "peak_memory_bytes": peak,
            "rows": len(lengths),
            "mean_length": sum(lengths) / len(lengths),
            "vocabulary": len(tokenizer),
        },
    )


def pad_right(rows: list[dict]) -> dict:
    """A batch for the plain loop."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


# The comparison ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict | None:
    """Run both in turn, print the table, and return what the last line holds.

    Raises:
        UserError: arguments that will not do.
        RunFailed: a run failed, or the two did not do the same work.
    """
    args = parse(argv)
    if args.measure:
        return measure(args)
    with tempfile.TemporaryDirectory(prefix="soft-prompt-speed-") as folder:
        runs = in_turn(
            ARMS,
            args.rounds,
            lambda arm, _: run_arm(__file__, arm, args, Path(folder)),
            lambda run: f"{args.steps / run['seconds']:.2f} steps/s",
            check_same_work,
        )
    result = summarize(runs, args.steps) | {
        "rows_per_step": ROWS_PER_STEP,
        "virtual_tokens": VIRTUAL_TOKENS,
        "steps": args.steps,
        "rounds": args.rounds,
        "template": args.template,
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
    add_task_options(parser)
    add_arm_options(parser, ARMS, FULL)
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    require_least(args, "rows", ROWS_PER_STEP)
    return args


def check_same_work(arm: str, run: dict, first: dict) -> None:
    """A run against the first one of the plain loop.

    Raises:
        RunFailed: other rows, or another loss of the same words before training.
    """
    if run["rows"] != first["rows"]:
        raise RunFailed(f"{arm}: {run['rows']} rows, but {first['rows']} in the plain loop")
    found, wanted = run["first_loss"], first["first_loss"]
    if not abs(found - wanted) <= LOSS_TOLERANCE:
        raise RunFailed(
            f"{arm}: loss {found:.6f} of the first rows' words, but {wanted:.6f} in the plain loop"
        )


def summarize(runs: dict[str, list[dict]], steps: int) -> dict:
    """`ratio` and the figures of both, over all rounds."""
    arms = {
        arm: {
            "steps_per_second": steps * len(several) / sum(run["seconds"] for run in several),
            "seconds": [run["seconds"] for run in several],
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in several),
        }
        for arm, several in runs.items()
    }
    first = runs["plain"][0]
    return {
        "ratio": arms["ours"]["steps_per_second"] / arms["plain"]["steps_per_second"],
        "memory_ratio": arms["ours"]["peak_memory_bytes"] / arms["plain"]["peak_memory_bytes"],
        "loss_difference": abs(runs["ours"][0]["first_loss"] - first["first_loss"]),
        "arms": arms,
        "mean_length": first["mean_length"],
        "vocabulary": first["vocabulary"],
    }


def print_table(result: dict) -> None:
    """The figures of both."""
    titles = {"plain": "PEFT and Trainer", "ours": "prompt_tuning.py"}
    show_table(
        f"{result['model']}, {result['virtual_tokens']} virtual tokens, float32, "
        f"{result['omp_num_threads']} threads, {result['steps']} steps of {ROWS_PER_STEP} rows "
        f"of {result['template']} ({result['mean_length']:.0f} tokens)",
        ("", "steps/s", "seconds", "peak memory"),
        [
            (
                titles[arm],
                f"{one['steps_per_second']:.2f}",
                f"{sum(one['seconds']):.1f}",
                f"{one['peak_memory_bytes'] / 2**30:.2f} GiB",
            )
            for arm, one in result["arms"].items()
        ],
        caption=f"ratio {result['ratio']:.2f}, memory {result['memory_ratio']:.2f}; loss of the "
        f"first rows' words differs by {result['loss_difference']:.1e}",
    )


if __name__ == "__main__":
    run_script(main)
