"""What a run shows and keeps: the summary, JSON files, the loss curve, the model card."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recipelib.runtime.errors import UserError


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values in two columns, on the main process only (`RANK` unset or 0).

    In a terminal the table has the terminal's width and colors; in a file or a pipe it is plain
    text, 100 columns wide.
    """
    if os.environ.get("RANK", "0") != "0":
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    plain = {} if sys.stdout.isatty() else {"width": 100, "force_terminal": False}
    table = Table(title=Text(printable(title), "bold"), title_justify="left", show_header=False)
    table.add_column(style="cyan", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():  # as Text, in which [brackets] are no markup
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console(**plain).print(table)


def printable(value: object) -> str:
    """A value as text, without what would spoil a terminal or a stream that is not UTF-8."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
    text = "-" if value is None else str(value)
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_json(path: str | os.PathLike, data: object) -> None:
    """Write a file whole or not at all; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_jsonable(data), ensure_ascii=False, allow_nan=False, indent=2)
    with replacing(path) as temporary:
        temporary.write_bytes(_utf8(text))


def read_metrics(folder: Path | str) -> dict:
    """What a run's metrics.json holds; empty where there is none.

    Raises:
        UserError: it is no JSON.
    """
    path = Path(folder) / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path}: is not what a run writes; name another --output_dir") from None


