"""What is left of a model that was scored through a cloze, and of several few-shot draws."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipelib.evaluation import TaskScore
from recipelib.models import count_parameters
from recipelib.runtime import gib, is_main_process, print_table, versions, write_json, write_jsonl
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
        "metric": result.metric,
        "score": result.score,
        "stderr": result.stderr,
        **result.details,
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
        encoder.template.save(folder / "template.yaml")
        write_jsonl(folder / "predictions.jsonl", result.records)
        write_json(folder / "metrics.json", metrics)
        others = {key: f"{value:.3f}" for key, value in result.details.items()}
        print_table(
            "Done",
            {
                "untouched model": result,
                **others,
                "peak memory": f"{gib(peak_memory_bytes)} GiB",
                "written to": f"{folder}/: metrics.json, predictions.jsonl",
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
    metrics = {
        **same,
        "score": statistics.mean(scores),
        "stderr": deviation / len(scores) ** 0.5,
        "score_std": deviation,
        "draws": scores,
        "train_seconds": sum(run["train_seconds"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
    }
    if is_main_process():
        write_json(Path(output_dir) / "metrics.json", metrics)
        print_table(
            f"{len(runs)} draws",
            {
                "untouched model": f"{runs[0]['base_score']:.3f}",
                **{f"draw {number}": f"{score:.3f}" for number, score in enumerate(scores)},
                "mean": f"{metrics['score']:.3f} ± {deviation:.3f} (deviation of a draw)",
                "written to": f"{output_dir}/: metrics.json, draw_0, draw_1, ...",
            },
        )
    return metrics
