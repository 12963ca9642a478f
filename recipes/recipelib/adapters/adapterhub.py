"""Adapters that AdapterHub's library `adapters` saved, converted to ours (Poth et al. 2023,
arXiv:2311.11077).

model = load_adapterhub(AutoModelForCausalLM.from_pretrained(base), folder)
model.save_pretrained(output)      # from now on it is PEFT's
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from recipelib.adapters.bottleneck import (
    BOTTLENECK,
    SUBLAYERS,
    BottleneckConfig,
    BottleneckLayer,
    layer_number,
)
from recipelib.runtime import UserError, first_line

# AdapterHub's sublayers of GPT-J are other ones, BART's and Whisper's are named otherwise.
CONVERTED = SUBLAYERS.keys() - {"gptj", "bart", "whisper"}

# What their configuration may ask for and ours does not have, with the value that turns it off.
_ABSENT = {
    "ln_before": False,
    "ln_after": False,
    "phm_layer": False,
    "use_gating": False,
    "inv_adapter": None,
    "stochastic_depth": 0.0,
    "original_ln_after": True,
    "residual_before_ln": True,
}


def load_adapterhub(
    model,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    task_type: str | None = None,
    revision: str | None = None,
) -> PeftModel:
    """The model with the adapter that `save_adapter(folder, name)` wrote; a prediction head that
    was saved with it is not converted. To a model with bottleneck adapters it is added and, as by
    PEFT's `load_adapter`, not made the active one: `model.set_adapter(name)` does.

    Args:
        model: a transformers model of the kind that the adapter was trained on, or PEFT's with
            bottleneck adapters.
        adapter_name: what it is called from now on.
        task_type: PEFT's; with "SEQ_CLS" and the like the model's head is trained and saved, too.
        revision: of the base model; PEFT writes it into the adapter's configuration.
    Raises:
        UserError: no such folder, another method, a variant that ours does not have, weights that
            do not fit the model, or a model with an adapter of this name or of another method; the
            model is left as it was.
    """
    folder, kind = Path(folder), model.config.model_type
    is_adapted = isinstance(model, PeftModel)
    if not is_adapted and getattr(model, "peft_config", None):
        raise UserError(f"{folder}: the model has adapters inside; wrap it by get_peft_model first")
    if is_adapted and model.active_peft_config.peft_type != BOTTLENECK:
        raise UserError(f"{folder}: the model has adapters of another method; unload them first")
    if is_adapted and adapter_name in model.peft_config:
        raise UserError(f"{folder}: the model has an adapter {adapter_name!r}; pass adapter_name")
    if kind not in CONVERTED:
        raise UserError(f"{folder}: adapters of model type {kind!r} are not converted")
    if getattr(model.config, "add_cross_attention", False):
        raise UserError(f"{folder}: adapters after cross-attention are not converted")
    config = _converted(folder, _read_config(folder, kind), model.config.is_encoder_decoder)
    saved = _by_place(folder, kind, _read_weights(folder))
    config.task_type = task_type
    config.bottleneck_size = next(iter(saved.values()))["down.weight"].shape[0]
    config.layers_to_transform = _layers(folder, model, saved)
    try:
        if is_adapted:
            model.add_adapter(adapter_name, config)
            adapted = model
        else:
            adapted = get_peft_model(model, config, adapter_name, revision=revision)
    except ValueError as error:  # layers that the model does not have
        if is_adapted:
            model.peft_config.pop(adapter_name, None)
        raise UserError(f"{folder}: does not fit the model ({error})") from None
    try:
        _fill(folder, adapted, kind, saved, adapter_name)
    except UserError:
        _ = model.delete_adapter(adapter_name) if is_adapted else adapted.unload()
        raise
    return adapted


# Encoder, decoder or "" where there is one stack; the layer's number; attention, cross or ffn.
Place = tuple[str, int, str]


def _layers(folder: Path, model, saved: dict[Place, dict]) -> list[int] | None:
    """The numbers of the layers that have adapters; None for all."""
    config, numbers = model.config.get_text_config(), {}
    for stack, number, _ in sorted(saved):
        numbers.setdefault(stack, []).append(number)
    depths = {"": config.num_hidden_layers, "encoder": config.num_hidden_layers}
    depths["decoder"] = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    if all(set(found) == set(range(depths[stack])) for stack, found in numbers.items()):
        return None
    first, *others = (set(found) for found in numbers.values())
    if any(other != first for other in others):
        raise UserError(f"{folder}: other layers in encoder and decoder: this is not converted")
    return sorted(first)


def _by_place(folder: Path, kind: str, weights: dict) -> dict[Place, dict[str, torch.Tensor]]:
    """The weights by their place, named as ours are."""
    by_place: dict[Place, dict[str, torch.Tensor]] = {}
    pattern = r"(.*)\.adapters\.[^.]+\.(adapter_down\.0|adapter_up|scaling)(.*)"
    for key, tensor in weights.items():
        match, number = re.fullmatch(pattern, key), layer_number(key)
        if match is None or number is None:
            raise UserError(f"{folder}: {key}: is no part of a bottleneck adapter")
        module, name = match.group(1), match.group(2).removeprefix("adapter_").removesuffix(".0")
        if SUBLAYERS[kind] is SUBLAYERS["t5"]:  # sublayers are numbered: cross is the decoder's 1
            order = ["attention", "ffn"] if _stack(kind, key) == "encoder" else _DECODERS
            sublayer = order[int(module.rpartition(".")[2])]
        else:
            sublayer = "attention" if "attention" in module else "ffn"
        place = (_stack(kind, key), number, sublayer)
        by_place.setdefault(place, {})[name + match.group(3)] = tensor
    if not by_place or any("down.weight" not in tensors for tensors in by_place.values()):
        raise UserError(f"{folder}: holds no weights of adapters")
    return by_place


_DECODERS = ["attention", "cross", "ffn"]


def _stack(kind: str, name: str) -> str:
    """Where a parameter or module stands, of a model with two stacks."""
    if SUBLAYERS[kind] is not SUBLAYERS["t5"]:
        return ""
    return "decoder" if re.search(r"(^|\.)decoder\.", name) else "encoder"


def _fill(folder: Path, model: PeftModel, kind: str, saved: dict, adapter_name: str) -> None:
    """Copy the saved weights, by their place, into the model's adapters."""
    expected = {
        (_stack(kind, name), layer_number(name), _sublayer_of(kind, name)): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BottleneckLayer) and adapter_name in layer.bottleneck_down
    }
    for stack, number, sublayer in sorted(expected.keys() ^ saved.keys()):
        place = f"{stack} layer {number}, {sublayer}".strip()
        raise UserError(f"{folder}: {place}: has an adapter in one of file and model")
    for (stack, number, sublayer), tensors in saved.items():
        layer, own = expected[stack, number, sublayer], {}
        for projection in ("down", "up"):
            linear = getattr(layer, f"bottleneck_{projection}")[adapter_name]
            own |= {f"{projection}.{name}": weight for name, weight in linear.named_parameters()}
        if adapter_name in layer.bottleneck_scaling:
            own["scaling"] = layer.bottleneck_scaling[adapter_name].weight
        for name in sorted(own.keys() | tensors.keys()):
            in_model, in_file = (
                tuple(weights[name].shape) if name in weights else None
                for weights in (own, tensors)
            )
            if in_model != in_file:
                raise UserError(
                    f"{folder}: {f'{stack} layer {number}'.strip()}, {sublayer}, {name}: has shape "
                    f"{in_file}, and {in_model} in this model; load it on the model it was trained "
                    "on"
                )
            with torch.no_grad():
                own[name].copy_(tensors[name])


