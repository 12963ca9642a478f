"""What an evaluation with demonstrations shows and leaves in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipelib.encoding import Asked
from recipelib.evaluation import (
    RIGHT_OR_WRONG,
    FewShotScore,
    TaskScore,
    identify_rows,
    probabilities,
)
from recipelib.models import count_parameters
from recipelib.reporting.classes import plot_classes, show_classes
from recipelib.reporting.figures import calibration_error, plot_reliability
from recipelib.runtime import (
    UserError,
    clear_figures,
    gib,
    is_main_process,
    print_table,
    say,
    versions,
    write_json,
    write_jsonl,
)
from recipelib.task import FewShotTask

_Z = 1.96  # of a 95 % interval
# Whose scores are log-probabilities of the labels; per token and per byte they are not.
_SURE = {"uncalibrated": "sum", "calibrated": "calibrated"}


def save_few_shot(result: FewShotScore, task: FewShotTask, args, training, model) -> dict | None:
    """Write predictions.jsonl, the figures, the template and, last, metrics.json; print a summary.
    Of rows that were answered for --predict only the predictions are written.

    Args:
        args: of `icl_eval.py`.

    Returns:
        The content of metrics.json; None for rows without answers.

    Raises:
        UserError: no row fits.
    """
    folder, encoder, template = Path(training.output_dir), task.encoder, task.template
    score, written = result.together, ["predictions.jsonl"]
    records = score.records
    if not score.rows:
        raise UserError(
            f"--max_length {encoder.max_length}: none of the {score.left_out} rows fits, even "
            "without demonstrations; raise it"
        )
    identify_rows(records, task.evaluation.rows)
    if args.predict:
        target = folder / f"predictions_{Path(args.predict).stem}.jsonl"
        if is_main_process():
            write_jsonl(target, records)
        say(f"{score.rows} rows answered, {score.left_out} left out as too long: {target}")
        return None
    facts = {
        "model": task.model_name,
        "adapter": args.adapter,
        "shots": task.shots,
        "sampler": task.sampler if task.shots else None,
        "score_by": args.score if result.by_score else None,
        "reasoning": args.reasoning,
        "samples": args.samples,
        "temperature": args.temperature,
        "eval_source": task.evaluation.source,
        "train_rows": len(task.train.rows) if task.train else 0,
        "peak_memory_bytes": task.memory.stop(),
    }
    metrics = _metrics(result, score, encoder, training, model, facts)
    curves = {
        name: confidences(records, kind) for name, kind in _SURE.items() if kind in result.by_score
    }
    if curves:
        errors = {name: calibration_error(*curve)[0] for name, curve in curves.items()}
        metrics["calibration_error"] = errors
    if not is_main_process():
        return metrics

    write_jsonl(folder / "predictions.jsonl", records)
    clear_figures(training.output_dir)
    template.save(folder / "template.yaml")
    heading = f"{_model(metrics)}, {_several(metrics['shots'], 'shot')}"
    if len(result.draws) > 1:
        heading += f", {len(result.draws)} draws together"
    written += plot_classes(score, template.name, folder, heading)
    if curves:
        plot_reliability(
            curves,
            folder / "reliability.png",
            title=f"{template.name}: is it as right as it is sure?",
            subtitle=f"{heading}, {score.rows:,} rows",
        )
        written.append("reliability.png")
    write_json(folder / "metrics.json", metrics)
    show_classes(score, template.name)
    _show(metrics, score, f"{folder}/: {', '.join(['metrics.json', *written])}")
    return metrics


def interval(metric: str, score: float, stderr: float, rows: int) -> tuple[float, float]:
    """A 95 % interval of a score for the choice of rows: Wilson's (1927) where a row is right or
    wrong, otherwise 1.96 standard errors to both sides, within what the metric can be.
    """
    if metric in RIGHT_OR_WRONG:
        shrink = 1 + _Z**2 / rows
        middle = (score + _Z**2 / (2 * rows)) / shrink
        half = _Z / shrink * math.sqrt(score * (1 - score) / rows + _Z**2 / (4 * rows**2))
    else:
        middle, half = score, _Z * stderr
    least, most = {"loss": (0, math.inf), "matthews": (-1, 1)}.get(metric, (0, 1))
    low, high = np.clip([middle - half, middle + half], least, most)
    return float(low), float(high)


def confidences(records: Sequence[Mapping], kind: str) -> tuple[list[float], list[bool]]:
    """The probability of what each record predicts by a kind of score, and whether it is right."""
    sure, right = [], []
    for record in records:
        said = record["predictions"][kind]
        sure.append(probabilities(record["scores"][kind])[said])
        right.append(said == record["answer"])
    return sure, right


def _metrics(
    result: FewShotScore, score: TaskScore, encoder, training, model, facts: Mapping
) -> dict[str, Any]:
    """What metrics.json holds of every task; the same on all processes.

    Args:
        score: the mean over draws.
    """
    scores = [draw.score for draw in result.draws]
    peak = torch.tensor([facts["peak_memory_bytes"]], device=training.device)
    if training.world_size > 1:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    bounds = interval(score.metric, score.score, score.stderr, score.rows)
    answered = score.rows * len(scores)
    return {
        "task": encoder.template.name,
        "method": "in-context learning",
        **facts,
        **score.figures(),
        "confidence_interval": list(bounds),
        "draws": len(scores),
        "draw_scores": scores,
        "std_over_draws": _spread(scores),
        "scores": {
            kind: {
                "mean": float(np.mean(values)),
                "std_over_draws": _spread(values),
                "draws": values,
            }
            for kind, values in result.by_score.items()
        },
        "base_score": None if facts["adapter"] else score.score,
        "eval_rows": score.rows,
        "eval_rows_left_out": score.left_out,
        **_cuts([row for draw in result.asked for row in draw]),
        "train_tokens": 0,
        "supervised_tokens": 0,
        "padding_fraction": 0.0,
        "tokens_per_second": 0.0,
        "train_seconds": 0.0,
        "eval_seconds": result.seconds,
        "rows_per_second": answered / result.seconds if result.seconds else 0.0,
        "trainable_parameters": 0,
        "total_parameters": count_parameters(model)[1],
        "peak_memory_bytes": int(peak),
        "rendering": "chat" if encoder.chat else "text",
        "chat_template_kwargs": encoder.text.chat_template_kwargs,
        "max_length": encoder.max_length,
        "world_size": training.world_size,
        "distributed_type": training.distributed_state.distributed_type.value,
        "seed": training.seed,
        "versions": versions(),
    }


def _cuts(asked: Sequence[Asked]) -> dict[str, int | None]:
    """What was cut away to make prompts fit, over all draws; for a loss it is not known."""
    cuts = {
        "prompts_shortened": sum(prompt.shortened for row in asked for prompt in row.prompts),
        "demonstrations_dropped": sum(row.dropped for row in asked),
        "rows_with_dropped_demonstrations": len({row.row for row in asked if row.dropped}),
    }
    return cuts if asked else dict.fromkeys(cuts)


def _spread(values: Sequence[float]) -> float:
    """The standard deviation over draws; NaN where there is one only."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _model(metrics: Mapping[str, Any]) -> str:
    return metrics["model"] + (f" with {metrics['adapter']}" if metrics["adapter"] else "")


