"""Models of shapes only: built from a config in a moment, whatever their size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from recipelib.models import (
    find_layers,
    hub_errors_in_one_line,
    is_masked,
    stored_config,
    without_lora,
)
from recipelib.runtime import UserError

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
# The published config.json of meta-llama/Llama-3.1-8B and meta-llama/Llama-3.1-70B, but for the
# scaling of the rotary positions, which takes neither memory nor time.
SHAPES = {
    "8B": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
# Of a 4-bit weight, scales included (Dettmers et al. 2023, arXiv:2305.14314, sec. 3).
_PACKED_BITS = 4.127


def read_config(model_name_or_path: str | None = None) -> PretrainedConfig:
    """The config of a model.

    Args:
        model_name_or_path: a name of SHAPES, a folder with a config.json (weights or not), or what
            `load_pretrained` takes; the bundled model by default.
    Raises:
        UserError: as `stored_config`, or no causal language model that transformers knows.
    """
    name = model_name_or_path or "the bundled model"
    folder = Path(model_name_or_path or "").expanduser()
    if model_name_or_path in SHAPES:
        values = SHAPES[model_name_or_path]
    elif model_name_or_path and (folder / "config.json").is_file():
        with hub_errors_in_one_line(name, str(folder), None):
            values = PretrainedConfig.get_config_dict(folder)[0]
    else:
        values = stored_config(model_name_or_path)
    if "model_type" not in values:
        raise UserError(f"{name}: its config.json has no model_type; pass a model of transformers")
    with hub_errors_in_one_line(name, str(folder), None):
        config = AutoConfig.for_model(**values)
    # Asked beforehand, for transformers imports all configs to list them in its error.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or is_masked(config):
        raise UserError(
            f"{name}: a {config.model_type} is no causal language model of transformers; pass one "
            "that is, such as a llama"
        )
    with hub_errors_in_one_line(name, str(folder), None):
        model = skeleton(config, torch.float32)
    find_layers(model)
    # Without their kernels they compute token by token, which takes minutes.
    if any(hasattr(module, "A_log") and hasattr(module, "D") for module in model.modules()):
        raise UserError(f"{name}: has state-space layers, for which there are no plans; try a run")
    return config


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype, r: int | None = None, packed: bool = False
) -> nn.Module:
    """A causal language model on the meta device, as the recipes train it.

    Args:
        dtype: of its weights.
        r: of LoRA on all linear layers but the head, in float32 (as `get_peft_model` makes it);
            None: all parameters are trained.
        packed: whether the weights beside LoRA's have 4 bits; `estimate_memory` then takes them
            for bitsandbytes'.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if r is None:
            return model
        options = {"target_modules": "all-linear", "exclude_modules": without_lora(model)}
        lora = LoraConfig(r=r, **options, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        for module in model.modules() if packed else ():
            if isinstance(module, LoraLayer):
                base = module.base_layer
                shape = torch.Size((module.out_features, module.in_features))
                size = round(shape.numel() * _PACKED_BITS / 8 / dtype.itemsize)
                base.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
                base.quant_state = SimpleNamespace(shape=shape, dtype=dtype)
    return model
