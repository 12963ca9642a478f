"""What is left of a model that was scored through a cloze, and of several few-shot draws."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipelib.evaluation import TaskScore
from recipelib.models import count_parameters
from recipelib.reporting.classes import plot_classes, show_classes
from recipelib.runtime import (
    clear_figures,
    gib,
    is_main_process,
    print_table,
    versions,
    write_json,
    write_jsonl,
)
from recipelib.task import ClozeTask


def save_score(result: TaskScore, task: ClozeTask, training, model) -> dict:
    """Write predictions.jsonl, the template and metrics.json of a model that was scored only.

    Returns:
        The content of metrics.json.
    """
    folder, encoder, peak_memory_bytes = Path(training.output_dir), task.encoder, task.memory.stop()
    metrics = {
        "task": task.template.name,
        "method": "cloze (zero-shot)",
        "model": task.model_name,
        **result.figures(),
        "eval_rows": result.rows,
        "eval_rows_left_out": result.left_out,
        "eval_seconds": result.seconds,
        "train_rows": 0,
        "trainable_parameters": 0,
        "total_parameters": count_parameters(model)[1],
        "peak_memory_bytes": peak_memory_bytes,
        "rendering": "chat" if encoder.chat else "text",
        "max_length": encoder.max_length,
        "world_size": training.world_size,
        "seed": training.seed,
        "versions": versions(),
        **task.facts,
    }
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        clear_figures(training.output_dir)
        encoder.template.save(folder / "template.yaml")
        write_jsonl(folder / "predictions.jsonl", result.records)
        written = ["metrics.json", "predictions.jsonl"]
        written += plot_classes(result, task.template.name, folder, f"{task.model_name}, untouched")
        write_json(folder / "metrics.json", metrics)
        show_classes(result, task.template.name)
        others = {key: f"{value:.3f}" for key, value in result.details.items()}
        print_table(
            "Done",
            {
                "untouched model": result.brief(),
                **result.notes(),
                **others,
                "peak memory": f"{gib(peak_memory_bytes)} GiB",
                "written to": f"{folder}/: {', '.join(written)}",
            },
        )
    return metrics


def save_draws(runs: Sequence[Mapping[str, Any]], output_dir: str) -> dict:
    """Write metrics.json over several draws, whose own runs lie beside it in draw_N.

    Returns:
        Its content: that of the first draw, where they are all alike; `score` and `stderr` are the
        mean over draws and its standard error, `score_std` the deviation of a draw.
    """
    scores = [run["score"] for run in runs]
    deviation = statistics.stdev(scores)
    same = {key: value for key, value in runs[0].items() if all(run[key] == value for run in runs)}
    several = [run.get("metrics", {}) for run in runs]
    more = {
        name: {
            **first,
            "score": statistics.fmean(run[name]["score"] for run in several),
            "stderr": statistics.stdev(run[name]["score"] for run in several) / len(runs) ** 0.5,
        }
        for name, first in several[0].items()
    }
    metrics = {
        **same,
        **({"metrics": more} if more else {}),
        "score": statistics.mean(scores),
        "stderr": deviation / len(scores) ** 0.5,
        "score_std": deviation,
        "draws": scores,
        "train_seconds": sum(run["train_seconds"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
    }
    if is_main_process():
        always = {}
        if "majority_class" in same:
            shown = f"{same['majority_class']!r}: accuracy {same['majority_accuracy']:.3f}"
            always = {"majority class": shown}
        write_json(Path(output_dir) / "metrics.json", metrics)
        print_table(
            f"{len(runs)} draws",
            {
                "untouched model": f"{runs[0]['base_score']:.3f}",
                **{f"draw {number}": f"{score:.3f}" for number, score in enumerate(scores)},
                "mean": f"{metrics['score']:.3f} ± {deviation:.3f} (deviation of a draw)",
                **{f"mean {name}": f"{one['score']:.3f}" for name, one in list(more.items())[1:]},
                **always,
                "written to": f"{output_dir}/: metrics.json, draw_0, draw_1, ...",
            },
        )
    return metrics
