"""A LoRA adapter added into the weights of its base model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel

from recipelib.adapters.bottleneck import NO_MERGING
from recipelib.adapters.saved import resolve_adapter
from recipelib.models import load_pretrained, load_tokenizer
from recipelib.runtime import UserError


def merge_adapter(adapter: str, output: str, base: str | None = None, dtype: str = "auto") -> Path:
    """Write the base model with a LoRA adapter added in, and its tokenizer.

    Args:
        adapter: the folder of a run, or a hub id.
        output: the folder to write to.
        base: the base model, if it has moved since the adapter was trained.
        dtype: of the merged weights; "auto" for the base model's.
    Returns:
        The folder written to.
    Raises:
        UserError: no adapter there, or one that cannot be merged.
    """
    folder = resolve_adapter(adapter)
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type == "BOTTLENECK":
        raise UserError(f"{adapter}: {NO_MERGING}")
    if config.is_prompt_learning:
        raise UserError(f"{adapter}: a soft prompt is no weight of the model; keep it loaded")
    revision = None if base else config.revision
    model = load_pretrained(base or config.base_model_name_or_path, dtype=dtype, revision=revision)
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{adapter}: cannot be merged: {' '.join(str(error).split())}") from None
    merged.save_pretrained(output)
    load_tokenizer(str(folder)).save_pretrained(output)
    return Path(output)
