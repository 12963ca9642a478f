"""What a run shows before it trains and leaves in its folder when it is done."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from recipelib.encoding.examples import EncodedRows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.scores import TaskScore
from recipelib.models.quantization import count_parameters, describe_quantization
from recipelib.prompts.template import PromptTemplate
from recipelib.reporting.card import _with_revision, model_card
from recipelib.reporting.figures import plot_loss
from recipelib.runtime.console import is_main_process, print_table, say
from recipelib.runtime.files import write_json, write_jsonl
from recipelib.runtime.versions import versions
from recipelib.training.memory import MemoryEstimate, gib


def save_run(
    trainer,
    encoder: PromptEncoder,
    encoded: EncodedRows,
    base: TaskScore,
    tuned: TaskScore,
    *,
    method: str,
    model_name: str,
    load_snippet: str,
    estimated: MemoryEstimate,
    peak_memory_bytes: int,
    peak_resident_bytes: int,
    train_seconds: float,
    skipped_rows: int = 0,
    templates: Sequence[PromptTemplate] = (),
    more: Mapping[str, Any] | None = None,
) -> dict:
    """Write everything beside the weights: metrics.json last, so that where it stands the run is
    whole.

    Args:
        encoder: how rows are asked; its template is kept as template.yaml.
        templates: of a run with several tasks, each is kept as templates/NAME.yaml instead.
        more: further figures for metrics.json.
    Returns:
        The content of metrics.json.
    """
    training, folder = trainer.args, Path(trainer.args.output_dir)
    templates = list(templates) or [encoder.template]
    task = "+".join(template.name for template in templates)
    trainer.save_state()
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should load
    trainable, total = count_parameters(trainer.model)
    counted = [trainer.tokens_seen, trainer.slots_seen, peak_memory_bytes, peak_resident_bytes]
    processes = trainer.accelerator.gather(torch.tensor([counted], device=training.device))
    tokens_seen, slots_seen = processes[:, :2].sum(0).tolist()
    peak, resident = processes[:, 2:].amax(0).tolist()
    metrics = {
        "task": task,
        "method": method,
        "model": model_name,
        "metric": tuned.metric,
        "score": tuned.score,
        "stderr": tuned.stderr,
        **tuned.details,
        "unreadable": tuned.unreadable,
        "base_score": base.score,
        "base_stderr": base.stderr,
        "eval_rows": tuned.rows,
        "eval_rows_left_out": tuned.left_out,
        "train_rows": encoded.counts.rows,
        "train_examples": encoded.counts.examples,
        "train_examples_shortened": encoded.counts.shortened,
        "train_examples_left_out": encoded.counts.left_out,
        "bad_rows_skipped": skipped_rows,
        "train_tokens": tokens_seen,
        "supervised_tokens": encoded.counts.supervised_tokens,
        "padding_fraction": 1 - tokens_seen / slots_seen if slots_seen else 0.0,
        "tokens_per_second": tokens_seen / train_seconds if train_seconds else 0.0,
        "train_seconds": train_seconds,
        "eval_seconds": tuned.seconds,
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "peak_memory_bytes": peak,
        "peak_resident_bytes": resident,
        "estimated_memory_bytes": estimated.total,
        "quantization": describe_quantization(trainer.model),
        "rendering": "chat" if encoder.chat else "text",
        "chat_template_kwargs": encoder.text.chat_template_kwargs,
        "max_length": encoder.max_length,
        "world_size": training.world_size,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "seed": training.seed,
        "versions": versions(),
        **(more or {}),
    }
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    if bad := [step for step, loss in losses.items() if not math.isfinite(loss)]:
        say(
            f"warning: the loss is not finite from step {bad[0]} on, so nothing was learned: lower "
            "--learning_rate"
        )
    if is_main_process():
        # What an earlier run of another kind left here would be taken for this one's.
        (folder / "template.yaml").unlink(missing_ok=True)
        shutil.rmtree(folder / "templates", ignore_errors=True)
        if not isinstance(trainer.model, PeftModel):
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (folder / name).unlink(missing_ok=True)
        for template in templates:
            place = folder / "templates" / f"{template.name}.yaml"
            place = place if len(templates) > 1 else folder / "template.yaml"
            place.parent.mkdir(parents=True, exist_ok=True)
            template.save(place)
        trainer.processing_class.save_pretrained(folder)
        write_jsonl(folder / "predictions.jsonl", tuned.records)
        plot_loss(
            trainer.state.log_history,
            folder / "loss.png",
            title=f"{task}: {method}",
            subtitle=f"{model_name}, {encoded.counts.examples:,} examples, "
            f"{metrics['steps']:,} steps",
        )
        command = shlex.join(["accelerate", "launch", *sys.argv])
        if training.hub_token:  # the card may be published
            command = command.replace(training.hub_token, "HUB_TOKEN")
        card = model_card(
            title=f"{task} ({method})",
            template_description=" ".join(template.description for template in templates),
            base_model=model_name,
            method=method,
            command=command,
            metrics=metrics,
            versions=metrics["versions"],
            load_snippet=_with_revision(load_snippet, trainer.model),
            library_name="peft" if isinstance(trainer.model, PeftModel) else "transformers",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "metrics.json", metrics)
        print_table(
            "Done",
            {
                "base model": base,
                "tuned": tuned,
                "training": f"{train_seconds:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s, "
                f"{metrics['padding_fraction']:.0%} padding",
                "peak memory": f"{gib(peak)} GiB (estimated {gib(estimated.total)})",
                "written to": f"{folder}/: weights, metrics.json, predictions.jsonl, loss.png",
            },
        )
    return metrics


def say_wrong(result: TaskScore, count: int = 3) -> None:
    """Show the first wrong answers; all of them stand in predictions.jsonl."""
    wrong = [one for one in result.records if one["score"] is not None and one["score"] < 1]
    shown = {
        f"row {one['row']}": f"{one['prompt']}\n\n"
        f"written: {one.get('generated', one['prediction'])}\n"
        f"read: {one['prediction']}; right: {one['answer']}"
        for one in wrong[:count]
    }
    if shown:
        print_table(f"{len(wrong)} of {result.rows} are wrong, such as", shown)
