"""A Llama so small that a test can make, save and load it at once."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]


def tiny_backend() -> Tokenizer:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the capital of France is Paris\n\n  \n\n  \n\n"] * 3, trainer)
    return backend


def tiny_llama(vocabulary: int, hidden_size: int = 32, **fields: Any) -> LlamaForCausalLM:
    """The same float32 weights at every call; `fields` are further ones of its configuration."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            **{
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
                **fields,
            },
        )
    )


def save_tiny_llama(folder: Path, hidden_size: int = 32, **fields: Any) -> Path:
    """The model and its tokenizer, which has no pad token, as `from_pretrained` takes them."""
    backend = tiny_backend()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    tiny_llama(backend.get_vocab_size(), hidden_size, **fields).save_pretrained(folder)
    return folder
