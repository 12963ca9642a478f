"""Which parameters are trained and which stay frozen: by layer, by group or by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from itertools import groupby
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from recipelib.models.head import bare_model
from recipelib.models.towers import tower_modules
from recipelib.runtime import UserError, say

# What is not in a layer.
EMBEDDINGS, NORMS, HEAD = "embeddings", "norms outside the layers", "head"


class LayerPlace(NamedTuple):
    """Where a model's layers stand: the name of their list, "model.layers", and the list."""

    name: str
    layers: nn.ModuleList


def find_layers(model: nn.Module) -> LayerPlace:
    """The list of a model's layers, from the bottom up.

    Raises:
        UserError: the model has none, such as ALBERT, whose layers share their parameters.
    """
    bare = bare_model(model)
    depth = bare.config.get_text_config().num_hidden_layers
    towers = tower_modules(bare)
    for name, module in bare.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and module not in towers:
            return LayerPlace(name, module)
    raise UserError(
        f"--model_name_or_path: {type(bare).__name__} has no list of {depth} layers, of which some "
        "could be frozen; take another model"
    )


def top_layers(model: nn.Module, train: int | None, freeze: int | None) -> range:
    """The numbers of the layers to train.

    Args:
        train, freeze: how many layers are trained at the top, or frozen at the bottom; without
            both, a sixth of them is trained.
    Raises:
        UserError: the model has fewer.
    """
    depth = len(find_layers(model).layers)
    for name, count in (("train_layers", train), ("freeze_layers", freeze)):
        if count is not None and count > depth:
            raise UserError(f"--{name} {count}: the model has {depth} layers; pass at most as many")
    if freeze is None:
        return range(depth - (max(1, depth // 6) if train is None else train), depth)
    return range(freeze, depth)


def group_of(model: nn.Module) -> dict[str, str | int]:
    """What each parameter belongs to: the number of its layer, or one of EMBEDDINGS, NORMS and
    HEAD. A weight that the head shares with the embeddings is theirs.

    Args:
        model: without an adapter.
    """
    place = find_layers(model)
    inside = {*place.layers.modules()}
    embeddings = _embeddings(model, place)
    norms = _ids(
        module
        for module in model.modules()
        if module not in inside and "norm" in type(module).__name__.lower()
    )
    groups: dict[str, str | int] = {}
    for name, parameter in model.named_parameters():
        if (number := layer_of(name, place.name)) is not None:
            groups[name] = number
        elif id(parameter) in embeddings:
            groups[name] = EMBEDDINGS
        else:
            groups[name] = NORMS if id(parameter) in norms else HEAD
    return groups


def _ids(modules: Collection[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _embeddings(model: nn.Module, place: LayerPlace) -> set[int]:
    """The parameters in front of the layers: of all tables, and of what is named after them, such
    as Bloom's `word_embeddings_layernorm`. GPT-NeoX's head is named so, too.
    """
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    named = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if "embed" in name and model.get_submodule(name.rpartition(".")[0]) is not head
    }
    return named | _ids([_embedding_module(model, place), *tables])


def _embedding_module(model: nn.Module, place: LayerPlace) -> nn.Module:
    """The largest module around the embeddings that holds no layers: BERT's has a norm, too."""
    embeddings = model.get_input_embeddings()
    for module in model.modules():  # from the outside in
        parts = {*module.modules()}
        if embeddings in parts and place.layers not in parts:
            return module
    return embeddings


def layer_of(parameter: str, layers: str) -> int | None:
    """The number of the layer that a parameter of this name belongs to; None if to none.

    Args:
        layers: the name of the layers' list.
    """
    found = re.search(rf"(?:^|\.){re.escape(layers)}\.(\d+)\.", parameter)
    return int(found[1]) if found else None


def train_only(model: nn.Module, layers: Collection[int], args) -> None:
    """Freeze a model but for what a recipe's arguments name.

    Args:
        model: without an adapter.
        layers: the numbers of the layers that are trained; norms behind the last layer are then
            trained with them.
        args: `train_modules`: names, such as "layers.29", "mlp" or "bias", of what is trained
            instead, wherever they stand between dots in a parameter's name; `train_embeddings`;
            `train_norms`, those of frozen layers, too; `train_head`; `head`, of which "classifier"
            is always trained.
    Raises:
        UserError: a name that fits no parameter; nothing is trained, or everything.
    """
    names, embeddings = args.train_modules, args.train_embeddings
    head = args.train_head or args.head == "classifier"
    unread: set[str] = set()
    if (head or any(_names_head(model, name) for name in names or ())) and not embeddings:
        unread = _untie_head(model)
    groups = {name: group for name, group in group_of(model).items() if name not in unread}
    behind = {name for name, group in groups.items() if group == NORMS}
    if names is None:
        trained = {name for name, group in groups.items() if group in layers}
        trained |= behind if layers else set()
    else:
        trained = set()
        for wanted in names:
            fitting = {name for name in groups if f".{wanted}." in f".{name}."}
            if not fitting:
                raise UserError(
                    f"--train_modules {wanted}: no parameter has it in its name; names are such as "
                    f"{', '.join(_examples(model, groups))}"
                )
            trained |= fitting
    also = {EMBEDDINGS: embeddings, HEAD: head}
    trained |= {name for name, group in groups.items() if also.get(group)}
    if args.train_norms:
        inside = {
            f"{name}.{part}"
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for part, _ in module.named_parameters(recurse=False)
        }
        trained |= inside & groups.keys()
    option = "--train_modules" if names else "--train_layers"
    if not trained:
        raise UserError(f"{option}: nothing is trained; name more")
    if trained == groups.keys():
        raise UserError(
            f"{option}: everything is trained, nothing frozen; name less, or tune the whole model "
            "with recipes/instruction_sft.py"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _examples(model: nn.Module, groups: dict[str, str | int]) -> list[str]:
    """Names that --train_modules knows."""
    place = find_layers(model)
    last = place.layers[-1]
    inside = [name for name, _ in last.named_children()]
    outside = [name for name in groups if layer_of(name, place.name) is None]
    return [f"{place.name.split('.')[-1]}.{len(place.layers) - 1}", *inside, *outside[:6]]


def _names_head(model: nn.Module, wanted: str) -> bool:
    """Whether a name means the head's weight, and by its other name not the embeddings'."""
    shared = _shared_weight(model)
    return shared is not None and f".{wanted}." in f".{shared}."


def _shared_weight(model: nn.Module) -> str | None:
    """The name of the head's weight if it is tied to the embeddings."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _untie_head(model: nn.Module) -> set[str]:
    """Give the head a weight of its own, if it shares that of the embeddings: training it would
    change them, too. Returns the names of parameters that nothing reads from then on.
    """
    if (name := _shared_weight(model)) is None:
        return set()
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    bias, unread = getattr(head, "bias", None), set()
    for place, module in model.named_modules():
        # BERT registers it twice. Nothing will tie them when they are loaded: so both are saved,
        # but only the head's is read, and trained.
        if bias is not None and module is not head and module._parameters.get("bias") is bias:
            module.bias = nn.Parameter(bias.detach().clone())
            unread.add(f"{place}.bias")
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if not target.startswith(name.removesuffix("weight"))
    }
    say(
        f"{name} was the embeddings' weight, which training would change: the head is trained as a "
        f"weight of its own, {head.weight.numel():,} parameters more"
    )
    return unread


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules that make answers of the states behind the layers."""
    groups = group_of(model)
    names = [name.rpartition(".")[0] for name, group in groups.items() if group == HEAD]
    return list(dict.fromkeys(names))


def linear_names(model: nn.Module, layers: Collection[int]) -> list[str]:
    """The names of the linear layers inside these layers, for PEFT's `target_modules`."""
    place = find_layers(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and layer_of(f"{name}.", place.name) in layers
    ]


def layer_map(model: nn.Module) -> dict[str, str]:
    """What is trained, from the bottom up, for a table: neighbors that are alike in one line.

    Args:
        model: with an adapter or without.
    """
    bare, place = bare_model(model), find_layers(model)
    trained: Counter = Counter()
    total: Counter = Counter()
    embeddings = _embeddings(bare, place)
    for name, parameter in model.named_parameters():
        number = layer_of(name, place.name)
        if number is None:
            number = -1 if id(parameter) in embeddings else len(place.layers)
        total[number] += parameter.numel()
        trained[number] += parameter.numel() * parameter.requires_grad

    def state(number: int) -> tuple[int, int]:
        return trained[number], total[number]

    rows = {"embeddings": [-1]}
    for (_, _), numbers in groupby(range(len(place.layers)), state):
        first, *rest = numbers
        rows[f"layers {first} to {rest[-1]}" if rest else f"layer {first}"] = [first, *rest]
    rows["behind the layers"] = [len(place.layers)]
    shown = {}
    for name, numbers in rows.items():
        count, size = (sum(tally[number] for number in numbers) for tally in (trained, total))
        some = f"{count:,} of {size:,} trained" if count else f"frozen, {size:,}"
        shown[name] = f"trained, {size:,}" if count == size and size else some
    return {name: text for name, text in shown.items() if text != "frozen, 0"}
