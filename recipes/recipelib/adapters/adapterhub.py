"""Adapters that AdapterHub's library `adapters` saved, converted to ours (Poth et al. 2023,
arXiv:2311.11077).

model = load_adapterhub(AutoModelForCausalLM.from_pretrained(base), folder)
model.save_pretrained(output)      # from now on it is PEFT's
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from recipelib.adapters.bottleneck import SUBLAYERS, BottleneckConfig, BottleneckLayer, layer_number
from recipelib.runtime import UserError

# What their configuration may ask for and ours does not have, with the value that turns it off.
_ABSENT = {
    "ln_before": False,
    "ln_after": False,
    "phm_layer": False,
    "use_gating": False,
    "inv_adapter": None,
    "cross_adapter": False,
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
    """The model with the adapter that `save_adapter(folder, name, use_safetensors=True)` wrote.
    A prediction head that was saved with it is not converted.

    Args:
        model: a transformers model of the kind that the adapter was trained on.
        task_type: PEFT's; with "SEQ_CLS" and the like the model's head is trained and saved, too.
        revision: of the base model; PEFT writes it into the adapter's configuration.
    Raises:
        UserError: no such folder, a pickle, another method, a variant that ours does not have, or
            weights that do not fit the model, which is left as it was.
    """
    folder, kind = Path(folder), model.config.model_type
    if kind not in SUBLAYERS or model.config.is_encoder_decoder:
        raise UserError(f"{folder}: adapters of model type {kind!r} are not converted")
    if getattr(model.config, "add_cross_attention", False):
        raise UserError(f"{folder}: adapters after cross-attention are not converted")
    config, weights = _read(folder, kind)
    saved = _by_place(folder, weights)
    peft_config = _converted(folder, config)
    peft_config.task_type = task_type
    peft_config.bottleneck_size = next(iter(saved.values()))["down.weight"].shape[0]
    layers = sorted({number for number, _ in saved})
    if layers != list(range(model.config.get_text_config().num_hidden_layers)):
        peft_config.layers_to_transform = layers
    try:
        adapted = get_peft_model(model, peft_config, adapter_name, revision=revision)
    except ValueError as error:  # layers that the model does not have
        raise UserError(f"{folder}: does not fit the model ({error})") from None
    try:
        _fill(folder, adapted, kind, saved, adapter_name)
    except UserError:
        adapted.unload()
        raise
    return adapted


def _by_place(folder: Path, weights: dict) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    """The weights by layer and sublayer ("attention" or "ffn"), named as ours are."""
    by_place: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    pattern = r"(.*)\.adapters\.[^.]+\.(adapter_down\.0|adapter_up|scaling)(.*)"
    for key, tensor in weights.items():
        match, number = re.fullmatch(pattern, key), layer_number(key)
        if match is None or number is None:
            raise UserError(f"{folder}: {key}: is no part of a bottleneck adapter")
        sublayer = "attention" if "attention" in match.group(1) else "ffn"
        name = match.group(2).removeprefix("adapter_").removesuffix(".0")
        by_place.setdefault((number, sublayer), {})[name + match.group(3)] = tensor
    if not by_place or any("down.weight" not in tensors for tensors in by_place.values()):
        raise UserError(f"{folder}: adapter.safetensors: holds no weights of adapters")
    return by_place


def _fill(folder: Path, model: PeftModel, kind: str, saved: dict, adapter_name: str) -> None:
    """Copy the saved weights, by their place, into the model's adapters."""
    expected = {
        (layer_number(name), _sublayer_of(kind, name)): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BottleneckLayer) and adapter_name in layer.bottleneck_down
    }
    for number, sublayer in sorted(expected.keys() ^ saved.keys()):
        raise UserError(
            f"{folder}: layer {number}, {sublayer}: has an adapter in one of file and model"
        )
    for (number, sublayer), tensors in saved.items():
        layer = expected[number, sublayer]
        own = {}
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
                    f"{folder}: layer {number}, {sublayer}, {name}: has shape {in_file}, and "
                    f"{in_model} in this model; load it on the model it was trained on"
                )
            with torch.no_grad():
                own[name].copy_(tensors[name])


def _read(folder: Path, kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The configuration and the weights in a folder; both must be for models of this kind."""
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
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is not a configuration that adapters has saved") from None
    weights = folder / "adapter.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{folder}: no adapter.safetensors; a .bin is a pickle, which is not loaded: in "
            "adapters, save_adapter(FOLDER, NAME, use_safetensors=True) writes what is"
        )
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights}: cannot be read ({error})") from None


def _converted(folder: Path, config: dict) -> BottleneckConfig:
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
    places = [config["mh_adapter"], config["output_adapter"]]
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
        )
    except ValueError as error:
        raise UserError(f"{folder}: adapter_config.json: {error}") from None


def _sublayer_of(kind: str, name: str) -> str:
    """The sublayer that a module is the end of: "attention" or "ffn"."""
    ends = {
        sublayer.output: place
        for place, sublayers in SUBLAYERS[kind].items()
        for sublayer in sublayers
    }
    return ends[max((end for end in ends if f".{name}".endswith(f".{end}")), key=len)]
