"""Where a pipeline cuts a model: which layers each of its stages holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import fsum
from typing import TYPE_CHECKING, NamedTuple

from recipelib.models import EMBEDDINGS, find_layers, group_of
from recipelib.runtime import UserError

if TYPE_CHECKING:
    from torch import nn


class Stage(NamedTuple):
    """What a pipeline's stage holds: the numbers of its layers, and all its parameters."""

    layers: range
    parameters: list[nn.Parameter]


def layer_costs(
    model: nn.Module, supervised_fraction: float = 1.0
) -> tuple[list[float], float, float]:
    """What each layer costs, and what stands in front of the layers and behind them: half the share
    in a step's compute plus half the share in the parameters, so that all costs add up to 1.

    A pipeline is as slow as its slowest stage and fits where its largest stage does. The compute of
    a layer goes with its parameters; that of the head with its parameters times the fraction of
    tokens that are projected; looking embeddings up computes next to nothing. A head that is tied
    to the embeddings is held at both ends.

    Args:
        model: on any device, meta included; layers with adapters count with these.
        supervised_fraction: of the tokens, the part that has a loss, 0 to 1.
    Returns:
        The costs of the layers, from the bottom up; of the embeddings; of the last norm and the
        head.
    Raises:
        UserError: as `find_layers`.
    """
    layers = [0] * len(find_layers(model).layers)
    first = last = 0
    groups = group_of(model)
    for name, parameter in model.named_parameters():
        if isinstance(group := groups[name], int):
            layers[group] += parameter.numel()
        elif group == EMBEDDINGS:
            first += parameter.numel()
        else:
            last += parameter.numel()
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        last += head.numel()
    projected = supervised_fraction * head.numel()
    parameters = sum(layers) + first + last
    compute = sum(layers) + projected
    return (
        [size / compute / 2 + size / parameters / 2 for size in layers],
        first / parameters / 2,
        projected / compute / 2 + last / parameters / 2,
    )


def cut_layers(layers: Sequence[float], first: float, last: float, stages: int) -> list[range]:
    """Cut layers into contiguous stages, each of at least one layer, so that the stage that costs
    the most costs as little as possible.

    Where several cuts do, the next most expensive stage decides, and so on; where they all cost the
    same, early stages have fewer layers, since they hold the activations of more micro-batches.

    Args:
        layers: the cost of each, from the bottom up.
        first: what the first stage has to bear besides, for the embeddings.
        last: the same of the last stage, for the norm and the head.
        stages: how many.
    Returns:
        The numbers of the layers of each stage.
    Raises:
        UserError: there are more stages than layers, or none.
    """
    if not 1 <= stages <= len(layers):
        raise UserError(
            f"{stages} pipeline stages: the model has {len(layers)} layers, and each stage needs "
            f"at least one; take 1 to {len(layers)} stages"
        )

    def cost(start: int, end: int) -> float:
        # Sums as `fsum` makes them do not depend on the order: equal stages cost the same exactly.
        ends = [first] * (start == 0) + [last] * (end == len(layers))
        return fsum([*layers[start:end], *ends])

    # By the layers so far: what their stages cost, the highest first, and where these start.
    best = {end: ([cost(0, end)], [0]) for end in range(1, len(layers) + 1)}
    for stage in range(1, stages):
        best = {
            end: min(
                (sorted([*costs, cost(start, end)], reverse=True), [*starts, start])
                for start, (costs, starts) in best.items()
                if stage <= start < end
            )
            for end in range(stage + 1, len(layers) + 1)
        }
    _, starts = best[len(layers)]
    return [range(*ends) for ends in pairwise([*starts, len(layers)])]


def stages_of(model: nn.Module, costs: tuple[list[float], float, float], count: int) -> list[Stage]:
    """A model cut into so many stages. The first has the embeddings, too, the last the norm and the
    head, and a copy of its own of a head that is tied to the embeddings.

    Args:
        costs: as `layer_costs` gives them.
    Raises:
        UserError: as `cut_layers`.
    """
    stages = [Stage(layers, []) for layers in cut_layers(*costs, count)]
    groups = group_of(model)
    for name, parameter in model.named_parameters():
        group = groups[name]
        if isinstance(group, int):
            stage = next(one for one in stages if group in one.layers)
        else:
            stage = stages[0 if group == EMBEDDINGS else -1]
        stage.parameters.append(parameter)
    head = model.get_output_embeddings().weight
    if count > 1 and head is model.get_input_embeddings().weight:
        stages[-1].parameters.append(head)
    return stages
