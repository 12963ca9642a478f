"""The summary before training: what is trained, on what, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping

from recipelib.models import count_parameters, describe_quantization
from recipelib.runtime import print_table
from recipelib.training.batches import expected_padding
from recipelib.training.memory import MemoryEstimate


def show_plan(
    model,
    training,
    task,
    estimated: MemoryEstimate,
    rates: Mapping[str, float],
    *,
    counts: tuple[int, int] | None = None,
    batch: str | None = None,
    padding: float | None = None,
) -> None:
    """Print what is trained, on what, and how much of it.

    Args:
        training: the trainer's arguments.
        task: its `encoded` examples, `sources` and `model_name` are shown.
        estimated: the memory that each process will need.
        rates: learning rates of their own, by a word in the parameters' names.
        counts: trainable and all parameters, where the model holds only a part of them.
        batch, padding: the rows of a step in words, and the share of padding, where each process
            does not simply take rows of its own.
    """
    dtype, why = training.model_dtype
    frozen = describe_quantization(model)
    trainable, total = counts or count_parameters(model)
    if trainable == total and model.dtype != dtype:
        computed = str(dtype).removeprefix("torch.")
        dtype, why = model.dtype, f"which training needs; computed in {computed}"
    rows, lengths = task.encoded.counts, task.encoded.lengths
    padding = expected_padding(lengths, training) if padding is None else padding
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = [
        f", {word} {rate:g}"
        for word, rate in rates.items()
        if any(word in name for name in trained)
    ]
    left_out = f", {rows.left_out} left out: too long" if rows.left_out else ""
    prepared = {
        "examples": f"{rows.examples:,} from {rows.rows:,} rows; "
        f"{rows.shortened:,} shortened{left_out}",
        "tokens": f"{rows.tokens:,}, of which {rows.supervised_tokens:,} supervised; "
        f"{padding:.0%} padding",
    }
    if task.encoded.stream is not None:
        prepared = {
            "examples": f"encoded while training; the first {len(lengths)} have "
            f"{lengths.mean():.0f} tokens on average, {padding:.0%} padding"
        }
    dft = training.loss_type == "dft"
    print_table(
        "Before training",
        {
            "model": f"{task.model_name}, {str(dtype).removeprefix('torch.')} ({why})",
            **({"frozen weights": frozen} if frozen else {}),
            "parameters": f"{trainable:,} trainable of {total:,} ({trainable / total:.2%})",
            **task.sources,
            **prepared,
            "batch": batch or _batch(training),
            "learning rate": f"{training.learning_rate:g}{''.join(own)}, "
            f"{training.lr_scheduler_type.value}",
            **({"loss": "dft, by each token's probability"} if dft else {}),
            "memory per process": estimated,
            "output": training.output_dir,
        },
    )


def _batch(training) -> str:
    """The rows of a step."""
    rows, world = training.per_device_train_batch_size, training.world_size
    accumulated = training.gradient_accumulation_steps
    return (
        f"{rows * accumulated * world} = {rows} per device x {accumulated} accumulated x {world} "
        "(processes)"
    )
