"""Figures of a run: what is drawn is what was given, and no text runs into another."""

import math
import sys
from collections import Counter, defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from recipelib.reporting import figures
from recipelib.reporting.figures import (
    calibration_error,
    plot_confusion,
    plot_loss,
    plot_reliability,
    plot_shots,
)

BLUE, LIGHT_BLUE, ORANGE, RED, GRAY = "#0b5394", "#9fc5e8", "#d95f02", "#c00000", "#666666"
DPI = 160


def texts_of(figure) -> list:
    """Everything written in a figure, tick labels outside the limits and empty ones left out."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes._left_title, axes._right_title]
        for axis in (axes.xaxis, axes.yaxis):
            found += [axis.label, *(tick.label1 for tick in axis._update_ticks())]
    return [one for one in found if one.get_visible() and one.get_text().strip()]


def check_texts(figure) -> None:
    """No text is cut off at an edge of the figure, and none overlaps another."""
    width, height = figure.bbox.width, figure.bbox.height
    boxes = [(one, one.get_window_extent()) for one in texts_of(figure)]
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, text.get_text()
    for (text, box), (other, beside) in combinations(boxes, 2):
        if text.get_rotation() % 90 and other.get_rotation() % 90:
            continue  # slanted side by side: their boxes overlap, they do not
        x = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        y = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        assert min(x, y) <= 1, (text.get_text(), other.get_text())


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Calls a plot function; gives the figure as it stood when it was saved, with its texts
    checked.
    """
    kept, save = [], figures._save

    def keep(figure, path):
        save(figure, path)
        kept.append(figure)

    monkeypatch.setattr(figures, "_save", keep)

    def draw(plot, *data, title="movie_reviews: a title", subtitle="SmolLM2, 8 shots", **options):
        path = tmp_path / "figure.png"
        plot(*data, path, title=title, subtitle=subtitle, **options)
        assert list(tmp_path.iterdir()) == [path]
        figure = kept.pop()
        size = figure.bbox.height, figure.bbox.width
        assert imread(path).shape[:2] == pytest.approx(size, abs=1)
        assert figure.dpi == DPI
        assert figure.bbox.width >= 900
        check_texts(figure)
        return figure

    return draw


def said(rng, golds, labels, right=0.7):
    return [gold if rng.random() < right else str(rng.choice(labels)) for gold in golds]


def guessed(classes: list[str], rows=200, seed=0):
    """Gold labels and predictions, of which seven in ten are right."""
    rng = np.random.default_rng(seed)
    golds = [str(one) for one in rng.choice(classes, rows)]
    return golds, said(rng, golds, classes)


# The confusion matrix

TREC = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
LONG = [f"balance_not_updated_after_{what}_transfer_{what}" for what in ("bank", "card", "cash")]
MANY = [f"{word}_{number:02}" for number in range(5) for word in ("a", "card", "top_up", "fee")]


def numbers_of(figure) -> dict[tuple[int, int], str]:
    (axes,) = figure.axes
    return {tuple(map(round, one.get_position()[::-1])): one.get_text() for one in axes.texts}


@pytest.mark.parametrize(
    ("classes", "unreadable"),
    [(["negative", "positive"], False), (TREC, True), (LONG, False), (MANY, False)],
    ids=["two", "some without a class", "long names", "many"],
)
def test_the_numbers_in_the_matrix_are_the_counts(classes, unreadable, draw):
    golds, predictions = guessed(classes)
    if unreadable:
        predictions[::5] = [None] * len(predictions[::5])
    figure = draw(plot_confusion, golds, predictions, classes)
    columns = [*classes, None]
    expected = Counter(
        (classes.index(gold), columns.index(one))
        for gold, one in zip(golds, predictions, strict=True)
    )
    assert numbers_of(figure) == {place: str(count) for place, count in expected.items()}
    (axes,) = figure.axes
    names = [one.get_text() for one in axes.get_xticklabels()]
    assert [one.get_text() for one in axes.get_yticklabels()] == names[: len(classes)]
    assert names[len(classes) :] == ["(no class)"] * unreadable
    for name, label in zip(names, classes, strict=False):
        assert name == label or (name.endswith("…") and label.startswith(name[:-1]))


