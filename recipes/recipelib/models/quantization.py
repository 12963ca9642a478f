"""QLoRA: the frozen base in 4 bits (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from recipelib.models.sources import stored_config
from recipelib.runtime import UserError, first_line, uses_fsdp

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments


def four_bit_config(
    dtype: torch.dtype, compute_dtype: torch.dtype | None = None
) -> BitsAndBytesConfig:
    """NormalFloat 4 in blocks of 64 with double quantization, as in the paper: 4.13 bits a weight.

    Args:
        dtype: of the weights that are not quantized (embeddings, head, norms). Packed weights are
            stored as this dtype too, so that FSDP can shard them together.
        compute_dtype: the dtype to which a layer unpacks its weights; `dtype` by default.

    Raises:
        UserError: bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "--load_in_4bit: bitsandbytes is not installed; pip install -r requirements-gpu.txt"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or dtype,
        bnb_4bit_quant_storage=dtype,
    )


def four_bit_loading(args, training: TrainingArguments) -> dict[str, Any]:
    """Further arguments of `load_pretrained`, which make it quantize the model while loading it
    onto its device.

    Args:
        args: a recipe's `model_name_or_path` and `revision`; only the model's config is read.
    Raises:
        UserError: the model is quantized already, bitsandbytes is missing or does not work on this
            device, or FSDP would convert the packed weights.
    """
    _require_unquantized(args.model_name_or_path, args.revision)
    dtype = training.model_dtype[0]
    config = four_bit_config(dtype, torch.float16 if training.fp16 else None)
    gathered = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.mixed_precision, dtype)
    if uses_fsdp() and gathered != dtype:
        raise UserError(
            f"--load_in_4bit: FSDP would convert the packed weights to {training.mixed_precision}, "
            "which destroys them; pass --bf16 true, or set mixed_precision: 'no' in the accelerate "
            "config and leave --fp16 out"
        )
    try:  # bitsandbytes looks its kernels up at their first call
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(64, device=training.device), quant_type="nf4")
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--load_in_4bit: bitsandbytes {version('bitsandbytes')} does not work on "
            f"{training.device} ({first_line(error)}); leave it out, or see "
            "https://huggingface.co/docs/bitsandbytes/installation"
        ) from None
    return {"quantization_config": config, "device_map": {"": training.device}}


def _require_unquantized(model_name_or_path: str | None, revision: str | None = None) -> None:
    """Check that the model was not saved quantized; only its config.json is read.

    Raises:
        UserError: it was.
    """
    if model_name_or_path is None or model_name_or_path.lower().endswith(".gguf"):
        return  # prepared by us, in float32
    if "quantization_config" in stored_config(model_name_or_path, revision=revision):
        raise UserError(
            f"--load_in_4bit: {model_name_or_path} is quantized already; leave the flag out, or "
            "pass the model that it was made from"
        )


def prepare_four_bit(model: PreTrainedModel) -> None:
    """Make a model with 4-bit weights fit for training; call it before the first forward pass.

    It does not convert embeddings, head and norms to float32, as PEFT's
    `prepare_model_for_kbit_training` does: a norm computes in float32 anyway, and FSDP gathers all
    of them in the dtype of the other weights.

    Raises:
        UserError: bitsandbytes does not unpack the weights correctly on this device.
    """
    layers = [
        module for module in model.modules() if getattr(module, "quant_state", None) is not None
    ]
    for width in sorted({layer.in_features for layer in layers}):
        _require_exact(width, layers[0].weight.device)
    for layer in layers:
        # On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks the weights for inference at the
        # first evaluation, and from then on no gradient passes through the layer.
        layer.support_avx512bf16_for_cpu = False
    for weight in model.parameters():
        # TRL converts the adapter to bfloat16, in which Adam's small steps are lost.
        if weight.requires_grad:
            weight.data = weight.data.float()


def _require_exact(width: int, device: torch.device) -> None:
    """Check with a random matrix that bitsandbytes unpacks layers of `width` inputs correctly.

    On a CPU with AVX512, bitsandbytes 0.50 mixes up the blocks if a row does not end with a block.

    Raises:
        UserError: it does not.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = (dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    if not error < 0.12:  # 0.09 for normal numbers
        raise UserError(
            f"--load_in_4bit: bitsandbytes {version('bitsandbytes')} unpacks layers of {width} "
            f"inputs wrongly on {device}; leave it out, or choose a model with multiples of 64"
        )


def describe_quantization(model: PreTrainedModel) -> str | None:
    """The kind of 4-bit weights, for reports; None if the model has none."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return None
    config = model.config.quantization_config
    double = ", double quantization" if config.bnb_4bit_use_double_quant else ""
    return f"4-bit ({config.bnb_4bit_quant_type}{double})"


def count_parameters(model) -> tuple[int, int]:
    """How many parameters are trainable, and how many there are. A tied parameter counts once,
    4-bit weights count as many as are packed.
    """
    packed = {  # from the layer, since a shard does not know the size of the whole
        id(module.weight): module.quant_state.shape.numel()
        for module in model.modules()
        if getattr(module, "quant_state", None) is not None
    }
    sizes = [
        (packed.get(id(weight), weight.numel()), weight.requires_grad)
        for weight in model.parameters()
    ]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