def write_jsonl(path: str | os.PathLike, records: Iterable[object]) -> None:
    """Write one JSON value per line, as `write_json` does."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for record in records:
            file.write(_utf8(json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False)))


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path`, to be written in the block; at its end it takes the place of
    `path` in one step. After an error what stood there stays, and nothing else is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _utf8(line: str) -> bytes:
    # A lone surrogate has no UTF-8; Python's backslash escape of it is JSON's escape of it as well.
    return (line + "\n").encode("utf-8", "backslashreplace")


BLUE, LIGHT_BLUE, ORANGE, RED, GRAY = "#0b5394", "#9fc5e8", "#d95f02", "#c00000", "#666666"


def plot_loss(
    log_history: list[dict], path: str | os.PathLike, *, title: str, subtitle: str = ""
) -> None:
    """Draw the curves of a training run as a PNG of 1600 x 900 pixels.

    Args:
        log_history: that of `trainer_state.json`: entries with `step` and `loss`, `eval_loss` or
            `learning_rate`. Losses that are not finite are marked at the lower edge.
        path: where to write.
        title: one line, shortened to fit, as is `subtitle` below it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps, losses = _logged(log_history, "loss")
    good_steps, good = _finite(steps, losses)
    eval_steps, eval_losses = _finite(*_logged(log_history, "eval_loss"))
    rate_steps, rates = _finite(*_logged(log_history, "learning_rate"))
    low, high = _limits(good, eval_losses)
    smooth = _smooth(np.minimum(good, high))  # or one spike would bend the curve for a long time

    figure = Figure(figsize=(10, 5.625), dpi=160, facecolor="white")
    left, width, bottom = 0.075, 0.8, 0.32 if len(rates) else 0.11
    plain = {"va": "center", "parse_math": False}  # a $ is a dollar
    figure.text(left, 0.95, shortened(title, 75), fontsize=15, weight="bold", **plain)
    figure.text(left, 0.905, shortened(subtitle, 115), fontsize=10.5, color=GRAY, **plain)
    axes = figure.add_axes((left, bottom, width, 0.82 - bottom), xlim=(0, 1), ylim=(low, high))

    thin, dots = 0.8 if len(steps) <= 1000 else 0.4, "o" if len(steps) <= 60 else ""
    axes.plot(steps, losses, color=LIGHT_BLUE, linewidth=thin, marker=dots, markersize=4)
    axes.plot(good_steps, smooth, color=BLUE, linewidth=2)
    axes.plot(good_steps[-1:], smooth[-1:], color=BLUE, marker="o", markersize=6)
    axes.plot(eval_steps, eval_losses, color=ORANGE, linewidth=1.2, marker="D", markersize=5)

    # Direct labels at the ends of the curves, pushed apart where they would touch.
    ends = [(smooth, BLUE, "training"), (eval_losses, ORANGE, "evaluation")]
    ends = sorted((curve[-1], color, name) for curve, color, name in ends if len(curve))
    heights = [(value - low) / (high - low) for value, _, _ in ends]
    if len(heights) == 2 and heights[1] - heights[0] < 0.13:
        middle = min(max(sum(heights) / 2, 0.1), 0.9)
        heights = [middle - 0.065, middle + 0.065]
    for (value, color, name), height in zip(ends, heights, strict=True):
        label = {"x": 1.012, "y": height, "s": f"{name}\n{value:.4g}", "color": color}
        axes.text(**label, transform=axes.transAxes, fontsize=11, va="center")

    how = " and moving average" if len(good) >= 20 else " and running median"
    heading = {"fontsize": 9.5, "color": GRAY}
    axes.set_title(f"loss: each logged step{how * (len(good) >= 5)}", loc="left", **heading)
    bad_steps = steps[~np.isfinite(losses)]
    notes = []
    if len(bad_steps):
        foot = np.full(len(bad_steps), 0.03)
        axes.plot(bad_steps, foot, "x", color=RED, mew=1.8, transform=axes.get_xaxis_transform())
        notes.append(f"× {len(bad_steps):,} not finite, first at step {bad_steps[0]:,.0f}")
    if above := np.count_nonzero(good > high):
        notes.append(f"↑ {above:,} above the axis, up to {good.max():.4g}")
    heading["color"] = RED if len(bad_steps) else GRAY
    axes.set_title("    ".join(notes), loc="right", **heading)
    if not ends:
        axes.text(0.5, 0.5, "no finite loss was logged", transform=axes.transAxes, ha="center")
        axes.set_yticks([])

    panels = [axes]
    if len(rates):
        slim = figure.add_axes((left, 0.11, width, 0.13), sharex=axes)
        slim.plot(rate_steps, rates, color=GRAY, linewidth=1.4, marker=dots, markersize=2.5)
        slim.set_title("learning rate", loc="left", fontsize=9.5, color=GRAY)
        peak = rates.max()
        ticks = {peak: np.format_float_scientific(peak, 2, trim="-", exp_digits=1), 0: "0"}
        slim.set_yticks([*ticks], [*ticks.values()])
        slim.set_ylim(-0.08 * (peak or 1), 1.15 * (peak or 1))
        axes.tick_params(labelbottom=False)
        panels.append(slim)
    for panel in panels:
        panel.grid(axis="y", color="#e8e8e8", linewidth=0.8)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color("#bbbbbb")
        panel.tick_params(length=0, labelsize=10, colors=GRAY)
    seen = np.concatenate([steps, eval_steps, rate_steps])
    if len(seen):
        margin = 0.015 * np.ptp(seen) or 1.0
        axes.set_xlim(seen.min() - margin, seen.max() + margin)
    panels[-1].xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10], integer=True))
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[-1].set_xlabel("step", fontsize=10, color=GRAY)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def shortened(text: str, width: int) -> str:
    """A text as one line of at most `width` characters (1 or more), with "…" for what is cut."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _logged(log_history: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values [n] of the entries with this key; null, as in our JSON, is NaN."""
    entries = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    values = [math.nan if value is None else float(value) for _, value in entries]
    return np.array([step for step, _ in entries], dtype=float), np.array(values)


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """An exponential moving average over a 25th of the values, without pull towards 0 at the start.

    Fewer than 20 values get a running median of three with Tukey's end points (1977), fewer than
    five stay as they are.
    """
    if len(values) < 5:
        return values
    if len(values) < 20:
        inner = np.median([values[:-2], values[1:-1], values[2:]], axis=0)
        first = np.median([values[0], inner[0], 3 * inner[0] - 2 * inner[1]])
        last = np.median([values[-1], inner[-1], 3 * inner[-1] - 2 * inner[-2]])
        return np.array([first, *inner, last])
    decay = 1 - 2 / (max(5, len(values) / 25) + 1)
    average, smooth = 0.0, []
    for count, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        smooth.append(average / (1 - decay**count))
    return np.array(smooth)


