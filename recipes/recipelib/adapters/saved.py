"""Adapters and soft prompts that a run has saved, put on their model again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

import recipelib.adapters.bottleneck  # noqa: F401  PEFT knows its adapters from here on
from recipelib.adapters.soft_prompts import PROMPTS
from recipelib.adapters.soft_verbalizer import SoftVerbalizer
from recipelib.models import (
    bare_model,
    classification_head,
    hub_errors_in_one_line,
    is_masked_model,
    load_pretrained,
    nature_of,
)
from recipelib.runtime import UserError, first_line

SOFT_VERBALIZER = "soft_verbalizer.safetensors"
BASE = "base_model"  # the subfolder of a model that was tuned together with a soft prompt


def resolve_adapter(adapter: str, revision: str | None = None) -> Path:
    """The folder of a PEFT adapter, fetched from the hub if it is not local; safetensors only.

    Raises:
        UserError: no adapter there, pickled weights only, or a hub that refuses.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1:
            raise UserError(
                f"--adapter {adapter}: no such folder; check the path, or pass a hub id"
            )
        with hub_errors_in_one_line(adapter, adapter, None):
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.safetensors", "*.jinja", "*.yaml"]
            folder = Path(snapshot_download(adapter, revision=revision, allow_patterns=patterns))
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {adapter}: no adapter_config.json, so no adapter; a whole model goes to "
            "--model_name_or_path"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"--adapter {adapter}: no adapter_model.safetensors, and other formats can run code "
            "when loaded; save it again with a recent PEFT"
        )
    return folder


def base_of(adapter: Path) -> tuple[str, str | None]:
    """The model that an adapter was trained on, and its revision."""
    config = PeftConfig.from_pretrained(adapter)
    return config.base_model_name_or_path, config.revision


def with_adapter(model, adapter: Path | None, *, trained_as: PeftConfig | None = None):
    """The model with an adapter on it, if there is one; with the embeddings of tokens that were
    added before it was trained, and with answers that end where they did in training.

    Args:
        trained_as: the adapter's configuration, to train it further; None to use it as it is.
    Raises:
        UserError: the adapter was trained on another model.
    """
    if adapter is None:
        return model
    config = trained_as or PeftConfig.from_pretrained(adapter)
    trained_on = config.base_model_name_or_path
    width = model.get_input_embeddings().weight.shape[1]
    try:
        # PEFT would see none of this before a text is read, or not at all.
        if config.peft_type in PROMPTS and config.token_dim != width:
            raise ValueError(f"its width is {config.token_dim}, the model's {width}")
        has_head = type(model).__name__.endswith("ForSequenceClassification")
        if (config.task_type == "SEQ_CLS") != has_head:
            raise ValueError("it was trained with a classification head, which answers --predict")
        masked = config.task_type == "FEATURE_EXTRACTION"  # see `prompt_shape`
        if config.is_prompt_learning and masked != is_masked_model(model):
            raise ValueError(f"it is for a {'masked' if masked else 'causal'} language model")
        if beyond := _beyond(adapter, model, config):
            raise ValueError(f"it adapts {beyond}, which the model does not have")
        size = saved_embeddings(adapter)
        if size and size != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(size, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            warnings.filterwarnings("ignore", ".*from a non-meta parameter")
            if trained_as:
                return _to_train(model, adapter, config)
            tuned = PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, UserWarning) as error:
        _, heading, sizes = str(error).partition("size mismatch for ")
        raise UserError(
            f"{adapter}: does not fit the model ({first_line(heading + sizes or error)}); pass the "
            f"one that it was trained on: {trained_on}"
        ) from None
    if (adapter / GENERATION_CONFIG_NAME).is_file() and bare_model(tuned).can_generate():
        bare_model(tuned).generation_config = GenerationConfig.from_pretrained(adapter)
    return tuned


def _to_train(model, adapter: Path, config: PeftConfig) -> PeftModel:
    """The model with an adapter on it that is trained further."""
    load = {"is_trainable": True, "torch_device": "cpu"}
    config.base_model_name_or_path = model.name_or_path
    if not config.is_prompt_learning:
        return PeftModel.from_pretrained(model, adapter, config=config, **load)
    # PEFT's `from_pretrained` refuses to train a prompt that it has loaded.
    tuned = get_peft_model(model, config)
    tuned.load_adapter(adapter, "default", **load)
    return tuned