def test_of_very_many_classes_those_with_the_most_mistakes_are_drawn(draw, monkeypatch):
    monkeypatch.setattr(figures, "_MOST_CLASSES", 3)
    golds = [*"aabbccddee"]
    said = [*"abbcccdd", None, "a"]  # a is mistaken for b, b for c, e for a and for none
    figure = draw(plot_confusion, golds, said, [*"abcde"])
    (axes,) = figure.axes
    assert [one.get_text() for one in axes.get_yticklabels()] == ["a", "b", "e"]
    columns = ["a", "b", "e", "(other classes)", "(no class)"]
    assert [one.get_text() for one in axes.get_xticklabels()] == columns
    places = {(0, 0): 1, (0, 1): 1, (1, 1): 1, (1, 3): 1, (2, 0): 1, (2, 4): 1}
    assert numbers_of(figure) == {place: str(count) for place, count in places.items()}
    assert "the 3 of 5 classes with the most mistakes" in axes.get_title(loc="left")


def test_a_cell_is_shaded_by_its_share_blue_where_right_and_orange_where_wrong(draw):
    golds = ["a"] * 4 + ["b"] * 2
    figure = draw(plot_confusion, golds, ["a", "a", "a", "b", "a", "a"], ["a", "b", "c"])
    (image,) = figure.axes[0].images
    colors = np.asarray(image.get_array())
    pale = colors[0, 2]  # nobody said c
    for (row, column), share, color in (
        ((0, 0), 0.75, BLUE),
        ((0, 1), 0.25, ORANGE),
        ((1, 0), 1.0, ORANGE),
        ((1, 1), 0.0, BLUE),
        ((2, 2), 0.0, BLUE),  # a class without rows
    ):
        expected = share * np.array(to_rgb(color)) + (1 - share) * pale
        assert colors[row, column] == pytest.approx(expected)
    assert pale.min() > 0.9
    shown = {one.get_text(): one.get_color() for one in figure.axes[0].texts}
    assert (shown["3"], shown["1"]) == ("white", "#333333")


def test_a_class_name_of_any_length_leaves_room_for_the_matrix(draw):
    classes = ["W" * 300, "name of a class " * 20, "$x_{"]
    figure = draw(plot_confusion, classes, classes, classes)
    assert figure.axes[0].bbox.width > 0.6 * figure.bbox.width
    assert [one.get_text()[-1] for one in figure.axes[0].get_yticklabels()] == ["…", "…", "{"]


def test_counts_too_large_for_their_cells_are_left_to_the_shade(draw):
    golds = ["a_00"] * 1500
    assert numbers_of(draw(plot_confusion, golds, golds, MANY)) == {}
    golds = ["a"] * 12_345
    assert numbers_of(draw(plot_confusion, golds, golds, ["a", "b"])) == {(0, 0): "12,345"}


# The reliability diagram


@given(
    st.lists(
        st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 20),
)
def test_the_calibration_error_is_that_of_a_naive_computation(pairs, bins):
    members = defaultdict(list)
    for sure, right in pairs:
        members[min(int(sure * bins), bins - 1)].append((sure, right))
    error, found = calibration_error(*zip(*pairs, strict=True), bins)
    distances = [
        abs(sum(s for s, _ in some) - sum(r for _, r in some)) for some in members.values()
    ]
    assert error == pytest.approx(sum(distances) / len(pairs), abs=1e-9)
    assert len(found) == bins
    for place, (mean, share, count) in enumerate(found):
        some = members[place]
        assert count == len(some)
        assert mean == pytest.approx(sum(s for s, _ in some) / max(count, 1))
        assert share == pytest.approx(sum(r for _, r in some) / max(count, 1))


@pytest.mark.parametrize(
    ("confidences", "right", "error"),
    [
        ([1.0] * 5, [True] * 5, 0.0),
        ([1.0] * 5, [False] * 5, 1.0),
        ([0.75] * 4, [True, True, True, False], 0.0),
        ([0.9, 0.6], [True, False], 0.35),
    ],
)
def test_the_calibration_error_of_simple_cases(confidences, right, error):
    assert calibration_error(confidences, right)[0] == pytest.approx(error)


def sure_of(n, seed=0, low=0.5, power=1.0):
    """Confidences, and whether predictions are right: as often as they say to that power."""
    rng = np.random.default_rng(seed)
    confidences = rng.uniform(low, 1, n)
    return confidences.tolist(), (rng.random(n) < confidences**power).tolist()


