"""Loads tokenizer and model from a hub id, a local folder, a `.gguf` file, or the bundled model.

The bundled model and `.gguf` files are prepared once (see `bundled.py`).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.models.bundled import (
    BUNDLED_NAME,
    INSTEAD,
    bundled_folder,
    prepare_bundled,
    prepare_gguf,
)
from recipelib.runtime import UserError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def describe_model(model_name_or_path: str | None) -> str:
    """A short name for reports: of the bundled model, the file or the folder, or the hub id."""
    if model_name_or_path is None:
        return f"{BUNDLED_NAME} (bundled)"
    path = Path(model_name_or_path).expanduser()
    if path.resolve() == bundled_folder().resolve():
        return f"{BUNDLED_NAME} (bundled)"
    # Links are not resolved: in the hub's cache they lead to files named by a hash.
    return os.path.basename(os.path.abspath(path)) if path.exists() else model_name_or_path


def resolve_model(model_name_or_path: str | None) -> str:
    """A folder or hub id that `from_pretrained` takes.

    None is the bundled model. That model and a `.gguf` file are converted once, to float32 whatever
    the file's own precision (four bytes a parameter on disk), and found in the cache afterwards.

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
        _check_folder(path)
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


def load_tokenizer(
    model_name_or_path: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer, with a pad token.

    A folder needs to hold only the tokenizer's files, so the folder of a trained adapter will do.

    Raises:
        UserError: as `resolve_model`; a slow tokenizer, one with neither a pad nor an eos token, or
            an error of the hub.
    """
    if model_name_or_path is not None and _has_tokenizer(Path(model_name_or_path).expanduser()):
        source = str(Path(model_name_or_path).expanduser())
    else:
        source = resolve_model(model_name_or_path)
    name = model_name_or_path or BUNDLED_NAME
    with hub_errors_in_one_line(name, source, revision):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: {type(tokenizer).__name__} is a slow tokenizer and gives no character"
            " offsets, which the recipes need; save a fast one beside the model (tokenizer.json,"
            " for instance with transformers.convert_slow_tokenizer) or pass another model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{name}: the tokenizer has neither a pad nor an eos token; set pad_token in its"
                " tokenizer_config.json"
            )
        # Safe here: labels are set by position and never masked by the pad id, so a supervised
        # end marker stays supervised.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(
    model_name_or_path: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_class: type | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model, loaded from safetensors only.

    Args:
        dtype: "auto": as it was saved.
        model_class: the class whose `from_pretrained` loads it; by default `AutoModelForCausalLM`.
        kwargs: further arguments of `from_pretrained`.
    Raises:
        UserError: as `resolve_model`, an error of the hub, weights that do not load, or an
            encoder-decoder model.
    """
    source = resolve_model(model_name_or_path)
    with hub_errors_in_one_line(model_name_or_path or BUNDLED_NAME, source, revision):
        if model_class is None:
            from transformers import AutoModelForCausalLM as model_class

        model = model_class.from_pretrained(
            source,
            dtype=dtype,
            revision=revision or "main",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )
    trained = f"{model.config.architectures}"
    if "ForSequenceClassification" in trained and model_class.__name__.endswith("LM"):
        raise UserError(
            f"{model_name_or_path}: has a classification head instead of a vocabulary; it answers "
            "with --predict, and is trained from the model that it came from"
        )
    # Of some encoder-decoders, such as BART, transformers would load only the decoder.
    if getattr(type(model.config), "is_encoder_decoder", False):
        raise UserError(
            f"{model_name_or_path}: is an encoder-decoder model, which is not trained here; take "
            "a decoder"
        )
    return model


def load_model(
    args,
    training,
    *,
    float32: bool = False,
    masked: bool = False,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model that a recipe's arguments name, in the dtype that its trainer computes in. Then the
    seed is set, so that what is drawn next, such as an adapter's initial weights, depends on
    nothing before.

    Args:
        args: a recipe's `model_name_or_path`, `revision` and `attn_implementation`.
        training: the trainer's arguments.
        float32: load in float32, for weights that are trained themselves; autocast or FSDP then
            compute in lower precision.
        masked: load a masked language model instead of a causal one.
        classes: load it with a classification head for these instead, whose weights are drawn by
            the seed.
        options: further arguments of `load_pretrained`, such as those from `four_bit_loading`.
    Raises:
        UserError: as `load_pretrained`.
    """
    import torch
    from transformers import AutoModelForMaskedLM, set_seed

    kind = AutoModelForMaskedLM if masked else None
    if classes is not None:
        set_seed(training.seed)
        kind, head = classification_head(classes, args.model_name_or_path, args.revision)
        options |= head
    model = load_pretrained(
        args.model_name_or_path,
        dtype=torch.float32 if float32 else training.model_dtype[0],
        revision=args.revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=training.trust_remote_code,
        model_class=kind,
        **options,
    )
    set_seed(training.seed)
    return model


def classification_head(
    classes: Sequence[str], model_name_or_path: str | None, revision: str | None = None
) -> tuple[type, dict[str, Any]]:
    """The class that loads a model with a classification head, and its further options.

    Args:
        classes: in the order of their numbers.
        model_name_or_path: whose pad token tells causal models where a text ends.
    """
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(classes))
    return AutoModelForSequenceClassification, {
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "pad_token_id": load_tokenizer(model_name_or_path, revision=revision).pad_token_id,
    }


def stored_config(model_name_or_path: str | None = None, *, revision: str | None = None) -> dict:
    """What the model's config.json says, without loading the model.

    Raises:
        UserError: as `resolve_model`, or an error of the hub.
    """
    source = resolve_model(model_name_or_path)
    with hub_errors_in_one_line(model_name_or_path or BUNDLED_NAME, source, revision):
        from transformers import PretrainedConfig

        return PretrainedConfig.get_config_dict(source, revision=revision or "main")[0]


def is_masked(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a masked language model."""
    architectures = config.get("architectures") or ()
    return any(str(architecture).endswith("ForMaskedLM") for architecture in architectures)


# The model types that learn their positions, whose number is limited, and how many positions come
# before the first token's.
_LEARNED_POSITIONS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt"), 0),
    **dict.fromkeys(("bert", "distilbert", "albert", "electra", "mobilebert", "deberta"), 0),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), 2),
}