def _show(metrics: Mapping[str, Any], score: TaskScore, written: str) -> None:
    draws, (low, high) = metrics["draws"], metrics["confidence_interval"]

    def over_draws(spread: float) -> str:
        return f", ± {spread:.3f} over {draws} draws" if draws > 1 else ""

    by_score = {
        f"  by {kind}": f"{figures['mean']:.3f}{over_draws(figures['std_over_draws'])}"
        + (" (counts)" if kind == metrics["score_by"] else "")
        for kind, figures in metrics["scores"].items()
    }
    more = {
        name: f"{one['score']:.3f} ± {one['stderr']:.3f} over rows"
        for name, one in list(metrics.get("metrics", {}).items())[1:]
    }
    shown = f"{metrics['shots']} per prompt"
    if metrics["shots"]:
        shown += f", {metrics['sampler']}"
    if metrics["demonstrations_dropped"]:
        shown += (
            f"; {metrics['demonstrations_dropped']:,} dropped from prompts of "
            f"{metrics['rows_with_dropped_demonstrations']:,} rows, which were too long"
        )
    rows = f"{metrics['eval_rows']:,}"
    if metrics["prompts_shortened"] is not None:
        rows += f"; {metrics['prompts_shortened']:,} prompts shortened"
    if metrics["eval_rows_left_out"]:
        rows += f", {metrics['eval_rows_left_out']:,} rows left out: too long"
    print_table(
        "Done",
        {
            "model": _model(metrics),
            "demonstrations": shown,
            metrics["metric"]: f"{metrics['score']:.3f} ± {metrics['stderr']:.3f} over rows"
            + over_draws(metrics["std_over_draws"]),
            "95 % interval": f"{low:.3f} to {high:.3f}, for the choice of rows",
            **more,
            **score.notes(),
            **by_score,
            "rows": rows,
            "speed": f"{metrics['eval_seconds']:.1f} s, {metrics['rows_per_second']:.1f} rows/s",
            "peak memory": f"{gib(metrics['peak_memory_bytes'])} GiB",
            "written to": written,
        },
    )
