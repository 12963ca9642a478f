"""Finding the checkpoint to go on from."""

import json
import shutil
from pathlib import Path

from common.errors import UserError
from common.launch import is_main_process


def _is_whole(folder: Path) -> bool:
    """The trainer writes a checkpoint in place, `trainer_state.json` last: without it, or with half
    of it, the rest may be half-written too.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(output_dir: str, which: str | None) -> str | None:
    """The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        which: None for a fresh start, "last" for the newest whole checkpoint in `output_dir`, or
            a folder.

    A fresh start clears what a finished run (one with a metrics.json) left there, and refuses to
    mix with the checkpoints of an unfinished one.

    Raises:
        UserError: nothing to resume from, or a fresh start beside another run's checkpoints.
    """
    folder = Path(output_dir)
    found = sorted(
        (one for one in folder.glob("checkpoint-*") if one.name.split("-")[1].isdigit()),
        key=lambda one: int(one.name.split("-")[1]),
    )
    if which is None:
        if (folder / "metrics.json").exists():
            if is_main_process():
                (folder / "metrics.json").unlink()
                for one in found:
                    shutil.rmtree(one)
        elif found:
            raise UserError(
                f"--output_dir {output_dir}: holds {found[-1].name} of an unfinished run; pass "
                "--resume_from_checkpoint last to go on, another --output_dir, or delete it"
            )
        return None
    if which != "last":
        if not _is_whole(Path(which)):
            raise UserError(
                f"--resume_from_checkpoint {which}: no whole checkpoint (its trainer_state.json is "
                "missing or cut short); pass another, or 'last'"
            )
        return which
    whole = [one for one in found if _is_whole(one)]
    if not whole:
        raise UserError(
            f"--resume_from_checkpoint last: no whole checkpoint in {output_dir}; start without it"
        )
    return str(whole[-1])