def most_positions(config: Mapping[str, Any]) -> int:
    """How many tokens a model of this config.json can read at most. Most models have rotary
    positions, which have no limit; for them it is `sys.maxsize`.
    """
    before = _LEARNED_POSITIONS.get(config.get("model_type"))
    most = config.get("max_position_embeddings", config.get("n_positions"))
    return sys.maxsize if before is None or most is None else most - before


def weights_identity(model_name_or_path: str | None, revision: str | None = None) -> list:
    """What tells the weights of a model or adapter from others without reading them: the path or
    hub id, the revision, and each file's name, size and time of change.
    """
    path = Path(model_name_or_path or bundled_folder()).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(path.resolve()) if files else model_name_or_path, revision, stats]


def layer_names(model: PreTrainedModel, names: list[str]) -> list[str] | str:
    """The value of PEFT's `target_modules` for names from the command line.

    Raises:
        UserError: as `require_modules`.
    """
    if names == ["all-linear"]:
        return "all-linear"
    require_modules(model, names)
    return names


def require_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Check that each name is the name of a layer with a weight matrix, or the end of one.

    Raises:
        UserError: a name that fits no such layer; the line lists the layers' names.
    """
    layers = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) > 1
    ]
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in layers):
            known = {name.split(".")[-1] for name in layers}
            raise UserError(
                f"--target_modules {wanted}: the model has no such layer; it has "
                f"{', '.join(sorted(known))}"
            )


# Local folders -----------------------------------------------------------------------------------


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _check_folder(folder: Path) -> None:
    files = {file.name for file in folder.glob("*.safetensors")}
    weights = bool(files - {"adapter_model.safetensors"})
    if (folder / "adapter_config.json").is_file() and not weights:
        raise UserError(
            f"{folder}: a PEFT adapter, not a whole model; merge it into its base model with"
            " recipes/merge.py, or pass the base model"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so no model folder; {INSTEAD}")
    if weights:
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