def _limits(losses: np.ndarray, eval_losses: np.ndarray) -> tuple[float, float]:
    """The y range: all but losses far above the rest, such as the first steps' or a spike."""
    everything = np.concatenate([losses, eval_losses])
    if not len(everything):
        return 0.0, 1.0
    low, high = everything.min(), everything.max()
    if len(losses) >= 20:
        settled = losses[max(1, len(losses) // 50) :]
        usual = max([np.percentile(settled, 99, method="lower"), *eval_losses])
        high = everything[everything <= usual + 0.75 * (usual - low)].max()
    pad = 0.06 * (high - low) or max(0.05 * abs(high), 0.01)
    return low - pad, high + pad


def versions() -> dict[str, str]:
    """Python's version and those of the libraries that decide a result, as far as installed."""
    found = {"python": platform.python_version()}
    packages = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate"]
    for package in [*packages, "bitsandbytes"]:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def model_card(
    *,
    title: str,
    template_description: str,
    base_model: str,
    method: str,
    command: str,
    metrics: Mapping,
    versions: Mapping,
    load_snippet: str,
    license: str | None = None,
    library_name: str = "peft",
    pipeline_tag: str | None = None,
) -> str:
    """A README.md for the trained result, with the front matter that the Hugging Face hub reads.

    Args:
        title: the heading.
        template_description: what the task is, from the template.
        base_model: a hub id, or a folder; only a hub id can stand in the front matter.
        method: as in `metrics.json`; also a tag on the hub.
        command: the command line that trained it.
        metrics: as in `metrics.json`: `metric`, `score`, `stderr`, `base_score` and `eval_rows` are
            used.
        versions: as `versions()` gives them.
        load_snippet: Python that loads the result without these recipes.
        license: the base model's, where known.
        library_name: what loads it: `peft`, or `transformers` for a whole model.
        pipeline_tag: such as `text-generation` or `fill-mask`, where known.

    Returns:
        Markdown. No text given can end a code block, start a new table cell or leave the YAML.
    """
    metric = metrics.get("metric")
    front = {
        "base_model": base_model if _is_hub_id(base_model) else None,
        "library_name": library_name,
        "license": license,
        "pipeline_tag": pipeline_tag,
        "tags": [method],
        "metrics": [metric] if metric else None,
    }
    front = {key: value for key, value in front.items() if value is not None}
    rows = _figure(metrics.get("eval_rows"))
    before, after = _figure(metrics.get("base_score")), _figure(metrics.get("score"))
    error = _figure(metrics.get("stderr"))
    used = "\n".join(f"- {_plain(name)} {_plain(version)}" for name, version in versions.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10**6)}---

# {_plain(title)}

{_plain(template_description)}

{_code(base_model)}, trained with the method {_code(method)}:

{_fenced("bash", command)}

## Results

| | {_plain(metric or "score")} | rows |
|---|---|---|
| before training | {before} | {rows} |
| after training | {after}{f" ± {error}" if error else ""} | {rows} |

## Use

{_fenced("python", load_snippet)}

## Versions

{used}
"""


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _figure(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _plain(text: object) -> str:
    """One line in which no character means anything to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    ticks = "`" * (_longest_ticks(text) + 1)
    pad = " " if "`" in text else ""  # else a backtick at an end would join the delimiter
    return f"{ticks}{pad}{' '.join(text.split())}{pad}{ticks}"


def _fenced(language: str, text: str) -> str:
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
