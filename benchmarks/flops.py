"""Model shapes for benchmarks with random weights, the FLOPs that training takes, devices' peaks.

The figures are those of the models' published config.json: HuggingFaceTB/SmolLM2-135M,
meta-llama/Llama-3.2-1B and meta-llama/Llama-3.1-8B.
"""

import re

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Arguments of transformers' LlamaConfig.
SHAPES = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "tiny": {  # nobody's model: what a CPU trains in a second
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    },
}

# Dense bfloat16 FLOP/s without sparsity, of NVIDIA's data sheets. The words are those of
# `torch.cuda.get_device_name`, the more exact names first; a bare H100 or H200 is the SXM module.
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device: str) -> float | None:
    """The dense bfloat16 FLOP/s of a device by its name; None where it is not known, or where only
    a slice of it (MIG) is used.
    """
    words = set(re.split(r"[ -]+", device))
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAKS.items() if set(name.split()) <= words), None)


def _linear(shape: dict) -> list[tuple[int, int]]:
    """The sizes (in, out) of a decoder layer's linear layers: q, k, v, o, gate, up, down."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def equal_bottleneck(shape: dict, rank: int) -> int:
    """The size m at which adapters after both sublayers, 2 d m + m + d parameters each, have as
    many parameters as LoRA on all linear layers but the head, as nearly as whole sizes allow.
    """
    hidden = shape["hidden_size"]
    lora = rank * sum(size_in + size_out for size_in, size_out in _linear(shape))
    return max(1, round((lora / 2 - hidden) / (2 * hidden + 1)))


def flops_per_token(
    shape: dict,
    rank: int | None,
    context: float,
    supervised: float,
    bottleneck: int | None = None,
) -> float:
    """The floating-point operations, forward and backward, that one token of training needs.

    A weight of a linear layer takes part in one multiplication and one addition (2 FLOPs) in the
    forward pass, as many for the gradient of the layer's input, and as many for its own gradient.
    So with N weights in the layers, V in the vocabulary's head, the share s of tokens that are
    supervised (only they need the head), and attention over rows of length l:

        full: 6 (N + s V) + 12 layers hidden l      (Chowdhery et al. 2022, arXiv:2204.02311, B)
        LoRA: 4 (N + s V) + 6 A + 12 layers hidden l - 2 (first layer's q, k and v)
        adapter: 4 (N + s V) + 6 A + 12 layers hidden l - 2 (first layer's q, k, v, o and down)
            - 8 hidden l

    A are the adapters' weights. Frozen weights need no gradient of their own, and below the first
    layer nothing is trained, so that its q, k and v need none of their input; bottleneck adapters
    begin after the first attention, which needs no backward pass at all. Attention is counted
    over the whole square, as usual. What a run does beside (padding, recomputed activations, the
    head on unsupervised positions) is not counted.

    Args:
        shape: arguments of LlamaConfig, as in `SHAPES`.
        rank: of LoRA on all linear layers but the head; None without LoRA.
        context: the row length that a token finds on average: sum(l^2) / sum(l) over the rows.
        supervised: the share of tokens that have a label.
        bottleneck: m of the adapters after both sublayers; None without them. Neither rank nor
            bottleneck is full tuning.
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    linear = _linear(shape)
    weights = layers * sum(size_in * size_out for size_in, size_out in linear)
    weights += supervised * hidden * shape["vocab_size"]
    attention = 12 * layers * hidden * context
    if bottleneck:
        matrix = hidden * bottleneck
        first = sum(size_in * size_out for size_in, size_out in linear[:4]) + matrix
        frozen = 4 * weights + attention - 2 * first - 8 * hidden * context
        return frozen + 6 * layers * 4 * matrix
    if rank is None:
        return 6 * weights + attention
    adapters = layers * sum(rank * (size_in + size_out) for size_in, size_out in linear)
    first = sum(size_in * (size_out + rank) for size_in, size_out in linear[:3])
    return 4 * weights + 6 * adapters + attention - 2 * first
