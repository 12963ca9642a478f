"""What of a model text does not reach, or an adapter must not."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from recipelib.models.head import bare_model

_OTHER_SENSES = re.compile("vision|audio|image|speech|video|vq")


def tower_names(model: nn.Module) -> list[str]:
    """The names of a model's modules for images and sounds, which no text passes through: those
    beside the language model and its embeddings, if the config has a part for them.
    """
    bare = bare_model(model)
    if not any(_OTHER_SENSES.search(part) for part in getattr(bare.config, "sub_configs", ())):
        return []
    kept = {bare.get_decoder(), bare.get_input_embeddings(), bare.get_output_embeddings()}

    def beside(module: nn.Module, name: str) -> list[str]:
        if module in kept:
            return []
        if kept.isdisjoint(module.modules()):
            return [name]
        inner = module.named_children()
        return [found for key, child in inner for found in beside(child, f"{name}.{key}")]

    return [found for key, child in bare.named_children() for found in beside(child, key)]


def tower_modules(model: nn.Module) -> set[nn.Module]:
    """All modules of the towers."""
    bare = bare_model(model)
    return {inner for name in tower_names(bare) for inner in bare.get_submodule(name).modules()}


def without_lora(model: nn.Module) -> list[str]:
    """The names of a model's linear layers that LoRA has to leave alone, for PEFT's
    `exclude_modules`: those of its towers; those that put out more than a product, such as Llama
    4's routers; and those of a state-space mixer (Mamba's) whose weights are read without calling
    the layer, so that an adapter beside them would never be trained.
    """
    towers, names = tower_modules(model), []
    for path, parent in model.named_modules():
        mixes_states = hasattr(parent, "A_log") and hasattr(parent, "D")
        for key, child in parent.named_children():
            if not isinstance(child, nn.Linear | Conv1D):
                continue
            more = re.search("Router|Grouped", type(child).__name__)
            if child in towers or more or (mixes_states and key != "in_proj"):
                names.append(f"{path}.{key}".removeprefix("."))
    return names
