"""A config whose sizes are easy to count, and its model."""

from functools import cache

import pytest
import torch
from transformers import LlamaConfig

from recipelib.planning.skeletons import skeleton


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def model(config):
    """With all parameters in float32."""
    return skeleton(config, torch.float32)


@pytest.fixture(scope="session")
def lora(config):
    """In bfloat16, with adapters."""
    return skeleton(config, torch.bfloat16, r=4)


@pytest.fixture(scope="session")
def built(config):
    """`skeleton` for this config, which builds each only once."""
    once = cache(lambda *how, **more: skeleton(config, *how, **more))
    return lambda _, *how, **more: once(*how, **more)


@pytest.fixture
def built_once(built, monkeypatch) -> None:
    """Strategies for this config take the skeletons that there are."""
    monkeypatch.setattr("recipelib.planning.strategies.skeleton", built)
