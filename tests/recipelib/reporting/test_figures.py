"""Figures of an evaluation: what is drawn is what was given, and no text runs into another."""

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
    plot_reliability,
    plot_shots,
)

BLUE, ORANGE, GRAY = "#0b5394", "#d95f02", "#666666"
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
WORDS = ["a", "bb", "card", "top_up", "pin", "fee", "x"]
MANY = [f"{word}_{number:02}" for number in range(11) for word in WORDS]


def numbers_of(figure) -> dict[tuple[int, int], str]:
    (axes,) = figure.axes
    return {tuple(map(round, one.get_position()[::-1])): one.get_text() for one in axes.texts}


@pytest.mark.parametrize(
    "classes",
    [["negative", "positive"], TREC, LONG, [*"abcdefghijkl"], TREC + LONG, MANY[:20], MANY],
    ids=lambda classes: f"{len(classes)} {classes[0][:10]}",
)
@pytest.mark.parametrize("unreadable", [False, True])
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


def test_all_predictions_in_one_class_fill_one_column(draw):
    golds, _ = guessed(TREC)
    figure = draw(plot_confusion, golds, ["LOC"] * len(golds), TREC)
    assert {column for _, column in numbers_of(figure)} == {TREC.index("LOC")}


def test_a_class_name_of_any_length_leaves_room_for_the_matrix(draw):
    classes = ["W" * 300, "name of a class " * 20, "$x_{"]
    figure = draw(plot_confusion, classes, classes, classes)
    assert figure.axes[0].bbox.width > 0.6 * figure.bbox.width
    assert [one.get_text()[-1] for one in figure.axes[0].get_yticklabels()] == ["…", "…", "{"]


def test_counts_too_large_for_their_cells_are_left_to_the_shade(draw):
    golds = ["a_00"] * 1500
    assert numbers_of(draw(plot_confusion, golds, golds, MANY[:30])) == {}
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
    "one": {"uncalibrated": sure_of(200, power=3)},
    "two": {"uncalibrated": sure_of(200, power=3), "calibrated": sure_of(200, 1)},
    "equal": {"uncalibrated": sure_of(200), "calibrated": sure_of(200)},
    "six classes": {"uncalibrated": sure_of(500, low=0.1), "calibrated": sure_of(500, 1, 0.1)},
    "surely right": {"uncalibrated": ([1.0] * 9, [True] * 9)},
    "surely wrong": {"uncalibrated": ([1.0] * 9, [False] * 9), "calibrated": ([1.0], [False])},
    "a single row": {"uncalibrated": ([0.0], [True])},
    "very many": {"uncalibrated": sure_of(100_000), "calibrated": sure_of(100_000, 1)},
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


def test_a_point_is_larger_the_more_predictions_it_stands_for(draw):
    curve = ([0.55] * 90 + [0.95] * 10, [True] * 100)
    axes = draw(plot_reliability, {"uncalibrated": curve}).axes[0]
    large, small = axes.collections[-1].get_sizes()
    assert large > 3 * small


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
        (TASKS, None),
        ({"RTE": RTE}, {"RTE": 0.53}),
        ({"one draw": {"uncalibrated": {k: v[:1] for k, v in SST2["uncalibrated"].items()}}}, None),
        ({"the same everywhere": FLAT}, {"the same everywhere": 0.5}),
        ({"a very long name of a task " * 5: RTE, "$x_{": SST2}, {"$x_{": 0.0}),
        ({"all right": {"calibrated": {0: [1.0], 8: [1.0, 1.0]}}}, None),
    ],
    ids=["three", "no chance", "one task", "one draw", "flat", "long names", "all right"],
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


# All figures


PLOTS = {
    "confusion": (plot_confusion, ["a", "b"], ["a", None], ["a", "b"]),
    "reliability": (plot_reliability, CURVES["two"]),
    "shots": (plot_shots, {"RTE": RTE}),
}


@pytest.mark.parametrize("name", PLOTS)
def test_markup_and_long_text_in_a_title_are_only_text(name, draw):
    figure = draw(*PLOTS[name], title="$x_{ costs $5 W" * 20, subtitle="a\nb " * 100)
    title, subtitle = (one.get_text() for one in figure.texts)
    assert title.startswith("$x_{ costs $5 W$x_{")
    assert subtitle.startswith("a b a b")
    for text in figure.texts:
        assert text.get_text().endswith("…")
        assert text.get_window_extent().width > 0.8 * figure.bbox.width  # no shorter than needed


@pytest.mark.parametrize("name", PLOTS)
def test_a_figure_needs_no_subtitle_and_leaves_pyplot_alone(name, draw):
    before = "matplotlib.pyplot" in sys.modules
    draw(*PLOTS[name], subtitle="")
    assert ("matplotlib.pyplot" in sys.modules) == before
