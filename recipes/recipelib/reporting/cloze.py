"""What prompt tuning shows of its rows, and what it leaves of a score and of several draws."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipelib.adapters.saved import BASE
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.scores import TaskScore
from recipelib.models.quantization import count_parameters
from recipelib.runtime.console import is_main_process, print_table
from recipelib.runtime.files import write_json, write_jsonl
from recipelib.runtime.versions import versions
from recipelib.training.memory import gib

LOAD_SNIPPET = """\
from transformers import {kind}, AutoTokenizer
{peft}
model = {kind}.from_pretrained({base!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""
LOAD_PROMPT = """\
model = PeftModel.from_pretrained(model, {folder!r})
# It stands in front: what the model says at the n-th token is logits[:, {virtual_tokens} + n].
"""
LOAD_VERBALIZER = """\

import sys

sys.path.append("recipes")  # of the collection
from recipelib.evaluation.cloze_evaluation import load_soft_verbalizer

load_soft_verbalizer({folder!r}, model)  # from now on its logits are those of the labels
"""


def save_score(
    result: TaskScore,
    encoder: PromptEncoder,
    training,
    model,
    model_name: str,
    peak_memory_bytes: int,
    method: Mapping[str, Any],
) -> dict:
    """Write predictions.jsonl, the template and metrics.json of a model that was scored only.

    Returns:
        The content of metrics.json.
    """
    folder = Path(training.output_dir)
    metrics = {
        "task": encoder.template.name,
        "method": "prompt (zero-shot)",
        "model": model_name,
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
        **method,
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
    same = {key: value for key, value in runs[0].items() if all(one[key] == value for one in runs)}
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


def load_snippet(model, tune: str, masked: bool, soft: bool, folder: str) -> str:
    """Code that loads what a run has saved, for its model card.

    Args:
        tune: what was tuned.
        soft: whether there is a soft verbalizer.
    """
    prompted = tune != "model"
    base = {"model": folder, "both": f"{folder}/{BASE}"}.get(tune)
    text = LOAD_SNIPPET.format(
        kind=f"AutoModelFor{'Masked' if masked else 'Causal'}LM",
        peft="from peft import PeftModel\n" if prompted else "",
        base=base or model.get_base_model().name_or_path,
        folder=folder,
    )
    if prompted:
        length = model.peft_config["default"].num_virtual_tokens
        shift = 0 if tune == "prefix" else length
        text += LOAD_PROMPT.format(folder=folder, virtual_tokens=shift)
    return text + (LOAD_VERBALIZER.format(folder=folder) if soft else "")
