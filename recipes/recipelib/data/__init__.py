"""Rows from the hub, folders and files, checked by a template; draws, mixtures, demonstrations."""

from recipelib.data.checking import StoredRows
from recipelib.data.demonstrations import Demonstrations, nearest_rows
from recipelib.data.drawing import draw_rows, few_shot_rows, mixture_counts
from recipelib.data.formats import classes_from_rows, guess_template, template_for
from recipelib.data.rows import (
    Rows,
    load_asked,
    load_questions,
    load_splits,
    overlap,
    parse_columns,
)
from recipelib.data.streaming import RowStream, load_streamed

__all__ = [
    "Demonstrations",
    "RowStream",
    "Rows",
    "StoredRows",
    "classes_from_rows",
    "draw_rows",
    "few_shot_rows",
    "guess_template",
    "load_asked",
    "load_questions",
    "load_splits",
    "load_streamed",
    "mixture_counts",
    "nearest_rows",
    "overlap",
    "parse_columns",
    "template_for",
]
