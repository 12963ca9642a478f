"""What is left of a small model that was trained on features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipelib.evaluation import TaskScore
from recipelib.models import count_parameters
from recipelib.probes import ProbeChoice, save_probe
from recipelib.reporting.card import publish
from recipelib.reporting.classes import plot_classes, show_classes
from recipelib.reporting.figures import plot_layers
from recipelib.reporting.run import write_card
from recipelib.runtime import (
    clear_results,
    clear_way,
    gib,
    is_main_process,
    print_table,
    versions,
    write_json,
    write_jsonl,
)
from recipelib.task import ClassTask


def save_features_run(
    task: ClassTask,
    training,
    model,
    choice: ProbeChoice,
    base: TaskScore,
    tuned: TaskScore,
) -> dict:
    """Write the small model and everything beside it: metrics.json last, so that where it stands
    the run is whole.

    Args:
        model: whose states the features are.
        base: of the untouched model by its label words.
    Returns:
        The content of metrics.json.
    """
    probe, layers = choice.probe, choice.layers
    facts = {**task.features_of, "layer": choice.layer}
    folder, counts = Path(training.output_dir), task.encoded.counts
    peak, name = task.memory.stop(), task.template.name
    metrics = {
        "task": name,
        "method": f"features ({probe.kind})",
        "model": task.model_name,
        **tuned.figures(base),
        "eval_rows": tuned.rows,
        "eval_rows_left_out": tuned.left_out,
        "train_rows": counts.rows,
        "train_examples": counts.examples,
        "train_examples_shortened": counts.shortened,
        "train_examples_left_out": counts.left_out,
        "bad_rows_skipped": task.skipped_rows,
        "train_tokens": counts.tokens,
        "train_seconds": task.features_seconds + choice.seconds,
        "features_seconds": task.features_seconds,
        "probe_seconds": choice.seconds,
        "trainable_parameters": sum(
            tensor.size
            for place, tensor in probe.tensors.items()
            if place not in ("mean", "scale", "present")
        ),
        "total_parameters": count_parameters(model)[1],
        "peak_memory_bytes": peak,
        "rendering": "chat" if task.encoder.chat else "text",
        "chat_template_kwargs": task.encoder.text.chat_template_kwargs,
        "max_length": task.encoder.max_length,
        "world_size": training.world_size,
        "seed": training.seed,
        "versions": versions(),
        **task.read_by,
        "head": "probe",
        **facts,
        "layer_accuracies": {
            str(number): {"mean": mean, "std": std} for number, (mean, std) in layers.items()
        },
        "probe_accuracies": {
            kind.kind: {"mean": kind.mean, "std": kind.std, "seconds": kind.seconds}
            for kind in choice.kinds
        },
    }
    if not is_main_process():
        return metrics
    loaded_from = str(facts["model_name_or_path"] or "")
    clear_way(str(folder), None, loaded_from)
    clear_results(str(folder), loaded_from)
    folder.mkdir(parents=True, exist_ok=True)
    save_probe(probe, folder, {**facts, "masked": task.masked})
    task.templates[0].save(folder / "template.yaml")
    task.tokenizer.save_pretrained(folder)
    write_jsonl(folder / "predictions.jsonl", tuned.records)
    subtitle = f"{task.model_name}, {counts.examples:,} training rows"
    written = ["probe.json", "metrics.json", "predictions.jsonl"]
    read_from = f"{task.model_name}, {probe.kind} on layer {facts['layer']}"
    written += plot_classes(tuned, name, folder, read_from)
    if len(layers) > 1:
        plot_layers(
            layers,
            folder / "layers.png",
            title=f"{name}: what each layer knows",
            subtitle=subtitle,
            guessing=np.bincount(task.class_numbers).max() / len(task.class_numbers),
        )
        written.append("layers.png")
    write_card(folder, task, training, metrics, _snippet(training))
    write_json(folder / "metrics.json", metrics)
    show_classes(tuned, name)
    print_table(
        "Done",
        {
            "untouched model": base.brief(),
            "small model": f"{tuned.brief()}: {probe.kind} on layer {facts['layer']}",
            **tuned.notes(),
            "features": f"{task.features_seconds:.0f} s",
            "small models": f"{choice.seconds:.0f} s, cross-validation included",
            "peak memory": f"{gib(peak)} GiB",
            "written to": f"{folder}/: {', '.join(written)}",
        },
    )
    if training.publish:
        publish(training.output_dir, training)
    return metrics


def _snippet(training) -> str:
    """Python that loads what the folder holds, from the hub if it is uploaded."""
    folder = repr(training.output_dir)
    if training.publish:  # which puts the repository's name for the folder's
        folder = f"snapshot_download({folder})"
    return "\n".join(
        [
            "import sys",
            "",
            *(["from huggingface_hub import snapshot_download"] if training.publish else []),
            'sys.path.append("recipes")  # of the collection',
            "from recipelib.probes import load_probe",
            "",
            f"folder = {folder}",
            "probe, facts = load_probe(folder)",
            "# probe.scores(features): [rows, classes], of states that are pooled as facts says;",
            "# recipes/transfer_learning.py --output_dir FOLDER --predict FILE makes them",
            "",
        ]
    )
