"""The folder of a run: finding and checking the checkpoint to resume from, and clearing what an
earlier run left there.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from recipelib.runtime.console import is_main_process, say
from recipelib.runtime.errors import UserError
from recipelib.runtime.files import read_metrics
from recipelib.runtime.launch import fsdp_option, uses_fsdp

# Adapter settings that a resumed run may change: where the adapter comes from, and what does not
# decide its weights.
_NOT_COMPARED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "lora_dropout", "adapter_dropout", "runtime_config", "loftq_config"),
}


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end.

    The trainer writes a checkpoint in place and `trainer_state.json` last: where that is missing or
    cut short, the rest may be half-written too.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


# What the processes of a pipeline leave in a checkpoint.
STAGE_FILES = "stage-*.safetensors"


def checkpoint_kind(folder: Path) -> str:
    """How a checkpoint holds the training state: "plain" (one process, or data parallel), "full"
    (FSDP, gathered into one file), "sharded" (FSDP, a part from each process) or "pipeline" (each
    process's layers).
    """
    if [*folder.glob(STAGE_FILES)]:
        return "pipeline"
    if (folder / "pytorch_model_fsdp_0").is_dir():
        return "sharded"
    return "full" if (folder / "pytorch_model_fsdp.bin").is_file() else "plain"


def _check_kind(folder: Path, asked: str) -> None:
    """Refuse a checkpoint that the trainer could not read."""
    configs = {
        "pipeline": "as a pipeline (recipes/gpipe_sft.py)",
        "plain": "without FSDP",
        "full": "under FSDP with full state dicts (accelerate_configs/fsdp2.yaml)",
        "sharded": "under FSDP with sharded state dicts (accelerate_configs/fsdp2_sharded.yaml)",
    }
    if (kind := checkpoint_kind(folder)) != asked:
        raise UserError(
            f"--resume_from_checkpoint {folder}: was written {configs[kind]}, and this run is "
            f"{configs[asked]}; launch as it was (the number of processes may differ)"
        )


def _launched_kind() -> str:
    """How checkpoints are written under this launch's config."""
    if not uses_fsdp():
        return "plain"
    return "sharded" if fsdp_option("STATE_DICT_TYPE") == "sharded_state_dict" else "full"


def find_checkpoint(
    output_dir: str,
    which: str | None,
    check: Callable[[Path], None] | None = None,
    *,
    kind: str | None = None,
    model: str | None = None,
) -> str | None:
    """The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        which: None for a fresh start, "last" for the newest whole checkpoint in `output_dir`,
            "auto" for that or, where there is none, a fresh start, or a folder.
        check: called with the checkpoint; raises an error if this run cannot resume from it.
        kind: how the run writes its own (see `checkpoint_kind`), if not as the launch's config
            says.
        model: what is trained, if that is a folder.

    Nothing in the folder changes yet (see `clear_way`), so that a mistake elsewhere on the command
    line shows before a finished run is given up for it. Only the main process refuses a fresh start
    beside an unfinished run.

    Raises:
        UserError: nothing to resume from, a checkpoint of another kind of launch, a fresh start
            beside the checkpoints of an unfinished run, or the folder of the model itself.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; name a folder")
    if model and folder.is_dir() and folder.resolve() == Path(model).expanduser().resolve():
        raise UserError(f"--output_dir {output_dir}: holds the model that is trained; name another")
    checkpoints = _checkpoints(folder)
    if which is None:
        if checkpoints and is_main_process() and not (folder / "metrics.json").exists():
            raise UserError(
                f"--output_dir {folder}: holds {checkpoints[-1][1].name} of an unfinished run; "
                "pass --resume_from_checkpoint last to go on, another --output_dir, or delete it"
            )
        return None
    whole = [path for _, path in checkpoints if is_whole(path)]
    if which == "auto" and not whole:
        return None
    if which == "last" and not whole:
        raise UserError(
            f"--resume_from_checkpoint last: no whole checkpoint in {output_dir}; start without it"
        )
    checkpoint = whole[-1] if which in ("last", "auto") else Path(which)
    if not is_whole(checkpoint):
        raise UserError(
            f"--resume_from_checkpoint {which}: no whole checkpoint (its trainer_state.json is "
            "missing or cut short); pass another, or 'last'"
        )
    _check_kind(checkpoint, kind or _launched_kind())
    if check:
        check(checkpoint)
    return str(checkpoint)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in the folder, the earliest first."""
    return sorted(
        (int(path.name.split("-")[1]), path)
        for path in folder.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir()
    )


def check_adapter(checkpoint: str | None, model) -> None:
    """Refuse a checkpoint whose adapter differs from the model's, before its weights are loaded.

    Raises:
        UserError: an adapter of another kind or with other settings, or a whole model on one side
            and an adapter on the other.
    """
    if checkpoint is None:
        return
    file, own = Path(checkpoint, "adapter_config.json"), getattr(model, "active_peft_config", None)
    where = f"--resume_from_checkpoint {checkpoint}: "
    if own is None:
        if file.exists():
            raise UserError(f"{where}holds an adapter, and this run trains all parameters")
        return
    if not file.exists():  # a sharded checkpoint has none
        if Path(checkpoint, "model.safetensors").exists():
            raise UserError(f"{where}holds a whole model, and this run trains an adapter")
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    # As PEFT writes the file: sets become lists.
    own = json.loads(json.dumps(own.to_dict(), default=lambda names: sorted(map(str, names))))
    for name in sorted(held.keys() & own.keys() - _NOT_COMPARED):
        theirs, ours = (
            sorted(map(str, value)) if isinstance(value, list) else value
            for value in (held[name], own[name])
        )
        if theirs != ours:
            raise UserError(
                f"{where}its adapter has {name} {held[name]}, and this run's {own[name]}; go on "
                "with the same"
            )


def clear_way(output_dir: str, checkpoint: str | None, loaded_from: str = "") -> None:
    """Make `output_dir` the folder of the run that begins to train now.

    A fresh start removes the checkpoints and metrics.json of a finished run, half-written
    checkpoints of an unfinished one, and any samples. A resumed run is unfinished again, so
    metrics.json is removed; so are checkpoints later than the one it resumes from, since they
    belong to another course of training. Only the main process removes anything.

    Args:
        loaded_from: the model's own folder, which is left alone.
    """
    folder = Path(output_dir)
    if not is_main_process():
        return
    if checkpoint is not None:
        (folder / "metrics.json").unlink(missing_ok=True)
        steps = {path.resolve(): step for step, path in _checkpoints(folder)}
        resumed_at = steps.get(Path(checkpoint).resolve())
        for path, step in steps.items():
            if resumed_at is not None and step > resumed_at:
                say(f"{path.name} is given up, for the run goes on from checkpoint-{resumed_at}")
                shutil.rmtree(path)
        return
    (folder / "samples.jsonl").unlink(missing_ok=True)  # a run appends to it
    finished = (folder / "metrics.json").exists()
    if finished:
        say(f"{output_dir}: the finished run there is replaced")
    for _, path in _checkpoints(folder):
        own = Path(loaded_from).resolve().is_relative_to(path.resolve())
        if not own and (finished or not is_whole(path)):
            shutil.rmtree(path)
    # Last, so that the next run takes up a clearing that was interrupted.
    (folder / "metrics.json").unlink(missing_ok=True)


# The file of a checkpoint that holds every trained tensor under its name.
TRAINED = "trained.safetensors"


def check_trained(checkpoint: Path, trained: Mapping[str, str]) -> None:
    """Check that a checkpoint holds what this run trains, before the run resumes from it.

    Args:
        trained: argument -> value, of all arguments that decide what is trained.
    Raises:
        UserError: the checkpoint of another recipe, or of a run with other arguments.
    """
    try:
        with safe_open(checkpoint / TRAINED, "pt") as file:
            held = file.metadata() or {}
    except (OSError, SafetensorError):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: has no {TRAINED}, which a run through a cloze "
            "leaves; pass a checkpoint of a run of this recipe"
        ) from None
    if held.keys() != trained.keys():
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: is of another recipe; pass a checkpoint of a "
            "run of this recipe"
        )
    for name, value in trained.items():
        if held[name] != value:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: was trained with --{name} {held[name]}, "
                f"and this run has {value}; go on with the same"
            )