CURVES = {
    "two": {"uncalibrated": sure_of(200, power=3), "calibrated": sure_of(200, 1)},
    "six classes": {"uncalibrated": sure_of(500, low=0.1), "calibrated": sure_of(500, 1, 0.1)},
    "a single row": {"uncalibrated": ([0.0], [True])},
}


@pytest.mark.parametrize("name", CURVES)
def test_points_and_bars_are_those_of_the_bins(name, draw):
    curves = CURVES[name]
    axes, below = draw(plot_reliability, curves).axes
    points = [one for one in axes.collections if isinstance(one, PathCollection)]
    assert len(points) == len(below.containers) == len(curves)
    for (key, curve), color, drawn, bars in zip(
        curves.items(), (BLUE, ORANGE), points, below.containers, strict=False
    ):
        error, bins = calibration_error(*curve)
        used = [(mean, share) for mean, share, count in bins if count]
        assert drawn.get_offsets().tolist() == [list(one) for one in used]
        assert drawn.get_facecolor()[0, :3] == pytest.approx(to_rgb(color))
        for place, (bar, (_, _, count)) in enumerate(zip(bars, bins, strict=True)):
            assert bar.get_height() == count
            assert bar.get_facecolor()[:3] == pytest.approx(to_rgb(color))
            assert 0.1 * place < bar.get_x() < bar.get_x() + bar.get_width() < 0.1 * (place + 1)
        (label,) = [one for one in axes.texts if one.get_text().startswith(key)]
        assert label.get_text() == f"{key}\nECE {error:.3f}"
        assert label.get_color() == color
    diagonal = axes.lines[0]
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert axes.get_ylim() == (0, 1)
    surest = min(min(confidences) for confidences, _ in curves.values())
    assert axes.get_xlim() == below.get_xlim() == (0.5 if surest >= 0.5 else 0, 1)


# A score over the number of shots


def drawn_scores(levels, draws=5, spread=0.05, seed=0):
    """Shots -> the score of each draw; zero shots have no demonstrations to draw."""
    rng = np.random.default_rng(seed)
    return {
        shots: (level + spread * rng.standard_normal(draws)).tolist() if shots else [level]
        for shots, level in zip((0, 1, 4, 16), levels, strict=True)
    }


SST2 = {
    "uncalibrated": drawn_scores([0.66, 0.55, 0.57, 0.62], spread=0.08),
    "calibrated": drawn_scores([0.68, 0.7, 0.76, 0.79], spread=0.03, seed=1),
}
RTE = {
    "uncalibrated": drawn_scores([0.53, 0.51, 0.52, 0.53], spread=0.02, seed=2),
    "calibrated": drawn_scores([0.53, 0.52, 0.53, 0.53], spread=0.02, seed=3),
}
TASKS = {"SST-2": SST2, "TREC": {**SST2, "per token": RTE["calibrated"]}, "RTE": RTE}
FLAT = {"uncalibrated": {shots: [0.5] for shots in (0, 1, 4, 16)}, "calibrated": {16: [0.5]}}


