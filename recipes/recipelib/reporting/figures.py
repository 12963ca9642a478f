"""The figures of a run: its loss, the confusion matrix, the reliability diagram."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from recipelib.runtime import replacing

BLUE, LIGHT_BLUE, ORANGE, RED, GRAY = "#0b5394", "#9fc5e8", "#d95f02", "#c00000", "#666666"
# Sizes are in inches, of fonts in points. Texts are measured, so that none runs into another.
_DPI, _EDGE = 160, 0.25
_PLAIN = {"va": "center", "parse_math": False}  # a $ is a dollar
_DASHED = {"color": "#999999", "linewidth": 1, "linestyle": (0, (4, 3))}
_AXIS = {"fontsize": 10, "color": GRAY}
_HEADING = {"loc": "left", "fontsize": 9.5, "color": GRAY}
_OTHER = object()  # any class that is not drawn
_COLUMNS = {_OTHER: "(other classes)", None: "(no class)"}
_MOST_CLASSES = 80  # in one figure; more cannot be read


def plot_confusion(
    golds: Sequence[str],
    predictions: Sequence[str | None],
    labels: Sequence[str],
    path: str | os.PathLike,
    *,
    title: str,
    subtitle: str = "",
) -> None:
    """Draw which class is taken for which as a PNG: a row for each gold class, shaded by its share,
    blue where it is right and orange where it is wrong. Of more than 80 classes those with the most
    mistakes.

    Args:
        golds, predictions: [n] labels; a prediction that is none of them, such as None, has a
            column of its own.
        labels: the classes in order.
        path, title, subtitle: as in `plot_loss`.
    """
    from matplotlib.colors import to_rgb

    heading, known = "predictions, shaded by their share of the gold class", {*labels}
    pairs = Counter(
        (gold, said if said in known else None)
        for gold, said in zip(golds, predictions, strict=True)
    )
    if len(labels) > _MOST_CLASSES:
        heading = f"the {_MOST_CLASSES} of {len(labels)} classes with the most mistakes; {heading}"
        labels = _most_mistaken(pairs, labels)
        pairs = _within(pairs, labels)
    columns = [*labels, *(key for key in _COLUMNS if any(said is key for _, said in pairs))]
    counts = np.zeros((len(labels), len(columns)), dtype=int)
    for (gold, said), count in pairs.items():
        counts[labels.index(gold), columns.index(said)] += count
    shares = (counts / np.maximum(counts.sum(1, keepdims=True), 1))[..., None]
    right = np.eye(*counts.shape, dtype=bool)[..., None]
    colors = np.where(right, to_rgb(BLUE), to_rgb(ORANGE)) * shares
    colors += np.array(to_rgb("#f4f4f4")) * (1 - shares)

    tall = float(np.clip(5 / len(labels), 0.17, 0.75))  # a cell
    wide = float(np.clip(6 / len(columns), tall, 2))
    font = float(np.clip(36 * tall, 8, 11))
    names = [_fitted(_COLUMNS.get(label, label), 3, font) for label in columns]
    longest = max(_inches(name, font) for name in names)
    turn = 0 if longest < wide - 0.1 else 40 if wide > 0.35 else 90
    left = _EDGE + 0.3 + longest + 0.1
    bottom = 0.65 + longest * np.sin(np.radians(turn))
    width = max(left + wide * len(columns) + _EDGE, 6.4)
    height = bottom + tall * len(labels) + 1.15
    figure = _figure(title, subtitle, width, height)
    axes = _axes(figure, left, bottom, wide * len(columns), tall * len(labels))
    axes.imshow(colors, aspect="auto", interpolation="nearest")
    align = {"rotation": turn, "ha": "right", "rotation_mode": "anchor"} if turn else {}
    align |= {"va": "center"} if turn == 90 else {}
    axes.set_xticks(range(len(columns)), names, fontsize=font, parse_math=False, **align)
    axes.set_yticks(range(len(labels)), names[: len(labels)], fontsize=font, parse_math=False)
    axes.set_xlabel("predicted", fontsize=10, color=GRAY)
    axes.set_ylabel("gold", fontsize=10, color=GRAY)
    axes.set_title(heading, **_HEADING)
    if _inches(f"{counts.max():,}", font) < 0.95 * wide:
        dark = colors @ (0.299, 0.587, 0.114) < 0.6  # how bright they look
        for row, column in np.argwhere(counts):
            color = "white" if dark[row, column] else "#333333"
            number = f"{counts[row, column]:,}"
            axes.text(column, row, number, ha="center", va="center", fontsize=font, color=color)
    axes.grid(False)  # but white lines between the cells
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(labels) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=min(2, 4 * tall))
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _most_mistaken(pairs: Counter, labels: Sequence[str]) -> list[str]:
    """The classes that are most often taken for another, or another for them, in their order."""
    mistakes: Counter[str] = Counter()
    for (gold, said), count in pairs.items():
        if gold != said:
            mistakes.update({gold: count, said: count})
    worst = sorted(labels, key=lambda label: -mistakes[label])[:_MOST_CLASSES]
    return [label for label in labels if label in worst]


def _within(pairs: Counter, labels: Sequence[str]) -> Counter:
    """The pairs whose gold class is one of these; what is predicted besides becomes one column."""
    within: Counter = Counter()
    for (gold, said), count in pairs.items():
        if gold in labels:
            within[gold, said if said in (*labels, None) else _OTHER] += count
    return within


def calibration_error(
    confidences: Sequence[float], right: Sequence[bool], bins: int = 10
) -> tuple[float, list[tuple[float, float, int]]]:
    """The expected calibration error (Guo et al. 2017, arXiv:1706.04599): the mean distance of
    confidence and accuracy, over equally wide bins weighted by their predictions.

    Args:
        confidences: [n] from 0 to 1, at least one.
        right: [n] whether each prediction is right.

    Returns:
        The error, and for each bin its mean confidence, its accuracy and its number of predictions;
        zeros for an empty one.
    """
    confidences, right = np.asarray(confidences, dtype=float), np.asarray(right, dtype=float)
    place = np.minimum((confidences * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    used = np.maximum(counts, 1)
    means = np.bincount(place, confidences, bins) / used
    shares = np.bincount(place, right, bins) / used
    error = float(counts @ np.abs(means - shares)) / len(confidences)
    return error, list(zip(means.tolist(), shares.tolist(), counts.tolist(), strict=True))


def plot_reliability(
    curves: Mapping[str, tuple[Sequence[float], Sequence[bool]]],
    path: str | os.PathLike,
    *,
    title: str,
    subtitle: str = "",
) -> None:
    """Draw how often a prediction is right against how sure the model is, as a PNG.

    Args:
        curves: name -> the confidence [n] of each prediction, and whether it is right; one or two.
        path, title, subtitle: as in `plot_loss`.
    """
    left, room = 0.75, max(_inches(name, 10) for name in curves)
    figure = _figure(title, subtitle, left + 5.5 + 0.3 + room + _EDGE, 6.75, left)
    axes = _axes(figure, left, 2.1, 5.5, 3.4)
    below = _axes(figure, left, 0.65, 5.5, 1.1, sharex=axes)
    axes.plot([0, 1], [0, 1], **_DASHED)
    ends = []
    for number, ((name, (confidences, right)), color) in enumerate(
        zip(curves.items(), (BLUE, ORANGE), strict=False)
    ):
        error, bins = calibration_error(confidences, right)
        used = [(mean, share) for mean, share, count in bins if count]
        sizes = [20 + 200 * count / len(confidences) for _, _, count in bins if count]
        x, y = zip(*used, strict=True)
        line = {"color": color, "clip_on": False}
        axes.plot(x, y, linewidth=2, zorder=3, **line)
        axes.scatter(x, y, s=sizes, zorder=4, edgecolors="white", linewidths=0.8, **line)
        ends.append((y[-1], f"{name}\nECE {error:.3f}", color))
        wide = 0.09 / len(curves)
        places = [0.1 * at + 0.005 + wide * (number + 0.5) for at in range(len(bins))]
        below.bar(places, [count for _, _, count in bins], width=0.92 * wide, color=color)
    halves = all(min(confidences) >= 0.5 for confidences, _ in curves.values())
    axes.set(xlim=(0.5 if halves else 0, 1), ylim=(0, 1))
    _label_ends(axes, ends, 0.12, 10)
    heading = "accuracy; below the dashed line the model is surer than right"
    axes.set_title(heading, pad=10, **_HEADING)
    below.set_title("predictions", **_HEADING)
    below.set_xlabel("confidence: the probability of the predicted class", **_AXIS)
    axes.tick_params(labelbottom=False)
    below.tick_params(axis="x", pad=7)
    below.locator_params(axis="y", nbins=3, integer=True)
    _save(figure, path)


def plot_shots(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    path: str | os.PathLike,
    *,
    title: str,
    subtitle: str = "",
    chance: Mapping[str, float] | None = None,
) -> None:
    """Draw a score over the number of shots as a PNG: a panel per task, a line per way of scoring
    through the means over draws, around it a band of one standard deviation, and a dot per draw.

    Args:
        panels: task -> way of scoring -> shots -> the score of each draw; at most three ways.
        path, title, subtitle: as in `plot_loss`.
        chance: task -> what answering with the most frequent class would score.
    """
    chance = chance or {}
    wide, left = (2.75 if len(panels) > 1 else 6), 0.7
    names = {"majority class", *(name for lines in panels.values() for name in lines)}
    step = wide + 0.4 + max(_inches(name, 9.5) for name in names)
    width = left + step * len(panels) - 0.15 + _EDGE
    figure = _figure(title, subtitle, width, 4.8, left)
    values, labels, first = [], [], None
    for number, (task, lines) in enumerate(panels.items()):
        axes = _axes(figure, left + step * number, 0.65, wide, 2.9, sharey=first)
        first = first or axes
        shots = sorted({count for line in lines.values() for count in line})
        ends = []
        for at, ((name, line), color) in enumerate(
            zip(lines.items(), (BLUE, ORANGE, RED), strict=False)
        ):
            draws = [line[count] for count in sorted(line)]
            x = np.array([shots.index(count) for count in sorted(line)])
            means = np.array([np.mean(scores) for scores in draws])
            spread = np.array(
                [np.std(scores, ddof=1) if len(scores) > 1 else 0 for scores in draws]
            )
            axes.fill_between(x, means - spread, means + spread, color=color, alpha=0.15, lw=0)
            axes.plot(x, means, color=color, linewidth=2, marker="o", markersize=5)
            beside = x + 0.2 * (at - (len(lines) - 1) / 2)  # clear of the line and of other dots
            dots = zip(beside, draws, strict=True)
            dots = [(at, score) for at, scores in dots if len(scores) > 1 for score in scores]
            axes.plot(*np.reshape(dots, (-1, 2)).T, ".", color=color, alpha=0.5, markersize=5)
            ends.append((means[-1], f"{name}\n{means[-1]:.2f}", color))
            values += [*(means - spread), *(means + spread), *(score for _, score in dots)]
        if task in chance:
            axes.axhline(chance[task], **_DASHED)
            ends.append((chance[task], f"majority class\n{chance[task]:.2f}", GRAY))
            values.append(chance[task])
        axes.set_xlim(-0.25, len(shots) - 0.75)
        axes.set_xticks(range(len(shots)), shots)
        axes.set_title(_fitted(task, wide, 11), loc="left", fontsize=11, pad=10, parse_math=False)
        axes.set_xlabel("demonstrations", **_AXIS)
        labels.append((axes, ends))
    pad = 0.03 * (max(values) - min(values)) or 0.05
    ticks = first.yaxis.get_major_locator().tick_values(min(values) - pad, max(values) + pad)
    first.set_ylim(ticks[0], ticks[-1])
    for axes, ends in labels:
        axes.tick_params(labelleft=axes is first)
        _label_ends(axes, ends, 0.13, 9.5)
    _save(figure, path)


def _figure(title: str, subtitle: str, width: float, height: float, left: float = _EDGE):
    """An empty figure with its title and its subtitle at the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    x, room = left / width, width - left - _EDGE
    bold = _fitted(title, room, 14, "bold")
    figure.text(x, 1 - 0.33 / height, bold, fontsize=14, weight="bold", **_PLAIN)
    gray = _fitted(subtitle, room, 10)
    figure.text(x, 1 - 0.63 / height, gray, fontsize=10, color=GRAY, **_PLAIN)
    return figure


