"""Rows from the hub, folders and files, checked by a template; draws, mixtures, demonstrations."""

from recipelib.data.checking import StoredRows
from recipelib.data.classes import with_classes, with_classes_of
from recipelib.data.demonstrations import Demonstrations, nearest_rows
from recipelib.data.drawing import draw_rows, few_shot_rows, mixture_counts
from recipelib.data.formats import guess_template, template_for
from recipelib.data.handed import check_dataset
from recipelib.data.origin import origin_of
from recipelib.data.rows import (
    Rows,
    load_asked,
    load_questions,
    load_splits,
    overlap,
    parse_columns,
    untrained_classes,
)
from recipelib.data.streaming import RowStream, load_streamed, stream_passes, stream_share

__all__ = [
    "Demonstrations",
    "RowStream",
    "Rows",
    "StoredRows",
    "check_dataset",
    "draw_rows",
    "few_shot_rows",
    "guess_template",
    "load_asked",
    "load_questions",
    "load_splits",
    "load_streamed",
    "mixture_counts",
    "nearest_rows",
    "origin_of",
    "overlap",
    "parse_columns",
    "stream_passes",
    "stream_share",
    "template_for",
    "untrained_classes",
    "with_classes",
    "with_classes_of",
]