def _read_config(folder: Path, kind: str) -> dict:
    """The configuration in a folder, which must be for models of this kind."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: no adapter_config.json; name a folder of adapters' save_adapter"
        )
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        config = saved["config"]
        if config.get("architecture") is not None:
            raise UserError(f"{file}: {config['architecture']} is no bottleneck adapter")
        if saved.get("model_type", kind) != kind:
            raise UserError(
                f"{file}: is of model type {saved['model_type']!r}, and the model of {kind!r}; "
                "load it on the model it was trained on"
            )
        return config
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is not a configuration that adapters has saved") from None


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder, of one of the two files that adapters writes."""
    file, by_default = folder / "adapter.safetensors", folder / "pytorch_adapter.bin"
    try:
        if file.is_file():
            return load_file(file)
        file = by_default
        # A pickle; with weights_only it runs no code, and is refused if it would.
        weights = torch.load(file, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
            raise AttributeError
        return weights
    except FileNotFoundError:
        raise UserError(f"{folder}: neither adapter.safetensors nor pytorch_adapter.bin") from None
    except (pickle.UnpicklingError, AttributeError):
        raise UserError(f"{file}: holds something else than tensors, which is not loaded") from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None


def _converted(folder: Path, config: dict, has_two_stacks: bool) -> BottleneckConfig:
    """A configuration of AdapterHub's as ours, but for the size, which comes from the weights."""
    for name, off in _ABSENT.items():
        if config.get(name, off) != off:
            raise UserError(f"{folder}: {name}={config[name]!r}: such adapters are not converted")
    scaling = config.get("scaling", 1.0)
    missing = {"mh_adapter", "output_adapter", "non_linearity", "reduction_factor"} - config.keys()
    if missing:
        raise UserError(f"{folder}: adapter_config.json: {min(missing)}: is missing")
    if isinstance(config["reduction_factor"], dict) or scaling == "channel":
        raise UserError(f"{folder}: sizes by layer and scaling by channel are not converted")
    attends, crosses = config["mh_adapter"], config.get("cross_adapter", False)
    if crosses and not has_two_stacks:
        raise UserError(f"{folder}: cross_adapter=True: such adapters are not converted")
    places = [attends or crosses, config["output_adapter"]]
    attentions = {"SelfAttention.o": attends, "EncDecAttention.o": crosses}
    left_out = [module for module, adapted in attentions.items() if not adapted]
    parallel, normed = config.get("is_parallel", False), config.get("original_ln_before", False)
    act = str(config["non_linearity"]).lower()
    try:
        return BottleneckConfig(
            placement="both" if all(places) else "attention" if places[0] else "ffn",
            adapter_input="input" if parallel else "residual" if normed else "output",
            act={"leakyrelu": "leaky_relu"}.get(act, act),
            scaling=scaling,
            dropout=config.get("dropout", 0.0),
            train_norms=False,
            exclude_modules=left_out if has_two_stacks and len(left_out) == 1 else None,
        )
    except ValueError as error:
        raise UserError(f"{folder}: adapter_config.json: {error}") from None


def _sublayer_of(kind: str, name: str) -> str:
    """The sublayer that a module is the end of: "attention", "cross" or "ffn"."""
    if name.endswith("EncDecAttention.o"):
        return "cross"
    ends = {
        sublayer.output: place
        for place, sublayers in SUBLAYERS[kind].items()
        for sublayer in sublayers
    }
    return ends[max((end for end in ends if f".{name}".endswith(f".{end}")), key=len)]
