"""A model that is scored and not trained, on its device or sharded over the processes."""

from __future__ import annotations

import re

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed.fsdp import update_fsdp_plugin_peft

from recipelib.models.head import bare_model
from recipelib.runtime import UserError, say, uses_fsdp

FSDP_OFF = (
    "the accelerate config asks for FSDP, but accelerate did not turn it on; install the versions "
    "of requirements.txt, or launch with accelerate_configs/ddp.yaml"
)


def place_model(model, training):
    """The model on this process's device, under FSDP its shard.

    Args:
        training: a `RecipeConfig`, which has set the processes up.
    Raises:
        UserError: what should be sharded is not.
    """
    model.eval()
    if not uses_fsdp():
        return model.to(training.device)
    # As the trainer that may follow will ask for: one process can have one precision only.
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise UserError(FSDP_OFF)
    plugin.activation_checkpointing = False  # nothing is trained
    if plugin.fsdp_version == 1:
        if isinstance(model, PeftModel):
            update_fsdp_plugin_peft(model, accelerator)
        return accelerator.prepare(model)
    prepare_for_fsdp2(plugin, model)
    # accelerate shards a model only together with an optimizer; this one is never used.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, _ = accelerator.prepare(model, optimizer)
    check_shards(model, accelerator.num_processes)
    return model.eval()


def prepare_for_fsdp2(plugin, model) -> None:
    """What accelerate's grouping of parameters needs to shard BERT and its like.

    It groups the embeddings itself and fails where they are sharded already, so FSDP2 wraps the
    layers only, and not what holds the embeddings, which transformers names beside them. The bias
    of their head is registered twice, and torch refuses a parameter that two groups share: the one
    that no forward pass reads is taken away, and `head_bias` of the model says where it belongs.
    """
    bare = bare_model(model)
    names = getattr(bare, "_no_split_modules", None) or ()
    embeddings, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    holders = {
        type(one).__name__
        for one in bare.modules()
        if any(part is embeddings for part in one.modules())
    }
    if holders.intersection(names) and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = [one for one in names if one not in holders]
    bias = getattr(head, "bias", None)
    for name, module in bare.named_modules():
        if bias is not None and module is not head and module._parameters.get("bias") is bias:
            del module._parameters["bias"]
            bare.head_bias = f"{name}.bias"
            # transformers would tie it again.
            tied = bare._tied_weights_keys.items()
            bare._tied_weights_keys = {
                target: source for target, source in tied if not re.search(source, bare.head_bias)
            }
            tied = bare.all_tied_weights_keys.items()
            bare.all_tied_weights_keys = {
                target: source for target, source in tied if source != bare.head_bias
            }


def reshard(model) -> None:
    """Let go of what a forward pass without a backward pass leaves gathered under FSDP2: parameters
    outside the layers, without fsdp_reshard_after_forward all. The optimizer and a checkpoint have
    to find them as shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_shards(model, processes: int) -> None:
    """Say which part of the parameters this process holds under FSDP2.

    Raises:
        UserError: all of them.
    """
    parameters = list(model.parameters())
    parts = [one.to_local() if isinstance(one, DTensor) else one for one in parameters]
    total, held = (sum(one.numel() for one in some) for some in (parameters, parts))
    if processes > 1 and held == total:
        raise UserError("FSDP left every parameter whole; install the versions of requirements.txt")
    say(
        f"sharded by FSDP2: {held:,} of {total:,} parameters ({held / total:.1%}) in each of "
        f"{processes} processes"
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """What FSDP shards one by one and activation checkpointing recomputes."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [one for one in model.modules() if type(one).__name__ in names]
