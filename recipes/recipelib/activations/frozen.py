"""Which layers of a model compute the same in every pass, because nothing in them or below them is
trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from types import MethodType
from typing import Any

import torch
from torch import nn

from recipelib.activations.layer_list import LayerList, replaceable_layers
from recipelib.inference import from_main_process
from recipelib.models import bare_model, find_layers, layer_of
from recipelib.runtime import UserError, digest, say


@dataclass(frozen=True)
class FrozenLayers:
    """The layers of a model that compute the same in every pass.

    Attributes:
        layers: all of the model's.
        boundary: how many of them, from the bottom, compute the same in every pass.
        width: of the states that they put out.
        key: for all that these states depend on besides the tokens: the content of the frozen
            weights, the model's configuration and the libraries that compute.
    """

    layers: LayerList
    boundary: int
    width: int
    key: str

    @classmethod
    def of(cls, model: nn.Module) -> FrozenLayers:
        """Find the boundary of a model whose parameters `requires_grad` where they will ever be
        trained, with an adapter or without; before FSDP wraps it. From here on, dropout is off in
        what is below.

        A text of two tokens is run through the model, and autograd says which layers get states
        that depend on something trained. So the boundary is right whatever else is trained, and
        without knowing the model.

        Raises:
            UserError: the model's layers do not run one after the other.
        """
        layers = replaceable_layers(model)
        # Under FSDP the other processes may hold no weights yet.
        found = from_main_process(lambda: _look(model, layers))
        boundary, width, key, layers.in_tuples, below = found
        modules = dict(model.named_modules())
        dropping = [_stop_dropout(modules[name]) for name in below]
        trained = any(parameter.requires_grad for parameter in model.parameters())
        if trained and any(dropping):
            say("dropout is off in the frozen layers, with the cache and without it")
        return cls(layers, boundary, width, key)


def _look(model: nn.Module, layers: LayerList) -> tuple[int, int, str, bool, list[str]]:
    """The boundary, the states' width, the key, whether layers put out tuples, and the names of the
    modules that run below the boundary.
    """
    names = {module: name for name, module in model.named_modules()}
    numbers = {layer: number for number, layer in enumerate(layers)}
    before: list[str] = []  # the modules that run before the first layer
    order: list[int] = []
    outputs: list[Any] = []

    def enter(module: nn.Module, args: tuple) -> None:
        if module in numbers:
            order.append(numbers[module])
        elif not order and not [*module.children()]:
            before.append(names[module])

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    training = model.training
    try:
        with torch.enable_grad():
            token = torch.zeros(1, 2, dtype=torch.long, device=_device(model))
            model.eval()(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    in_tuples = {isinstance(output, tuple) for output in outputs}
    if order != [*range(len(layers))] or len(in_tuples) > 1:
        raise UserError(
            f"--model_name_or_path: the layers of {type(bare_model(model)).__name__} do not run "
            "one after the other, so none can be frozen by its number; take another model"
        )
    states = [output[0] if isinstance(output, tuple) else output for output in outputs]
    # Longformer pads texts, Gemma 3n hands on several states of a token, the first GPT a list.
    if any(getattr(state, "shape", ())[:2] != token.shape for state in states):
        raise UserError(
            f"--model_name_or_path: the layers of {type(bare_model(model)).__name__} do not hand "
            "on one state for each token, which could be kept; run recipes/lora_sft.py"
        )
    boundary = sum(not state.requires_grad for state in states)
    below = [*before, *(names[layer] for layer in [*layers][:boundary])] if boundary else []
    return boundary, states[0].shape[-1], _key(model, boundary), in_tuples.pop(), below


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device


# What a configuration says of where a model comes from and how its answers are called.
_NAMES = ("_name_or_path", "architectures", "id2label", "label2id", "transformers_version")


def _key(model: nn.Module, boundary: int) -> str:
    """A key for the content of what is frozen in the layers below the boundary and outside the
    layers.
    """
    bare, (place, _) = bare_model(model), find_layers(model)
    config = {name: value for name, value in bare.config.to_dict().items() if name not in _NAMES}
    parts: list[Any] = [
        config,
        bare.config._attn_implementation,
        [version(name) for name in ("torch", "transformers")],
    ]
    for name, tensor in (*bare.named_parameters(), *bare.named_buffers()):
        number = layer_of(name, place)
        # PEFT keeps a frozen copy of a head that is trained.
        if (
            ".original_module." in name
            or tensor.requires_grad
            or (number is not None and number >= boundary)
        ):
            continue
        flat = tensor.detach().cpu().contiguous().flatten()
        parts += [name, [*tensor.shape], str(tensor.dtype)]
        parts.append(memoryview(flat.view(torch.uint8).numpy()))
    return digest(*parts)


def _stop_dropout(module: nn.Module) -> bool:
    """Keep a module in evaluation mode, whatever `train` is called on the model. Returns whether it
    would drop something.
    """
    module.eval()
    module.train = MethodType(_stay, module)
    return any(
        getattr(part, "p", 0) if isinstance(part, nn.Dropout) else _attention_dropout(part)
        for part in module.modules()
    )


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _attention_dropout(module: nn.Module) -> float:
    rate = getattr(module, "attention_dropout", 0.0)
    return rate if isinstance(rate, float) else 0.0
