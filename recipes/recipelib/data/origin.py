"""Where a run's rows come from, as the `dataset` of its template says it to later runs."""

import os
from pathlib import Path
from typing import Any

from recipelib.data.places import Hub
from recipelib.data.rows import splits_of
from recipelib.prompts import TEMPLATE_FOLDER, PromptTemplate


def origin_of(template: PromptTemplate, args: Any, *, published: bool = False) -> dict[str, str]:
    """The template's `dataset` with the rows that a run has: what its arguments have named, and the
    splits that were found. A path is absolute, so that it can be found from any folder; bundled
    rows are named as templates do.

    Args:
        args: as in `splits_of`.
        published: whether the run is uploaded: a path of this machine is then left out, and with it
            everything; the template's own `dataset` stays.
    Raises:
        UserError: as `splits_of`.
    """
    place, train, evaluation = splits_of(template, args)
    splits = {"train": train, "eval": evaluation}
    if isinstance(place, Hub):
        found = {"path": place.path, "name": place.config, "revision": place.revision, **splits}
    else:
        path = Path(os.path.abspath(place.path))  # links stay: they lead to names without suffix
        bundled = path.is_relative_to(TEMPLATE_FOLDER)
        if published and not bundled:
            return {}
        found = {"path": str(path.relative_to(TEMPLATE_FOLDER) if bundled else path)}
        found |= {"encoding": place.encoding, "field": place.field}
        if not place.one_split or evaluation == "all":
            found |= splits
    return {key: value for key, value in found.items() if value}
