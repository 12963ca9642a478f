"""The layers of a model, of which a forward pass can be told to run a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from recipelib.models import bare_model, find_layers

Step = Callable[..., Any]


class LayerList(nn.ModuleList):
    """A model's layers under their own names, which are what `state_dict`, `parameters` and FSDP
    see; what a forward pass goes through can be another list for a while.

    Attributes:
        in_tuples: whether the layers put their states out in a tuple.
    """

    in_tuples = False
    _shown: list[Step] | None = None

    def __iter__(self) -> Iterator[Step]:
        return super().__iter__() if self._shown is None else iter(self._shown)

    def __getitem__(self, index):
        return super().__getitem__(index) if self._shown is None else self._shown[index]

    @contextmanager
    def showing(self, steps: list[Step]) -> Iterator[None]:
        """A context in which the model goes through these instead."""
        self._shown = steps
        try:
            yield
        finally:
            self._shown = None


class _Given:
    """Stands for a layer whose output is known."""

    def __init__(self, layer: nn.Module, states: torch.Tensor, in_tuples: bool):
        self._layer, self._states, self._in_tuples = layer, states, in_tuples

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs):
        states = self._states.to(hidden_states)
        return (states, None) if self._in_tuples else states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)  # models ask layers for the kind of their attention


class _Kept:
    """A layer whose output is kept."""

    def __init__(self, layer: nn.Module, kept: list[torch.Tensor]):
        self._layer, self._kept = layer, kept

    def __call__(self, *args, **kwargs):
        output = self._layer(*args, **kwargs)
        self._kept.append(output[0] if isinstance(output, tuple) else output)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def replaceable_layers(model: nn.Module) -> LayerList:
    """A model's layers, made a `LayerList` if they are none yet; before FSDP wraps the model.

    Raises:
        UserError: the model has no list of layers.
    """
    bare, (name, layers) = bare_model(model), find_layers(model)
    if isinstance(layers, LayerList):
        return layers
    holder, _, attribute = name.rpartition(".")
    layers = LayerList(layers)
    setattr(bare.get_submodule(holder), attribute, layers)
    return layers


@contextmanager
def beginning_at(layers: LayerList, boundary: int, states: torch.Tensor) -> Iterator[None]:
    """A context in which the layers below the boundary are not run: what they put out is given.

    Args:
        states: [rows, tokens, width].
    """
    steps = [*layers]
    below: list[Step] = [_Given(layer, states, layers.in_tuples) for layer in steps[:boundary]]
    with layers.showing(below + steps[boundary:]):
        yield


@contextmanager
def ending_at(layers: LayerList, boundary: int) -> Iterator[list[torch.Tensor]]:
    """A context in which only the layers below the boundary are run, of which there is one; gives
    the list to which each forward pass adds what the last of them puts out: [rows, tokens, width].
    """
    kept: list[torch.Tensor] = []
    *below, last = [*layers][:boundary]
    with layers.showing([*below, _Kept(last, kept)]):
        yield kept
