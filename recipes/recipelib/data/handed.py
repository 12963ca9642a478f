"""Rows that Python code hands over as a `datasets.Dataset`, checked as those of files are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recipelib.data.checking import check_rows, list_bad, refuse_missing_columns
from recipelib.data.classes import with_classes_of
from recipelib.data.rows import Rows
from recipelib.data.sources import open_table
from recipelib.prompts import PromptTemplate
from recipelib.runtime import Store, UserError

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = "the data set"


def check_dataset(
    template: PromptTemplate, data: Dataset, *, skip_bad_rows: bool = False, store: Store
) -> tuple[PromptTemplate, Rows]:
    """All rows of a data set, each checked against the template; and the template, whose classes
    are those of the rows where it leaves them out.

    Args:
        skip_bad_rows: leave bad rows out and count them, instead of raising.
        store: where what was found is kept, and by how many processes rows are checked.
    Raises:
        UserError: no `datasets.Dataset`, a column that no row has, or bad rows.
    """
    from datasets import Dataset

    if not isinstance(data, Dataset):
        raise UserError(
            f"{type(data).__name__}: pass a datasets.Dataset, such as one split of a DatasetDict, "
            "or Dataset.from_list of rows"
        )
    if not len(data):
        raise UserError(f"{_NAME}: holds no rows; pass one with at least one")
    if data._indices is not None:  # shuffled or filtered: the rows lie elsewhere than in its files
        data = data.flatten_indices()
    template = with_classes_of(template, data, _NAME)
    source = open_table(data, _NAME, template, answers=True)
    refuse_missing_columns(template, source.name, source.columns, answers=True)
    checked = check_rows(template, source, True, store, np.arange(len(data)))
    if checked.problems and not (skip_bad_rows and len(checked.rows)):
        raise UserError(list_bad(checked.problems))
    return template, Rows(checked.rows, source.name, len(checked.problems), len(checked.rows))
