"""Adapters and soft prompts that a run has saved, put on their model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import recipelib.adapters.bottleneck  # noqa: F401  PEFT knows its adapters from here on
from recipelib.adapters.soft_prompts import PROMPTS
from recipelib.adapters.soft_verbalizer import SoftVerbalizer
from recipelib.models import (
    classification_head,
    hub_errors_in_one_line,
    is_masked,
    is_masked_model,
    load_pretrained,
    stored_config,
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

            patterns = ["*.json", "*.safetensors"]
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


def with_adapter(model, adapter: Path | None):
    """The model with an adapter on it, if there is one.

    Raises:
        UserError: the adapter was trained on another model.
    """
    if adapter is None:
        return model
    config, width = (
        PeftConfig.from_pretrained(adapter),
        model.get_input_embeddings().weight.shape[1],
    )
    try:
        # PEFT would see neither before a text is read.
        if config.peft_type in PROMPTS and config.token_dim != width:
            raise ValueError(f"its width is {config.token_dim}, the model's {width}")
        has_head = type(model).__name__.endswith("ForSequenceClassification")
        if (config.task_type == "SEQ_CLS") != has_head:
            raise ValueError("it was trained with a classification head, which answers --predict")
        masked = config.task_type == "FEATURE_EXTRACTION"  # see `prompt_shape`
        if config.is_prompt_learning and masked != is_masked_model(model):
            raise ValueError(f"it is for a {'masked' if masked else 'causal'} language model")
        return PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{adapter}: does not fit the model ({first_line(error)}); pass the one that it was "
            f"trained on: {config.base_model_name_or_path}"
        ) from None


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
    masked = is_masked(stored_config(base, revision=load.get("revision")))
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
