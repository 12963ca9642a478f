"""Tokenizer and model from anywhere, what they can take, 4 bits, logits at places, sharding."""

from recipelib.models.freezing import (
    EMBEDDINGS,
    find_layers,
    group_of,
    head_modules,
    layer_map,
    layer_of,
    linear_names,
    top_layers,
    train_only,
)
from recipelib.models.head import bare_model, is_masked_model, logits_at
from recipelib.models.loading import (
    classification_head,
    layer_names,
    load_model,
    load_pretrained,
    load_tokenizer,
    require_modules,
)
from recipelib.models.nature import Nature, is_masked, nature_of, nature_of_model
from recipelib.models.quantization import (
    count_parameters,
    describe_quantization,
    four_bit_loading,
    prepare_four_bit,
)
from recipelib.models.sharding import (
    FSDP_OFF,
    check_shards,
    decoder_layers,
    name_layers,
    place_model,
    prepare_for_fsdp2,
    reshard,
)
from recipelib.models.sources import (
    describe_model,
    hub_errors_in_one_line,
    resolve_model,
    stored_config,
    weights_identity,
)
from recipelib.models.towers import tower_names, without_lora

__all__ = [
    "EMBEDDINGS",
    "FSDP_OFF",
    "Nature",
    "bare_model",
    "check_shards",
    "classification_head",
    "count_parameters",
    "decoder_layers",
    "describe_model",
    "describe_quantization",
    "find_layers",
    "four_bit_loading",
    "group_of",
    "head_modules",
    "hub_errors_in_one_line",
    "is_masked",
    "is_masked_model",
    "layer_map",
    "layer_names",
    "layer_of",
    "linear_names",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "logits_at",
    "name_layers",
    "nature_of",
    "nature_of_model",
    "place_model",
    "prepare_for_fsdp2",
    "prepare_four_bit",
    "require_modules",
    "reshard",
    "resolve_model",
    "stored_config",
    "top_layers",
    "tower_names",
    "train_only",
    "weights_identity",
    "without_lora",
]
