"""Where a model comes from: a hub id, a folder, a `.gguf` file, or the bundled model.

The last two are prepared once (see `bundled.py`).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipelib.models.bundled import (
    BUNDLED_NAME,
    INSTEAD,
    bundled_folder,
    prepare_bundled,
    prepare_gguf,
)
from recipelib.runtime import UserError, first_line


def describe_model(model_name_or_path: str | None) -> str:
    """A short name for reports: of the bundled model, the file or the folder, or the hub id."""
    if model_name_or_path is None:
        return f"{BUNDLED_NAME} (bundled)"
    path = Path(model_name_or_path).expanduser()
    if path.resolve() == bundled_folder().resolve():
        return f"{BUNDLED_NAME} (bundled)"
    # Links are not resolved: in the hub's cache they lead to files named by a hash.
    return os.path.basename(os.path.abspath(path)) if path.exists() else model_name_or_path


def resolve_model(model_name_or_path: str | None, *, weights: bool = True) -> str:
    """A folder or hub id that `from_pretrained` takes.

    None is the bundled model. That model and a `.gguf` file are converted once, to float32 whatever
    the file's own precision (four bytes a parameter on disk), and found in the cache afterwards.

    Args:
        weights: whether a folder has to hold weights, too.
    Raises:
        UserError: a file or folder is missing, incomplete or unsafe to load, or cannot be fetched,
            converted or kept.
    """
    if model_name_or_path is None:
        return str(prepare_bundled())
    path = Path(model_name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"{model_name_or_path}: no such .gguf file; check the path")
        return str(prepare_gguf(path))
    if path.is_dir():
        _check_folder(path, weights)
        return str(path)
    if path.is_file():
        raise UserError(
            f"{model_name_or_path}: a file, but not a .gguf; pass the folder that holds config.json"
        )
    # A hub id has at most one slash, in its middle; anything else was meant as a path.
    slashes = model_name_or_path.replace(os.sep, "/")
    if slashes.startswith((".", "/", "~")) or slashes.endswith("/") or slashes.count("/") > 1:
        raise UserError(f"{model_name_or_path}: no such folder; check the path, or pass a hub id")
    return model_name_or_path


def stored_config(model_name_or_path: str | None = None, *, revision: str | None = None) -> dict:
    """What the model's config.json says, without loading the model.

    Raises:
        UserError: as `resolve_model`, or an error of the hub.
    """
    source = resolve_model(model_name_or_path)
    with hub_errors_in_one_line(model_name_or_path or BUNDLED_NAME, source, revision):
        from transformers import PretrainedConfig

        return PretrainedConfig.get_config_dict(source, revision=revision or "main")[0]


def weights_identity(model_name_or_path: str | None, revision: str | None = None) -> list:
    """What tells the weights of a model or adapter from others without reading them: the path or
    hub id, the revision, and each file's name, size and time of change.
    """
    path = Path(model_name_or_path or bundled_folder()).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(path.resolve()) if files else model_name_or_path, revision, stats]


# Local folders -----------------------------------------------------------------------------------


def _check_folder(folder: Path, needs_weights: bool) -> None:
    files = {file.name for file in folder.glob("*.safetensors")}
    weights = bool(files - {"adapter_model.safetensors"})
    if (folder / "adapter_config.json").is_file() and not weights:
        raise UserError(
            f"{folder}: a PEFT adapter, not a whole model; merge it into its base model with"
            " recipes/merge.py, or pass the base model"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so no model folder; {INSTEAD}")
    if weights or not needs_weights:
        return
    if not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: no weights (model.safetensors) beside config.json; {INSTEAD}")
    try:
        architecture = str(json.loads((folder / "config.json").read_text())["architectures"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        architecture = ""
    if not architecture.isidentifier():  # it goes into a command that the user may run
        architecture = "AutoModelForCausalLM"
    code = (
        f"import transformers as t; m = t.{architecture}.from_pretrained({str(folder)!r});"
        f" m.save_pretrained({str(folder)!r})"
    )
    raise UserError(
        f"{folder}: only pickled weights (pytorch_model.bin), which can run code when loaded; if"
        f" you trust them, convert to safetensors once: python -c {shlex.quote(code)}"
    )


# Errors of the hub -------------------------------------------------------------------------------


@contextmanager
def hub_errors_in_one_line(name: str, source: str, revision: str | None) -> Iterator[None]:
    """Turn errors in the block, which loads something from the hub or a folder, into one line.

    Args:
        name: the model's name as the user gave it.
        source: the folder or hub id that is loaded from.
    Raises:
        UserError: what went wrong and the cure; or a revision was given for a folder.
    """
    from safetensors import SafetensorError

    if revision is not None and Path(source).is_dir():
        raise UserError(f"{name}: --revision applies to a hub id only; leave it out")
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{name}: {_reason(error, name, source, revision)}") from error


def _reason(error: BaseException, name: str, source: str, revision: str | None) -> str:
    """What failed and the cure, from an exception of `from_pretrained` and its causes."""
    from huggingface_hub import errors as hub

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(*types: type) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    text = str(error)
    if "trust_remote_code" in text:
        return (
            "the model brings its own Python code; pass --trust_remote_code if you have read it and"
            " trust it, or choose a model that transformers knows"
        )
    if not Path(source).is_dir():
        if caused_by(hub.GatedRepoError):
            return (
                f"gated on the hub; accept its license at https://huggingface.co/{name} and run"
                " `hf auth login`"
            )
        if caused_by(hub.RevisionNotFoundError):
            return f"the hub has no revision {revision!r} of it; see the model page's branches"
        if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
            return (
                "neither a folder here nor a model on the hub; check the spelling, or run"
                " `hf auth login` if it is private"
            )
        if caused_by(hub.LocalEntryNotFoundError, ConnectionError, TimeoutError):
            return (
                "no connection to the hub and not in its cache; pass a local folder, or leave"
                " --model_name_or_path out for the bundled model"
            )
        if "safetensors" in text:
            return (
                "no safetensors weights on the hub, and other formats can run code when loaded;"
                " convert it at https://huggingface.co/spaces/safetensors/convert or choose another"
            )
    return f"cannot be loaded ({first_line(text)}); check the files and the installed versions"
