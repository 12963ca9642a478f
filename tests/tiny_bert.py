"""A masked model so small that a test can make it at once."""

from pathlib import Path

import torch
from tokenizers_for_tests import tokenizer_for
from transformers import BertConfig, BertForMaskedLM


def tiny_bert(vocabulary: int) -> BertForMaskedLM:
    """The same float32 weights at every call, so large that each token shows in each prediction."""
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=128,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 8
    return model.eval()


def save_tiny_bert(folder: Path) -> Path:
    """A model with its tokenizer as `from_pretrained` takes them, of weights from which something
    is learned, and without dropout.
    """
    tokenizer = tokenizer_for("bert")
    tokenizer.save_pretrained(folder)
    model = tiny_bert(len(tokenizer))
    with torch.no_grad():
        for weight in model.parameters():
            weight /= 4 if weight.dim() > 1 else 1
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    return folder