@pytest.mark.parametrize(
    ("panels", "chance"),
    [
        (TASKS, {"SST-2": 0.51, "TREC": 0.25, "RTE": 0.53}),
        ({"the same everywhere": FLAT}, {"the same everywhere": 0.5}),
        ({"a very long name of a task " * 5: RTE, "$x_{": SST2}, None),
    ],
    ids=["three", "flat", "long names"],
)
def test_lines_bands_dots_and_labels_are_those_of_the_draws(panels, chance, draw):
    figure = draw(plot_shots, panels, chance=chance)
    assert len(figure.axes) == len(panels)
    assert len({one.get_ylim() for one in figure.axes}) == 1  # comparable
    for axes, (task, lines) in zip(figure.axes, panels.items(), strict=True):
        heading = axes.get_title(loc="left")
        assert heading == task or (heading[-1] == "…" and task.startswith(heading[:-1]))
        shots = sorted({one for line in lines.values() for one in line})
        assert [one.get_text() for one in axes.get_xticklabels()] == [str(one) for one in shots]
        solid = [one for one in axes.lines if one.get_linestyle() == "-" and len(one.get_xdata())]
        assert len(solid) == len(axes.collections) == len(lines)
        for (name, line), drawn, band in zip(lines.items(), solid, axes.collections, strict=True):
            means = {shots.index(one): np.mean(line[one]) for one in sorted(line)}
            assert dict(drawn.get_xydata()) == pytest.approx(means)
            edges = band.get_paths()[0].vertices
            for one in line:
                values = line[one]
                spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
                here = edges[edges[:, 0] == shots.index(one), 1]
                assert here.max() == pytest.approx(np.mean(values) + spread)
                assert here.min() == pytest.approx(np.mean(values) - spread)
            dots = [one for one in axes.lines if one.get_marker() == "."]
            dots = [one for one in dots if one.get_color() == drawn.get_color()]
            several = [value for one in sorted(line) for value in line[one] if len(line[one]) > 1]
            assert [y for one in dots for y in one.get_ydata()] == several
            low, high = axes.get_ylim()
            assert all(low < value < high for some in line.values() for value in some)
            last = np.mean(line[max(line)])
            (label,) = [one for one in axes.texts if one.get_text() == f"{name}\n{last:.2f}"]
            assert label.get_color() == drawn.get_color()
        flat = [one for one in axes.lines if one.get_linestyle() == "--"]
        expected = [chance[task]] if task in (chance or {}) else []
        assert [one.get_ydata()[0] for one in flat] == expected
        labels = [one for one in axes.texts if one.get_color() == GRAY]
        assert [one.get_text() for one in labels] == [f"majority class\n{v:.2f}" for v in expected]


# Labels at the ends of lines


@given(st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=5).map(sorted), st.floats(0.01, 0.2))
def test_labels_keep_their_distance_their_order_and_the_axes(heights, gap):
    found = figures._apart(heights, gap)
    assert all(above - below >= gap - 1e-9 for below, above in pairwise(found))
    assert found[0] >= -1e-9
    assert found[-1] <= 1 + 1e-9


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True).map(sorted))
def test_labels_that_are_apart_stay_where_their_lines_end(steps):
    heights = [one / 5 for one in steps]
    assert figures._apart(heights, 0.19) == pytest.approx(heights)


def test_labels_that_would_touch_move_alike_to_both_sides():
    assert figures._apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert figures._apart([0.1, 0.5, 0.56], 0.1) == pytest.approx([0.1, 0.48, 0.58])
    assert figures._apart([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])


# The loss of a run


def logged(losses, *, rates=True, evaluations=()):
    """As the trainer logs it: the learning rate falls to 0; a loss of {step: loss} is evaluated."""
    log = []
    for step, loss in enumerate(losses, 1):
        log.append({"step": step, "epoch": step / len(losses), "grad_norm": 1.0, "loss": loss})
        if rates:
            log[-1]["learning_rate"] = 2e-4 * (1 - step / len(losses))
        if step in evaluations:
            log.append({"step": step, "eval_loss": evaluations[step], "eval_runtime": 2.0})
    return [*log, {"step": len(losses), "train_loss": 1.0, "train_runtime": 3.0}]


def falling(count):
    noise = np.random.default_rng(0).normal(0, 0.1, count)
    return (0.5 + 2 * np.exp(-4 * np.arange(count) / count) + noise).tolist()


def curve(axes, color) -> dict[float, float]:
    """The longest line of a color, of what is finite: step -> value."""
    lines = [one.get_xydata() for one in axes.lines if one.get_color() == color]
    return {x: y for x, y in max(lines, key=len, default=()) if np.isfinite(y)}


