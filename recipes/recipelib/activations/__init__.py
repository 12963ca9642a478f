"""What frozen layers compute, kept on disk: for training that begins above them, and features."""

from recipelib.activations.features import POOLING, kept_features, pooled_states
from recipelib.activations.folder import cache_folder
from recipelib.activations.frozen import FrozenLayers
from recipelib.activations.layer_list import beginning_at
from recipelib.activations.state_cache import (
    DTYPES,
    STATES,
    StateCache,
    WithStates,
)

__all__ = [
    "DTYPES",
    "POOLING",
    "STATES",
    "FrozenLayers",
    "StateCache",
    "WithStates",
    "beginning_at",
    "cache_folder",
    "kept_features",
    "pooled_states",
]
