"""A masked model so small that a test can make it at once."""

import torch
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