@pytest.mark.parametrize(
    "losses",
    [[0.7], falling(5), falling(300), [2.0, math.nan, math.inf, 1.0, None, 0.5], [math.nan] * 5],
    ids=["one step", "few steps", "many steps", "not all finite", "none finite"],
)
@pytest.mark.parametrize("evaluations", [{}, {1: 1.1, 5: 0.8}], ids=["", "evaluated"])
def test_the_loss_of_each_step_is_drawn_with_its_trend_and_what_is_not_finite(
    losses, evaluations, draw
):
    axes, _ = draw(plot_loss, logged(losses, evaluations=evaluations)).axes
    steps = dict(enumerate((math.nan if loss is None else loss for loss in losses), 1))
    finite = {step: loss for step, loss in steps.items() if math.isfinite(loss)}
    assert curve(axes, LIGHT_BLUE) == pytest.approx(finite)
    low, high = figures._limits(
        np.array([*finite.values()]), np.array([v for k, v in evaluations.items() if k in steps])
    )
    assert axes.get_ylim() == pytest.approx((low, high))
    smooth = figures._smooth(np.minimum([*finite.values()], high))
    assert curve(axes, BLUE) == pytest.approx(dict(zip(finite, smooth, strict=True)))
    assert curve(axes, ORANGE) == {k: v for k, v in evaluations.items() if k in steps}
    crosses = [step for step in steps if step not in finite]
    assert [*curve(axes, RED)] == crosses
    right = axes.get_title(loc="right")
    assert (f"× {len(crosses)} not finite, first at step" in right) == bool(crosses)
    said = [one.get_text() for one in axes.texts]
    assert ("no finite loss was logged" in said) == (not finite and not curve(axes, ORANGE))
    assert len([one for one in said if one.startswith("training\n")]) == bool(finite)


def test_a_run_that_logged_nothing_gets_a_figure_that_says_so(draw):
    (axes,) = draw(plot_loss, [{"step": 3, "train_runtime": 1.0}]).axes
    assert [one.get_text() for one in axes.texts] == ["no finite loss was logged"]


def test_the_learning_rate_has_its_panel_only_where_it_was_logged(draw):
    axes, below = draw(plot_loss, logged(falling(5))).axes
    assert [*curve(below, GRAY).values()] == pytest.approx([1.6e-4, 1.2e-4, 8e-5, 4e-5, 0])
    (alone,) = draw(plot_loss, logged(falling(5), rates=False)).axes
    assert alone.bbox.height > axes.bbox.height + 150


def test_the_first_steps_and_a_spike_are_cut_off_and_a_divergence_at_the_end_is_not(draw):
    losses = falling(300)
    usual = figures._limits(np.array(losses), np.array([]))
    losses[0], losses[150] = 40.0, 500.0
    low, high = figures._limits(np.array(losses), np.array([]))
    assert (low, high) == pytest.approx(usual, abs=0.4)
    (axes, _) = draw(plot_loss, logged(losses)).axes
    assert axes.get_title(loc="right") == "↑ 2 above the axis, up to 500"
    diverging = np.array([1.0] * 180 + [1.0 + step for step in range(20)])
    assert figures._limits(diverging, np.array([]))[1] > 12


def test_smoothing_has_no_pull_towards_zero_and_follows_a_line():
    assert figures._smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    line = np.linspace(2, 1, 8)
    assert figures._smooth(line) == pytest.approx(line)
    spike = line.copy()
    spike[4] = 50
    assert figures._smooth(spike).max() <= 2
    noise = 1 + np.random.default_rng(0).normal(0, 0.1, 2000)
    assert figures._smooth(noise)[200:].std() < 0.3 * noise.std()


# All figures


PLOTS = {
    "confusion": (plot_confusion, ["a", "b"], ["a", None], ["a", "b"]),
    "reliability": (plot_reliability, CURVES["two"]),
    "shots": (plot_shots, {"RTE": RTE}),
    "loss": (plot_loss, logged(falling(5))),
}


@pytest.mark.parametrize("name", PLOTS)
def test_long_text_and_markup_are_only_text_and_pyplot_is_left_alone(name, draw):
    before = "matplotlib.pyplot" in sys.modules
    figure = draw(*PLOTS[name], title="$x_{ costs $5 W" * 20, subtitle="a\nb " * 100)
    assert ("matplotlib.pyplot" in sys.modules) == before
    title, subtitle = (one.get_text() for one in figure.texts)
    assert title.startswith("$x_{ costs $5 W$x_{")
    assert subtitle.startswith("a b a b")
    for text in figure.texts:
        assert text.get_text().endswith("…")
        assert text.get_window_extent().width > 0.8 * figure.bbox.width  # no shorter than needed


def test_a_figure_needs_no_subtitle(draw):
    figure = draw(*PLOTS["confusion"], title="Reviews", subtitle="")
    assert [text.get_text() for text in figure.texts if text.get_text()] == ["Reviews"]
