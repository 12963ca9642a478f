"""One stage of a model: from tokens, or the states of the stage before, to states or the loss."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from recipelib.encoding import IGNORED
from recipelib.models import find_layers, logits_at
from recipelib.pipeline.stages import Stages


class Elsewhere(nn.Module):
    """Stands for what another process computes, and hands on what it is given."""

    def forward(self, states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The states."""
        return states


class _NoPositions(nn.Module):
    """Stands for learned positions, which are added in front of the first layer only."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """A zero to add."""
        return torch.zeros((), device=position_ids.device)


class Ends(NamedTuple):
    """The names of what stands in front of a bare model's layers, and of what stands behind."""

    front: list[str]
    back: list[str]


class Tied(NamedTuple):
    """A trained weight that the embeddings share with the head, and this process's copy of it."""

    name: str
    weight: nn.Parameter


def ends_of(bare: nn.Module) -> Ends:
    """The ends of a model that nothing has been taken out of."""
    holder, _, layers = find_layers(bare).name.rpartition(".")
    front, back, behind = [], [], False
    for name, module in bare.get_submodule(holder).named_children():
        if name == layers:
            behind = True
        elif isinstance(module, nn.Embedding):
            front.append(f"{holder}.{name}")
        elif behind and [*module.parameters()]:  # not rotary positions, which all stages need
            back.append(f"{holder}.{name}")
    head = bare.get_output_embeddings()
    return Ends(front, [*back, *(name for name, module in bare.named_modules() if module is head)])


def keep_part(bare: nn.Module, ends: Ends, stages: Stages) -> Tied | None:
    """Take out of a model what other processes compute; what stays keeps its name.

    A head that is tied to the embeddings becomes a weight of its own where these are another
    process's. Both are trained alike, so their gradients have to be summed.

    Returns:
        This process's copy of such a weight, if it is trained.
    """
    embeddings, head = bare.get_input_embeddings().weight, bare.get_output_embeddings().weight
    name = next(name for name, weight in bare.named_parameters() if weight is embeddings)
    layers = find_layers(bare).layers
    for number in {*range(len(layers))} - stages.own_layers:
        layers[number] = Elsewhere()
    for other in _others(ends, stages.is_first, stages.is_last):
        bare.set_submodule(other, _stand_in(other))
    tied = head is embeddings and head.requires_grad and stages.processes > 1
    return Tied(name, head) if tied and (stages.is_first or stages.is_last) else None


def views(bare: nn.Module, ends: Ends, stages: Stages, label_smoothing: float = 0.0) -> list[Stage]:
    """This process's stages of a model of which `keep_part` has kept what they need."""
    own, (name, layers) = [], find_layers(bare)
    for number in stages.own:
        first, last, here = number == 0, number == len(stages.cut) - 1, stages.cut[number]
        steps = [layer if at in here else Elsewhere() for at, layer in enumerate(layers)]
        view = _with(bare, name, nn.ModuleList(steps))
        for other in _others(ends, first, last):
            view = _with(view, other, _stand_in(other))
        own.append(Stage(view, number, first, last, label_smoothing))
    return own


def _others(ends: Ends, first: bool, last: bool) -> list[str]:
    """What the first or the last stage has, and a stage that is not that one has not."""
    return [*(() if first else ends.front), *(() if last else ends.back)]


def _stand_in(name: str) -> nn.Module:
    return _NoPositions() if name.endswith(".wpe") else Elsewhere()  # GPT-2's positions


def _with(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """A module that shares all its parts with another, but for the one of this name."""
    child, _, rest = name.partition(".")
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # that of TRL's fused head would run the whole part
    twin._modules = {
        **module._modules,
        child: _with(module._modules[child], rest, part) if rest else part,
    }
    return twin


class Stage(nn.Module):
    """A part of a transformers model that runs in one process: the model's own forward pass, with
    its masks and positions, in which the layers of other stages hand on what they are given.

    Args:
        model: in which only the parts of this stage do something.
        number: of the stage.
        first, last: whether it is that one.
        label_smoothing: of the loss.
    """

    def __init__(
        self, model: nn.Module, number: int, first: bool, last: bool, label_smoothing: float
    ):
        super().__init__()
        self.model, self.number, self.first, self.last = model, number, first, last
        self.label_smoothing = label_smoothing

    def forward(
        self,
        given: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute a micro-batch.

        Args:
            given: [rows, width] tokens for the first stage, else [rows, width, hidden] states.
            attention_mask: [rows, width], 0 for padding, which stands on the right.
            labels: [rows, width], for the loss.
            columns, tokens: [rows, asked], without labels: columns, and the tokens behind them
                that are asked for; a column of -1 asks for nothing.

        Returns:
            [rows, width, hidden] states; of the last stage [1] loss (nats), summed over tokens, or
            [rows, asked] log-probabilities (nats).
        """
        named = {"input_ids" if self.first else "inputs_embeds": given}
        inputs = {**named, "attention_mask": attention_mask, "use_cache": False}
        if not self.last:
            return self.model.base_model(**inputs).last_hidden_state
        if labels is not None:
            targets = labels[:, 1:]
            supervised = targets != IGNORED
            with logits_at(self.model, supervised.nonzero(), labels.shape[1]):
                logits = self.model(**inputs).logits[0].float()
            smooth = {"label_smoothing": self.label_smoothing}
            return F.cross_entropy(logits, targets[supervised], reduction="sum", **smooth)[None]
        asked = columns >= 0
        places = torch.stack([asked.nonzero()[:, 0], columns[asked]], 1)
        with logits_at(self.model, places, given.shape[1]):
            logits = self.model(**inputs).logits[0]
        # A few rows at a time: a second copy of all logits may not fit.
        parts = zip(logits.split(64), tokens[asked].split(64), strict=True)
        found = torch.zeros(columns.shape, device=given.device)
        found[asked] = torch.cat(
            [-F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts]
        )
        return found
