"""What a finished run leaves in its folder, and shows."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipelib.evaluation import TaskScore
from recipelib.models import describe_quantization
from recipelib.reporting.card import load_snippet, model_card, publish
from recipelib.reporting.classes import plot_classes, show_classes, show_tasks
from recipelib.reporting.figures import plot_loss
from recipelib.runtime import (
    gib,
    is_main_process,
    print_table,
    say,
    versions,
    write_json,
    write_jsonl,
)
from recipelib.task import Task


def save_run(
    trainer,
    task: Task,
    base: TaskScore,
    tuned: TaskScore,
    *,
    method: str,
    more: Mapping[str, Any] | None = None,
) -> dict:
    """Write everything beside the weights, which are saved before: metrics.json last, so that where
    it stands the run is whole. Then upload it, if that was asked for.

    Args:
        trainer: whatever has trained: its `args`, `model`, `figures()`, `parameter_counts()`,
            `save_state()` and `state.log_history` are used.
        more: further figures for metrics.json.
    Returns:
        The content of metrics.json.
    Raises:
        UserError: the hub refused; the run itself is kept.
    """
    training, folder = trainer.args, Path(trainer.args.output_dir)
    name = "+".join(template.name for template in task.templates)
    trainer.save_state()
    trainable, total = trainer.parameter_counts()
    took, encoder = trainer.figures(), task.encoder
    counts, skipped = task.encoded.counts, task.skipped_rows
    if task.encoded.stream is not None:
        counts, skipped = trainer.rows_read()
        bad = f"; {skipped:,} bad ones were left out" if skipped else ""
        say(f"{counts.rows:,} rows were read{bad}")
        for problem in (problem for stream in task.streams for problem in stream.bad):
            say(f"  {problem}")
    metrics = {
        "task": name,
        "method": method,
        "model": task.model_name,
        **tuned.figures(base),
        "unreadable": tuned.unreadable,
        "eval_rows": tuned.rows,
        "eval_rows_left_out": tuned.left_out,
        "train_rows": counts.rows,
        "train_examples": counts.examples,
        "train_examples_shortened": counts.shortened,
        "train_examples_left_out": counts.left_out,
        "bad_rows_skipped": skipped,
        "train_tokens": took.tokens,
        "supervised_tokens": counts.supervised_tokens,
        "padding_fraction": 1 - took.tokens / took.slots if took.slots else 0.0,
        "tokens_per_second": took.tokens / took.seconds if took.seconds else 0.0,
        "train_seconds": took.seconds,
        "eval_seconds": tuned.seconds,
        "steps": took.steps,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "peak_memory_bytes": took.peak_memory_bytes,
        "peak_resident_bytes": took.peak_resident_bytes,
        "estimated_memory_bytes": took.estimated_memory_bytes,
        "quantization": describe_quantization(trainer.model),
        "rendering": "chat" if encoder.chat else "text",
        "chat_template_kwargs": encoder.text.chat_template_kwargs,
        "max_length": encoder.max_length,
        "max_new_tokens": task.budget.get("max_new_tokens"),
        "world_size": took.world_size,
        "distributed_type": took.distributed_type,
        "seed": training.seed,
        "versions": versions(),
        **(more or {}),
    }
    history = trainer.state.log_history
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    if lost := [step for step, loss in losses.items() if not math.isfinite(loss)]:
        say(
            f"warning: the loss is not finite from step {lost[0]} on, so nothing was learned: "
            "lower --learning_rate"
        )
    if is_main_process():
        for template in task.templates:
            place = folder / "templates" / f"{template.name}.yaml"
            place = place if len(task.templates) > 1 else folder / "template.yaml"
            place.parent.mkdir(parents=True, exist_ok=True)
            template.save(place)
        task.tokenizer.save_pretrained(folder)
        write_jsonl(folder / "predictions.jsonl", tuned.records)
        subtitle = f"{task.model_name}, {method}"
        written = ["metrics.json", "predictions.jsonl", "loss.png"]
        written += plot_classes(tuned, name, folder, subtitle)
        plot_loss(
            history,
            folder / "loss.png",
            title=f"{name}: {method}",
            subtitle=f"{task.model_name}, {counts.examples:,} examples, {took.steps:,} steps",
        )
        write_card(
            folder, task, training, metrics, load_snippet(trainer.model, training.output_dir)
        )
        write_json(folder / "metrics.json", metrics)
        estimated = gib(took.estimated_memory_bytes)
        if len(tuned.tasks) > 1:
            show_tasks(base, tuned, [template.name for template in task.templates])
        show_classes(tuned, name)
        print_table(
            "Done",
            {
                "before training" if metrics.get("adapter") else "base model": base.brief(),
                "tuned": tuned.brief(),
                **tuned.notes(),
                "training": f"{took.seconds:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s, "
                f"{metrics['padding_fraction']:.0%} padding",
                "peak memory": f"{gib(took.peak_memory_bytes)} GiB (estimated {estimated})",
                "written to": f"{folder}/: weights, {', '.join(written)}",
            },
        )
    if training.publish:
        publish(training.output_dir, training)
    return metrics


def write_card(folder: Path, task: Task, training, metrics: Mapping, snippet: str) -> None:
    """Write the model card of a run.

    Args:
        metrics: what metrics.json holds.
        snippet: Python that loads the result.
    """
    command = shlex.join(["accelerate", "launch", *(training.command or sys.argv)])
    if training.hub_token:  # the card may be published
        command = command.replace(training.hub_token, "HUB_TOKEN")
    card = model_card(
        title=f"{metrics['task']} ({metrics['method']})",
        template_description=" ".join(template.description for template in task.templates),
        base_model=task.model_name,
        method=metrics["method"],
        command=command,
        metrics=metrics,
        versions=metrics["versions"],
        load_snippet=snippet,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        adapter=metrics.get("adapter"),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_predictions(output_dir: str, result: TaskScore, kind: str) -> None:
    """Write further predictions of a run to predictions_KIND.jsonl."""
    if is_main_process():
        write_jsonl(Path(output_dir) / f"predictions_{kind}.jsonl", result.records)


def say_wrong(result: TaskScore, count: int = 3) -> None:
    """Show the first wrong answers; all of them stand in predictions.jsonl."""
    wrong = [
        record for record in result.records if record["score"] is not None and record["score"] < 1
    ]
    shown = {
        f"line {record['line']}"
        if "line" in record
        else f"row {record['row']}": f"{record['prompt']}\n\n"
        f"written: {record.get('generated', record['prediction'])}\n"
        f"read: {record['prediction']}; right: {record['answer']}"
        for record in wrong[:count]
    }
    if shown:
        print_table(f"{len(wrong)} of {result.rows} are wrong, such as", shown)
