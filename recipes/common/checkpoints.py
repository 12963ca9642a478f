"""Finding the checkpoint to go on from."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.launch import fsdp_option, is_main_process, uses_fsdp


def is_whole(folder: Path) -> bool:
    """The trainer writes a checkpoint in place, `trainer_state.json` last: without it, or with half
    of it, the rest may be half-written too.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def checkpoint_kind(folder: Path) -> str:
    """How a checkpoint's training state is kept: "plain" (one process, or data parallel), "full"
    (FSDP, gathered) or "sharded" (FSDP, a part from each process).
    """
    if (folder / "pytorch_model_fsdp_0").is_dir():
        return "sharded"
    return "full" if (folder / "pytorch_model_fsdp.bin").is_file() else "plain"


def _check_kind(folder: Path) -> None:
    """Refuse a checkpoint that the trainer could not read under this launch's config."""
    configs = {
        "plain": "without FSDP",
        "full": "under FSDP with full state dicts (accelerate_configs/fsdp2.yaml)",
        "sharded": "under FSDP with sharded state dicts (accelerate_configs/fsdp2_sharded.yaml)",
    }
    asked = "plain"
    if uses_fsdp():
        asked = "sharded" if fsdp_option("STATE_DICT_TYPE") == "sharded_state_dict" else "full"
    if (found := checkpoint_kind(folder)) != asked:
        raise UserError(
            f"--resume_from_checkpoint {folder}: was written {configs[found]}, and this run is "
            f"{configs[asked]}; launch as it was (the number of processes may differ)"
        )


def find_checkpoint(
    output_dir: str, which: str | None, check: Callable[[Path], None] | None = None
) -> str | None:
    """The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        which: None for a fresh start, "last" for the newest whole checkpoint in `output_dir`, or
            a folder.
        check: called with the checkpoint; raises an error if it is not this run's.

    A fresh start clears what a finished run (one with a metrics.json) left there, and any samples,
    and refuses to mix with the checkpoints of an unfinished one. Going on, the run is unfinished
    again. The main process alone looks and clears, since the others might look while it does.

    Raises:
        UserError: nothing to resume from, a checkpoint of another kind of launch, or a fresh start
            beside another run's checkpoints.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; name a folder")
    found = sorted(
        (int(one.name.split("-")[1]), one)
        for one in folder.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]+", one.name) and one.is_dir()
    )
    if which is None:
        if is_main_process():
            _make_way(folder, [one for _, one in found])
        return None
    whole = [one for _, one in found if is_whole(one)]
    if which == "last" and not whole:
        raise UserError(
            f"--resume_from_checkpoint last: no whole checkpoint in {output_dir}; start without it"
        )
    checkpoint = whole[-1] if which == "last" else Path(which)
    if not is_whole(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {which}: no whole checkpoint (its trainer_state.json is "
            "missing or cut short); pass another, or 'last'"
        )
    _check_kind(checkpoint)
    if check:
        check(checkpoint)
    if is_main_process():
        (folder / "metrics.json").unlink(missing_ok=True)
    return str(checkpoint)


def _make_way(folder: Path, checkpoints: list[Path]) -> None:
    finished = (folder / "metrics.json").exists()
    if checkpoints and not finished:
        raise UserError(
            f"--output_dir {folder}: holds {checkpoints[-1].name} of an unfinished run; pass "
            "--resume_from_checkpoint last to go on, another --output_dir, or delete it"
        )
    (folder / "samples.jsonl").unlink(missing_ok=True)  # to which a run adds
    if finished:
        for one in checkpoints:
            shutil.rmtree(one)
        (folder / "metrics.json").unlink()  # last: an interrupted clearing is taken up again
