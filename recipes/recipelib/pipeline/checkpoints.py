"""Checkpoints of a pipeline: each process writes what it trains, and reads what it needs from the
files of all, so that a run can go on with another number of stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recipelib.pipeline.pipeline import Pipeline
from recipelib.runtime import STAGE_FILES, UserError

_OPTIMIZER_FILES = "optimizer-*.safetensors"


def save_weights(folder: str, pipeline: Pipeline) -> None:
    """Write what this process trains, and once what kind of model it is."""
    model, stages = pipeline.model, pipeline.stages
    if stages.pipeline == 0 and stages.is_first:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = model.peft_config["default"] if isinstance(model, PeftModel) else model.config
        config.save_pretrained(folder)
    _save(folder, STAGE_FILES, pipeline, pipeline.trained(once=True))


def save_optimizer(folder: str, pipeline: Pipeline, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's states of what this process trains, each under the name of its weight.
    Numbers become tensors; which ones they were is kept beside them, and all names, for there are
    optimizers without states.
    """
    tensors, numbers, own = {}, [], pipeline.trained(once=True)
    for name, weight in own.items():
        for kind, value in optimizer.state[weight].items():
            key = f"{kind}:{name}"
            if not isinstance(value, torch.Tensor):
                numbers.append(key)
            tensors[key] = torch.as_tensor(value)
    notes = {"numbers": json.dumps(numbers), "names": json.dumps([*own])}
    _save(folder, _OPTIMIZER_FILES, pipeline, tensors, notes)


def load_weights(folder: str, pipeline: Pipeline) -> None:
    """Read what this process trains.

    Raises:
        UserError: the checkpoint holds something else, or a file is missing or damaged.
    """
    own = pipeline.trained()
    for name, tensor, _ in _read(folder, STAGE_FILES, own):
        if tensor.shape != own[name].shape:
            raise UserError(
                f"--resume_from_checkpoint {folder}: {name} has another shape than here; go on "
                "with the same model, --peft and --r"
            )
        with torch.no_grad():
            own[name].copy_(tensor)


def load_optimizer(folder: str, pipeline: Pipeline, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer's states of what this process trains.

    Raises:
        UserError: a file is missing or damaged.
    """
    own = pipeline.trained()
    for key, tensor, numbers in _read(folder, _OPTIMIZER_FILES, own):
        kind, _, name = key.partition(":")
        weight = own[name]
        value = tensor.item() if key in numbers else tensor
        if isinstance(value, torch.Tensor) and kind != "step":  # which stays on the CPU
            value = value.to(weight.device)
        optimizer.state[weight][kind] = value


def _save(
    folder: str,
    files: str,
    pipeline: Pipeline,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write this process's file; several pipelines hold the same, and the first one writes."""
    stages = pipeline.stages
    if stages.pipeline > 0:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = files.replace("*", f"{stages.place + 1:05}-of-{stages.processes:05}")
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(own, Path(folder, file), {"format": "pt", **(metadata or {})})


def _read(
    folder: str, files: str, names: Mapping[str, object]
) -> Iterator[tuple[str, torch.Tensor, list[str]]]:
    """The tensors of all processes' files that belong to weights of these names, with the file's
    list of those that are numbers.

    Raises:
        UserError: a file is damaged, or no file knows one of the names.
    """
    missing = {*names}
    for path in sorted(Path(folder).glob(files)):
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                numbers = json.loads(notes.get("numbers", "[]"))
                missing -= {*file.keys(), *json.loads(notes.get("names", "[]"))}
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    if key.rpartition(":")[2] in names:
                        yield key, file.get_tensor(key), numbers
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); resume from an earlier checkpoint"
            ) from None
    if missing:
        raise UserError(
            f"--resume_from_checkpoint {folder}: no {files} has {min(missing)}; go on with the "
            "same model, --peft and --r, or from an earlier checkpoint if a file was lost"
        )
