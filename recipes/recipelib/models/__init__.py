"""Tokenizer and model from anywhere, the bundled model, 4 bits, logits at places, sharding."""

from recipelib.models.head import bare_model, is_masked_model, logits_at
from recipelib.models.loading import (
    describe_model,
    hub_errors_in_one_line,
    is_masked,
    layer_names,
    load_model,
    load_pretrained,
    load_tokenizer,
    most_positions,
    require_modules,
    stored_config,
    weights_identity,
)
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
    place_model,
    prepare_for_fsdp2,
    reshard,
)

__all__ = [
    "FSDP_OFF",
    "bare_model",
    "check_shards",
    "count_parameters",
    "decoder_layers",
    "describe_model",
    "describe_quantization",
    "four_bit_loading",
    "hub_errors_in_one_line",
    "is_masked",
    "is_masked_model",
    "layer_names",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "logits_at",
    "most_positions",
    "place_model",
    "prepare_for_fsdp2",
    "prepare_four_bit",
    "require_modules",
    "reshard",
    "stored_config",
    "weights_identity",
]
