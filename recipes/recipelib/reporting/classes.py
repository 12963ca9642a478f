"""What is shown of a score beside its number: each class, and each of several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipelib.evaluation import TaskScore
from recipelib.reporting.figures import plot_confusion
from recipelib.runtime import print_columns

_SHOWN_CLASSES = 12


def plot_classes(result: TaskScore, name: str, folder: Path, subtitle: str) -> list[str]:
    """Draw which class is taken for which into confusion.png, or, of several tasks that are scored,
    each into a file of its own in confusion/.

    Args:
        name: of the task.
        subtitle: what was scored; the number of rows is added.
    Returns:
        What was written.
    """
    scores = result.tasks or {name: result}
    for task, score in scores.items():
        if not score.class_names:
            continue
        path = folder / (f"confusion/{task}.png" if len(scores) > 1 else "confusion.png")
        path.parent.mkdir(exist_ok=True)
        plot_confusion(
            [score.class_names[record["answer"]] for record in score.records],
            [score.class_names.get(record["prediction"]) for record in score.records],
            list(score.class_names.values()),
            path,
            title=f"{task}: gold and predicted classes",
            subtitle=f"{subtitle}, {score.rows:,} rows",
        )
    if not any(score.class_names for score in scores.values()):
        return []
    return ["confusion/" if len(scores) > 1 else "confusion.png"]


def show_classes(result: TaskScore, name: str) -> None:
    """Print the figures of each class, of several tasks one table for each."""
    for task, score in (result.tasks or {name: result}).items():
        show_class_figures(score.class_figures(), score.class_names, task)


def show_class_figures(figures: Mapping[str, Mapping], names: Mapping[str, str], task: str) -> None:
    """Print precision, recall and F1 of each class; of many the worst and the best by F1."""
    scored = [label for label, one in figures.items() if one["rows"]]
    shown, between = list(figures), len(scored) - _SHOWN_CLASSES
    title = f"{task}: classes"
    if len(figures) > _SHOWN_CLASSES:
        shown = sorted(scored, key=lambda label: figures[label]["f1"])
        if between > 0:
            half = _SHOWN_CLASSES // 2
            shown = [*shown[:half], None, *shown[-half:]]
            title += f", the {half} worst and the {half} best of {len(figures)} by F1"
    lines = [
        [f"... {between} more", "", "", "", ""] if label is None else _line(names, label, figures)
        for label in shown
    ]
    if len(figures) > _SHOWN_CLASSES and len(scored) < len(figures):
        lines.append([f"{len(figures) - len(scored)} other classes", "no rows", "", "", ""])
    if figures:
        print_columns(title, ["class", "rows", "precision", "recall", "F1"], lines)


def _line(names: Mapping[str, str], label: str, figures: Mapping[str, Mapping]) -> list[str]:
    one = figures[label]
    values = (
        "-" if one[key] is None else f"{one[key]:.3f}" for key in ("precision", "recall", "f1")
    )
    return [names[label], f"{one['rows']:,}" if one["rows"] else "no rows", *values]


def show_tasks(base: TaskScore, tuned: TaskScore, trained: Sequence[str]) -> None:
    """Print the scores of several tasks before and after training, each by its own metrics."""
    lines = []
    for task, score in tuned.tasks.items():
        held_out = "" if task in trained else " (held out)"
        for name, (after, error) in score.by_metric.items():
            before, _ = base.tasks[task].by_metric[name]
            always = ""
            if score.majority:
                always = f"{score.majority.scores[name]:.3f} ({score.majority.shown})"
            figures = [f"{before:.3f}", f"{after:.3f} ± {error:.3f}", always, f"{score.rows:,}"]
            lines.append([f"{task}{held_out}, {name}", *figures])
    print_columns("Tasks", ["task", "before", "after", "majority class", "rows"], lines)