def _axes(figure, left: float, bottom: float, wide: float, tall: float, **shared):
    width, height = figure.get_size_inches()
    place = (left / width, bottom / height, wide / width, tall / height)
    axes = figure.add_axes(place, **shared)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.tick_params(length=0, labelsize=10, colors=GRAY)
    return axes


def _save(figure, path: str | os.PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a line of text is drawn."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(size=size, weight=weight)
    renderer = RendererAgg(1, 1, _DPI)
    return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / _DPI


def _fitted(text: str, room: float, size: float, weight: str = "normal") -> str:
    """The text as one line, shortened to be at most `room` wide."""
    longest = shortened(text, int(30 * room))
    if _inches(longest, size, weight) <= room:
        return longest

    def wide(length: int) -> float:
        return _inches(shortened(text, length), size, weight)

    fit = bisect_right(range(1, len(longest)), room, key=wide)
    return shortened(text, fit) if fit else ""


def _label_ends(axes, ends: Iterable[tuple[float, str, str]], gap: float, size: float) -> None:
    """Write (height, text, color) of each line at the right of the axes, `gap` of its height apart
    where lines end closer together.
    """
    ends = sorted(ends)
    low, high = axes.get_ylim()
    heights = _apart([(end - low) / (high - low) for end, _, _ in ends], gap)
    for height, (_, text, color) in zip(heights, ends, strict=True):
        where = {"x": 1.035, "y": height, "transform": axes.transAxes}
        axes.text(**where, s=text, color=color, fontsize=size, **_PLAIN)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights within 0 and 1, moved as little as needed (least squares) to lie `gap` apart.

    Less `gap` per place they only have to rise: pool adjacent violators (Ayer et al. 1955).
    """
    pools: list[list[float]] = []
    for place, height in enumerate(heights):
        pools.append([height - place * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [float(np.mean(pool)) for pool in pools for _ in pool]
    top = 1 - (len(heights) - 1) * gap
    return [min(max(height, 0.0), top) + place * gap for place, height in enumerate(flat)]


def plot_layers(
    layers: Mapping[int, tuple[float, float]],
    path: str | os.PathLike,
    *,
    title: str,
    subtitle: str = "",
    guessing: float,
) -> None:
    """Draw the accuracy of what is told from each layer's states as a PNG.

    Args:
        layers: by its number the mean and the deviation of each layer.
        path, title, subtitle: as in `plot_loss`.
        guessing: the accuracy of always answering with the most frequent class.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    numbers = np.array(sorted(layers))
    means, deviations = np.array([layers[number] for number in numbers]).T
    figure = _figure(title, subtitle, 8, 4.5)
    axes = _axes(figure, 0.85, 0.65, 6.7, 2.75)
    low = min(guessing, (means - deviations).min())
    high = min(1.0, (means + deviations).max())
    edge = 0.06 * (high - low)
    axes.set_ylim(low - edge, high + 2 * edge)
    axes.fill_between(numbers, means - deviations, means + deviations, color=LIGHT_BLUE, alpha=0.5)
    axes.plot(numbers, means, color=BLUE, linewidth=2, marker="o", markersize=4)
    best = int(numbers[means.argmax()])
    axes.plot([best], [means.max()], "o", color=ORANGE, markersize=8)
    right = best > numbers.mean()
    axes.annotate(
        f"layer {best}: {means.max():.3f}",
        (best, means.max()),
        xytext=(-6 if right else 6, 8),
        textcoords="offset points",
        ha="right" if right else "left",
        color=ORANGE,
        fontsize=10,
    )
    axes.axhline(guessing, **_DASHED)
    axes.text(
        numbers[-1], guessing, "majority class", ha="right", va="bottom", fontsize=9, color=GRAY
    )
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("layer (0: the embeddings)", **_AXIS)
    axes.set_title("accuracy in cross-validation, and its deviation over the folds", **_HEADING)
    _save(figure, path)


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
    room = 10 * (1 - left) - _EDGE
    bold = _fitted(title, room, 15, "bold")
    figure.text(left, 0.95, bold, fontsize=15, weight="bold", **_PLAIN)
    gray = _fitted(subtitle, room, 10.5)
    figure.text(left, 0.905, gray, fontsize=10.5, color=GRAY, **_PLAIN)
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
    _save(figure, path)


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
