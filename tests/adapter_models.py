"""Tiny models of every kind that bottleneck adapters know, and adapters that do something."""

import torch
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from recipelib.adapters.bottleneck import BottleneckConfig, BottleneckLayer

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
BERT = {key: LLAMA[key] for key in list(LLAMA)[:4]} | {"max_position_embeddings": 40}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2} | {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in (("attention_heads", 2), ("ffn_dim", 24))
}
# Of each kind: the config's arguments, the class, and how many sublayers it has in both layers.
KINDS = {
    "bert": (BERT, AutoModelForMaskedLM, 4),
    "roberta": (BERT, AutoModelForMaskedLM, 4),
    "xlm-roberta": (BERT, AutoModelForMaskedLM, 4),
    "camembert": (BERT, AutoModelForMaskedLM, 4),
    "electra": (BERT | {"embedding_size": 16}, AutoModelForMaskedLM, 4),
    **dict.fromkeys(
        ("deberta", "deberta-v2"),
        (BERT | {"relative_attention": True, "pos_att_type": ["p2c"]}, AutoModelForMaskedLM, 4),
    ),
    "modernbert": (
        BERT | {"cls_token_id": 1, "sep_token_id": 2},
        AutoModelForMaskedLM,
        4,
    ),
    "vit": (
        BERT | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        AutoModelForImageClassification,
        4,
    ),
    "bart": (BART | {"max_position_embeddings": 32}, AutoModelForSeq2SeqLM, 10),
    "whisper": (
        BART | {"num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16},
        AutoModelForSpeechSeq2Seq,
        10,
    ),
    "gptj": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
        AutoModelForCausalLM,
        4,
    ),
    "distilbert": (
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        AutoModelForMaskedLM,
        4,
    ),
    "t5": (
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        AutoModelForSeq2SeqLM,
        10,
    ),
    "mt5": (
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        AutoModelForSeq2SeqLM,
        10,
    ),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, AutoModelForCausalLM, 4),
    "gpt_neox": (
        {key: LLAMA[key] for key in list(LLAMA)[:4]},
        AutoModelForCausalLM,
        4,
    ),
    "opt": (
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
        AutoModelForCausalLM,
        4,
    ),
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "phi3",
            "smollm3",
            "gemma2",
            "gemma3_text",
        ),
        (LLAMA, AutoModelForCausalLM, 4),
    ),
}
INPUTS = ("output", "residual", "input")
# Gemma 2 and 3 norm what a sublayer puts out, so that there is no h + x to read.
NORMED = ("gemma2", "gemma3_text")
# Wired as bert, t5 or llama are: tried with one input.
ALIKE = (
    *("roberta", "xlm-roberta", "camembert", "electra", "mt5"),
    *("deberta", "deberta-v2", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"),
)
PAIRS = [
    (kind, given)
    for kind in KINDS
    for given in (INPUTS[:1] if kind in ALIKE else INPUTS)
    if kind not in NORMED or given != "residual"
]


def build(kind: str, cls=None, **more):
    """A tiny model of a kind, in evaluation mode."""
    shape, own, _ = KINDS[kind]
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        **shape,
        vocab_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"decoder_start_token_id": 0} if "d_model" in shape else {}),
        **more,
    )
    return (cls or own).from_config(config).eval()


def batch(model) -> dict:
    """Two rows that a model can compute."""
    torch.manual_seed(2)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    rows = {"input_ids": torch.randint(3, 48, (2, 7))}
    if model.config.model_type == "whisper":
        rows = {"input_features": torch.randn(2, 4, 12)}
    if model.config.is_encoder_decoder:
        rows["decoder_input_ids"] = torch.randint(3, 48, (2, 5))
    return rows


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def adapters(model) -> dict[str, BottleneckLayer]:
    return {name: one for name, one in model.named_modules() if isinstance(one, BottleneckLayer)}


def adapted(kind: str = "llama", adapter_name: str = "default", model=None, **config):
    """A tiny model with adapters that do something."""
    model = get_peft_model(
        model or build(kind),
        BottleneckConfig(**{"bottleneck_size": 4, "train_norms": False} | config),
        adapter_name=adapter_name,
    )
    wake(model)
    return model


def wake(model, seed: int = 3) -> None:
    """Make the trained parameters large enough to see."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.copy_(torch.randn_like(one) * 0.3)
