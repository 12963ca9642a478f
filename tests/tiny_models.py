"""Causal models of several kinds, so small that a test can compute with all of them."""

import torch
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for
from transformers import AutoConfig, AutoModelForCausalLM

TOKENIZER = tokenizer_for("gpt2")
VOCABULARY = len(TOKENIZER)
WINDOW = 6

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def tiny(kind: str, **fields):
    """A causal model of a kind, with random weights that are always the same."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=VOCABULARY, **fields), dtype=torch.float32
    )


def with_opinions(model):
    """Weights so large that each token before a position shows in its prediction."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 8
    model.generation_config.eos_token_id = None
    return model.eval()


def eager(model):
    """The same model with the other attention code."""
    model.set_attn_implementation("eager")
    return model


_MAKERS = {
    "llama": lambda: tiny_llama(VOCABULARY),
    "llama, eager": lambda: eager(tiny_llama(VOCABULARY)),
    "llama, untied": lambda: tiny("llama", tie_word_embeddings=False, **LLAMA_LIKE),
    "gpt2": lambda: tiny("gpt2", n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "qwen3": lambda: tiny("qwen3", **LLAMA_LIKE),
    "mistral": lambda: tiny("mistral", sliding_window=WINDOW, **LLAMA_LIKE),
    "gemma3": lambda: tiny(
        "gemma3_text",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        **LLAMA_LIKE,
    ),
    "bloom": lambda: tiny("bloom", hidden_size=32, n_layer=2, n_head=4),
    "rwkv": lambda: tiny("rwkv", hidden_size=32, num_hidden_layers=2, context_length=256),
}
MODELS = {name: with_opinions(make()) for name, make in _MAKERS.items()}
