"""The folder of what frozen layers have computed, in this run and in earlier ones."""

from __future__ import annotations

import shutil
from pathlib import Path

from recipelib.inference import from_main_process
from recipelib.runtime import Store, UserError, megabytes, say

ACTIVATIONS, FEATURES = "activations-", "features-"  # what names begin with


def cache_folder(args, store: Store) -> Path:
    """The folder, emptied first if that is asked for.

    Args:
        args: a recipe's `cache_dir` and `clear_cache`.
        store: of prepared rows, whose folder it is without `cache_dir`.
    Raises:
        UserError: it cannot be written to.
    """
    root = Path(args.cache_dir).expanduser() if args.cache_dir else store.root
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--cache_dir {root}: {error.strerror or error}; name a folder that can be written to"
        ) from None
    if args.clear_cache:
        cleared = from_main_process(lambda: _clear(root))
        say(f"cleared {megabytes(cleared)} of what frozen layers have computed in {root}")
    return root


def _clear(root: Path) -> int:
    """Remove what is kept; gives how many bytes that were."""
    size = 0
    for place in sorted([*root.glob(f"{ACTIVATIONS}*"), *root.glob(f"{FEATURES}*")]):
        files = [*place.iterdir()] if place.is_dir() else [place]
        size += sum(file.stat().st_size for file in files)
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    return size
