"""PEFT's tuners and their files: bottleneck adapters, soft prompts, PiSSA, merging, going on."""

from recipelib.adapters.adapter_layers import (
    add_bottlenecks,
    errors_name_options,
    save_own_code,
    save_without_adapters_below,
    without_adapters,
)
from recipelib.adapters.adapterhub import load_adapterhub
from recipelib.adapters.bottleneck import BottleneckConfig
from recipelib.adapters.further import TrainedAdapter, open_adapter
from recipelib.adapters.merging import merge_adapter
from recipelib.adapters.pissa import save_as_lora, save_start
from recipelib.adapters.saved import (
    BASE,
    SOFT_VERBALIZER,
    base_of,
    load_soft_verbalizer,
    load_tuned,
    resolve_adapter,
    tokenizer_of_adapter,
    with_adapter,
)
from recipelib.adapters.soft_prompts import (
    check_prompt,
    compute_prompt_once,
    keys_and_values,
    prompt_shape,
    start_ids,
    start_prefix,
    start_prompt,
)
from recipelib.adapters.soft_verbalizer import SoftVerbalizer
from recipelib.adapters.upper_layers import adapt_layers

__all__ = [
    "BASE",
    "SOFT_VERBALIZER",
    "BottleneckConfig",
    "SoftVerbalizer",
    "TrainedAdapter",
    "adapt_layers",
    "add_bottlenecks",
    "base_of",
    "check_prompt",
    "compute_prompt_once",
    "errors_name_options",
    "keys_and_values",
    "load_adapterhub",
    "load_soft_verbalizer",
    "load_tuned",
    "merge_adapter",
    "open_adapter",
    "prompt_shape",
    "resolve_adapter",
    "save_as_lora",
    "save_own_code",
    "save_start",
    "save_without_adapters_below",
    "start_ids",
    "start_prefix",
    "start_prompt",
    "tokenizer_of_adapter",
    "with_adapter",
    "without_adapters",
]