def refuse_trained_run(output_dir: str) -> None:
    """Refuse to write the results of a run that only scores over those of a run that trained.

    Raises:
        UserError: the folder holds a trained run.
    """
    if read_metrics(output_dir).get("trainable_parameters"):
        raise UserError(f"--output_dir {output_dir}: holds a trained run; name another")


# What a run of any kind leaves beside weights, which are *.safetensors: of a trained one the
# settings of a model or an adapter, the tokenizer, ...
_MODEL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)
_LEFT = (
    *_MODEL,
    *("adapter_config.json", "peft_bottleneck.py", "probe.json", "probe.skops", "layers.png"),
    *("template.yaml", "trainer_state.json", "loss.png", "README.md"),
)
_LEFT_FOLDERS = (
    *("base_model", "dropped", "merged", "templates", "partial", "additional_chat_templates"),
    "confusion",
)
_FIGURES = ("confusion.png", "reliability.png")  # ... and of one that only scores


def clear_results(output_dir: str, loaded_from: str, draws: int = 0) -> None:
    """Remove what an earlier run of any kind has left of weights, templates, figures and answers,
    before this run's are written: nothing of it may pass for this run's, or be published with it.

    Args:
        loaded_from: the model's own folder, which is left alone.
        draws: how many few-shot draws this run has made; further ones are an earlier run's.
    """
    folder, source = Path(output_dir), Path(loaded_from).resolve()
    if not is_main_process() or folder.resolve() == source:
        return
    clear_figures(output_dir)
    left = [*(folder / name for name in _LEFT), *folder.glob("predictions*.jsonl")]
    for file in [*left, *folder.glob("*.safetensors*")]:
        file.unlink(missing_ok=True)
    drawn = [
        place
        for place in folder.glob("draw_*")
        if re.fullmatch("draw_[0-9]+", place.name) and int(place.name.split("_")[1]) >= draws
    ]
    if draws:  # nothing is trained here, but in draw_N
        drawn += [place for _, place in _checkpoints(folder)]
    for place in [*(folder / name for name in _LEFT_FOLDERS), *drawn]:
        if not source.is_relative_to(place.resolve()):
            shutil.rmtree(place, ignore_errors=True)


def clear_model(folder: Path | str) -> None:
    """Remove a model or an adapter and its tokenizer from a folder that another one is saved to
    next: a shard or a chat template that the new one has not would stay.
    """
    names = (*_MODEL, "adapter_config.json")
    for file in [*(Path(folder, name) for name in names), *Path(folder).glob("*.safetensors*")]:
        file.unlink(missing_ok=True)
    shutil.rmtree(Path(folder, "additional_chat_templates"), ignore_errors=True)


def clear_figures(output_dir: str) -> None:
    """Remove the figures that an earlier run has drawn of its score: another may draw none."""
    for name in _FIGURES if is_main_process() else ():
        Path(output_dir, name).unlink(missing_ok=True)
