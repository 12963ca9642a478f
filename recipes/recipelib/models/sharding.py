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
from recipelib.models.towers import tower_modules
from recipelib.runtime import UserError, say, uses_fsdp

FSDP_OFF = (
    "the accelerate config asks for FSDP, but accelerate did not turn it on; install the versions "
    "of requirements.txt, or launch with accelerate_configs/ddp.yaml"
)


def place_model(model, training):
    """The model on this process's device; under FSDP, this process's shard of it.

    Args:
        training: a `RecipeConfig`, which has set up the processes.
    Raises:
        UserError: the model should be sharded and is not.
    """
    model.eval()
    if not uses_fsdp():
        return model.to(training.device)
    # The precision of the trainer that may follow: a process can have only one.
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise UserError(FSDP_OFF)
    plugin.activation_checkpointing = False  # nothing is trained
    name_layers(plugin, model)
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


def name_layers(plugin, model) -> None:
    """Tell accelerate which layers to wrap, where what transformers names will not do: BERT names
    the module that holds the embeddings, which accelerate shards itself and which must not be
    sharded already; Gemma 3 names layers that its kind may have and this one has not.
    """
    bare = bare_model(model)
    names, embeddings = getattr(bare, "_no_split_modules", None) or (), bare.get_input_embeddings()
    there = {type(module).__name__ for module in bare.modules()}
    holders = {
        type(module).__name__
        for module in bare.modules()
        if any(inner is embeddings for inner in module.modules())
    }
    layers = [name for name in names if name in there - holders]
    if len(layers) < len(names) and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers


def prepare_for_fsdp2(plugin, model) -> None:
    """Prepare BERT and similar models so that accelerate can shard them with FSDP2.

    The bias of the head is registered twice, and torch refuses a parameter that two FSDP groups
    share: the registration that no forward pass reads is removed, and the model's `head_bias` says
    where it belongs.

    In all processes but the first, transformers leaves a new head on the meta device, where all
    parameters have the same address, by which accelerate finds the optimizer's: it gets memory.
    """
    bare = bare_model(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
    head = bare.get_output_embeddings()
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
    """Shard again what a forward pass without a backward pass leaves gathered under FSDP2: the
    parameters outside the layers, or all parameters if fsdp_reshard_after_forward is off. The
    optimizer and a checkpoint need shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_shards(model, processes: int) -> None:
    """Print how many of the parameters this process holds under FSDP2.

    Raises:
        UserError: it holds all of them, although there are several processes.
    """
    parameters = list(model.parameters())
    shards = [
        parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for parameter in parameters
    ]
    total, held = (sum(tensor.numel() for tensor in tensors) for tensors in (parameters, shards))
    if processes > 1 and held == total:
        raise UserError("FSDP left every parameter whole; install the versions of requirements.txt")
    say(
        f"sharded by FSDP2: {held:,} of {total:,} parameters ({held / total:.1%}) in each of "
        f"{processes} processes"
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that FSDP shards one by one and activation checkpointing recomputes."""
    names = getattr(model, "_no_split_modules", None) or ()
    towers = tower_modules(model)
    return [
        module
        for module in model.modules()
        if type(module).__name__ in names and module not in towers
    ]
