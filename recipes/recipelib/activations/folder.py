"""The folder of what frozen layers have computed, in this run and in earlier ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from recipelib.inference import from_main_process
from recipelib.runtime import Store, UserError, megabytes, replacing, say

ACTIVATIONS, FEATURES = "activations-", "features-"  # what names begin with


def cache_folder(args, store: Store) -> Path | None:
    """The folder, emptied first if that is asked for; None if nothing is to be kept.

    Args:
        args: a recipe's `cache`, `cache_dir`, `clear_cache` and `cache_dtype`.
        store: of prepared rows, whose folder it is without `cache_dir`.
    Raises:
        UserError: it cannot be written to; options for it where nothing is kept.
    """
    unused = [name for name in ("cache_dtype", "cache_dir", "clear_cache") if getattr(args, name)]
    if not args.cache and unused:
        raise UserError(
            f"--cache false: nothing is kept, --{unused[0]} changes nothing; leave it out"
        )
    if not args.cache:
        return None
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


def write_kept(path: Path, write: Callable[[Path], object], cure: str) -> None:
    """Write a file whole or not at all.

    Args:
        write: is given the path to write to.
    Raises:
        UserError: the disk is full, or cannot be written to; it ends with the cure.
    """
    try:
        with replacing(path) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:  # the latter for a disk that is full
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{path.parent}: {said}; {cure}") from None


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
