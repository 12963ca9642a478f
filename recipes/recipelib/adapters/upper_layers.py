"""Adapters in some layers of a model only."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model

from recipelib.adapters.adapter_layers import add_bottlenecks
from recipelib.adapters.bottleneck import BottleneckConfig
from recipelib.models import find_layers, head_modules, linear_names, without_lora


def adapt_layers(
    model, method: str, layers: Sequence[int], revision: str | None = None
) -> PeftModel:
    """The model with adapters in these layers, at the sizes that `lora_sft.py` and `adapter_sft.py`
    have by default.

    Args:
        method: "lora" or "bottleneck".
        layers: their numbers; the last ones.
        revision: of the base model; PEFT writes it into the adapter's configuration.
    """
    kind = type(model).__name__
    shape = {"task_type": None if kind.endswith("ForMaskedLM") else "CAUSAL_LM"}
    if kind.endswith("ForSequenceClassification"):  # its head is new, and kept with the adapter
        shape = {"task_type": "SEQ_CLS", "modules_to_save": head_modules(model)}
    if method == "bottleneck":
        top = None if len(layers) == len(find_layers(model).layers) else len(layers)
        config = BottleneckConfig(**shape)
        return add_bottlenecks(model, config, top_layers=top, revision=revision)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=linear_names(model, layers),
        exclude_modules=without_lora(model),
        init_lora_weights="gaussian",
        **shape,
    )
    return get_peft_model(model, lora, revision=revision)