# How the parts of a tensor's name begin that stand behind those of its layer.
_OWN = {
    method: (prefix, "base_layer", "token_adapter", "weight", "bias")
    for method, prefix in (("LORA", "lora_"), ("BOTTLENECK", "bottleneck_"))
}


def _beyond(adapter: Path, model, config: PeftConfig) -> str | None:
    """A layer of which an adapter has weights, and which the model does not have: behind its last
    one, or of another name within one. PEFT would pass over both.
    """
    modules, own = dict(model.named_modules()), _OWN.get(str(config.peft_type.value), ("",))
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        names = [name.removeprefix("base_model.model.").split(".") for name in file.keys()]  # noqa: SIM118
    for parts in names:
        numbered = False
        for place, part in enumerate(parts):
            above, name = ".".join(parts[:place]), ".".join(parts[: place + 1])
            in_list = isinstance(modules[above], torch.nn.ModuleList)
            numbered = numbered or in_list
            if name in modules:
                continue
            # PEFT itself joins experts that were saved one by one.
            joined = part.startswith(own) or parts[place - 1] == "experts"
            if in_list or (numbered and not joined):
                return name
            break
    return None


# What the layers are called whose rows are tokens.
_OF_TOKENS = {
    *("embed_tokens", "embed_in", "word_embeddings", "embeddings", "wte"),
    *("lm_head", "embed_out"),
}


def tokenizer_of_adapter(adapter: Path | str | None) -> dict[str, Any]:
    """What an encoder has to know of an adapter: the folder of its tokenizer, if it brings one, and
    for how many tokens it has embeddings.
    """
    if not adapter:
        return {}
    own = Path(adapter, "tokenizer_config.json").is_file()
    return {
        "tokenizer_of": str(adapter) if own else None,
        "vocabulary": saved_embeddings(adapter),
    }


def saved_embeddings(adapter: Path | str) -> int | None:
    """For how many tokens an adapter brings embeddings or a head of its own, as it does where
    tokens were added before it was trained; None where it brings neither.
    """
    sizes = []
    with safe_open(Path(adapter) / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            *layer, kind = re.sub(r"\.(token_adapter|base_layer)\b", "", name).split(".")
            if kind == "weight" and layer and layer[-1] in _OF_TOKENS:
                sizes.append(file.get_slice(name).get_shape()[0])
    return max(sizes, default=None)


def load_soft_verbalizer(folder: Path | str, model) -> None:
    """Put the trained label embeddings of a run into its model, whose logits are then those of the
    labels, [rows, tokens, labels], in the order of the template's verbalizer.
    """
    SoftVerbalizer(**load_file(Path(folder) / SOFT_VERBALIZER)).into(model)


def load_tuned(
    folder: Path | str, run: Mapping[str, Any], model_name_or_path: str | None = None, **load: Any
):
    """The model of a finished run: an adapter or a soft prompt on the model that it was trained
    with, or a tuned model; with its soft verbalizer if it has one.

    Args:
        run: what the run's metrics.json holds.
        model_name_or_path: of the untouched model under an adapter, if it has moved.
        load: options of `load_pretrained`.
    """
    folder = Path(folder)
    adapted = (folder / "adapter_config.json").exists()
    base = str(folder)
    if run.get("tune") == "both":
        base = str(folder / BASE)
    elif adapted:
        trained_on, revision = base_of(folder)
        base = model_name_or_path or trained_on
        if not model_name_or_path and not load.get("revision"):
            load["revision"] = revision
    masked = nature_of(
        base,
        revision=load.get("revision"),
        trust_remote_code=load.get("trust_remote_code", False),
    ).masked
    kind = AutoModelForMaskedLM if masked else None
    if run.get("head") == "classifier":
        kind, head = classification_head(run["classes"], str(folder))
        load |= head
    model = load_pretrained(base, model_class=kind, **load)
    if adapted:
        model = with_adapter(model, folder)
    if run.get("verbalizer") == "soft":
        load_soft_verbalizer(folder, model)
    return model
