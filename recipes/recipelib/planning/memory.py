"""The memory that a GPU needs, where it holds a whole model, a share of it, or a stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import nn

from recipelib.models import find_layers
from recipelib.planning.cutting import Stage
from recipelib.planning.workload import Workload
from recipelib.runtime import first_line
from recipelib.training import (
    MemoryEstimate,
    MicroBatch,
    Sharding,
    Steps,
    estimate_memory,
    optimizer_bytes,
    step_peaks,
)


def trainer_arguments(work: Workload, processes: int) -> SimpleNamespace:
    """The trainer's arguments that an estimate reads.

    Args:
        processes: that divide a step's rows among them.
    """
    return SimpleNamespace(
        # Shapes alone are computed, and attention needs as much on a GPU.
        device=torch.device("cpu"),
        bf16=work.halved,
        fp16=False,
        activation_checkpointing=work.activation_checkpointing,
        activation_checkpointing_kwargs=None,
        optim=work.optim,
        optim_args=None,
        gradient_accumulation_steps=work.micro_batches(processes),
        world_size=processes,
    )


def micro_batch_of(work: Workload) -> MicroBatch:
    """The shape of a forward pass, without padding."""
    supervised = max(1, round(work.supervised * work.tokens))
    return MicroBatch(work.micro_batch, work.length, supervised, padded=False)


def process_memory(
    model: nn.Module, work: Workload, sharding: Sharding, steps: Steps | None = None
) -> MemoryEstimate:
    """What each GPU holds where all of them hold the whole model, or each a share of it.

    Args:
        model: under FSDP in the dtype in which it is gathered.
        steps: fake steps that were made for the same `work`, see `step_peaks`.
    """
    training, batch = trainer_arguments(work, work.gpus), micro_batch_of(work)
    return estimate_memory(model, training, batch, sharding=sharding, steps=steps)


@dataclass(frozen=True)
class LayerActivations:
    """What a layer keeps from its forward to its backward pass, and what is computed beside it.

    Attributes:
        each: bytes that a layer keeps of every micro-batch.
        once: bytes that it keeps however many there are: weights in 16 bits, which autocast makes.
        beside: bytes besides, while the backward pass is in a layer.
        head: bytes besides, by kind, while it is in the head.
        note: why nothing could be measured; "" if it could.
    """

    each: float = 0
    once: float = 0
    beside: float = 0
    head: Counter = field(default_factory=Counter)
    note: str = ""


def layer_activations(
    model: nn.Module, work: Workload, steps: Steps | None = None
) -> LayerActivations:
    """Measured by fake steps: of all layers and of one less, of one micro-batch and of two.

    Args:
        steps: those that were made for the same `work`, see `step_peaks`.
    """
    steps = {} if steps is None else steps
    layers = find_layers(model).layers
    depth, last = len(layers), layers[-1]
    try:
        peaks, twice = (_peaks(model, work, times, steps) for times in (1, 2))
        del layers[-1]
        less, less_twice = (_peaks(model, work, times, steps) for times in (1, 2))
    except Exception as error:  # as in `estimate_memory`
        return LayerActivations(note=f"without activations: {first_line(error)[:80]}")
    finally:
        if len(layers) < depth:
            layers.append(last)
    kept = peaks[0]["activations"] - less[0]["activations"]
    each = twice[0]["activations"] - less_twice[0]["activations"] - kept
    # With two peaks the second is in the first layer, when nothing is kept of the others.
    still_kept = kept if len(peaks) == 2 else depth * kept
    head = Counter(peaks[0])
    head["activations"] -= depth * kept
    return LayerActivations(
        each=each,
        once=kept - each,
        beside=peaks[-1]["activations"] - still_kept,
        head=head,
    )


def _peaks(model: nn.Module, work: Workload, times: int, steps: Steps) -> list[Counter]:
    """Those of a forward pass with so many times a micro-batch's rows. No gradient counts: a
    stage's are kept over the micro-batches, and counted there.
    """
    one = micro_batch_of(work)
    batch = replace(one, rows=times * one.rows, supervised=times * one.supervised)
    shares = {id(weight): 0 for weight in model.parameters() if weight.requires_grad}
    logging.disable(logging.ERROR)  # torch logs what it raises
    try:
        return step_peaks(model, trainer_arguments(work, 1), batch, shares, None, steps)
    finally:
        logging.disable(logging.NOTSET)


def pipeline_memory(
    model: nn.Module, work: Workload, stages: Sequence[Stage], activations: LayerActivations
) -> MemoryEstimate:
    """What each GPU holds where it holds a pipeline's stage: of the stage that holds the most.

    Weights, gradients and states of the stage, and for each micro-batch that is under way what its
    layers keep, what arrived and what was sent. Under way are, at the same time, all micro-batches
    of a step under GPipe's schedule (Huang et al. 2019, arXiv:1811.06965); under 1F1B's as many as
    there are stages from this one on (Narayanan et al. 2019, PipeDream). The logits are those of
    one micro-batch. Where a stage has several replicas, copies of the gradients are sent.

    Args:
        model: all stages together.
        activations: of its layers.
    """
    replicas = work.gpus // len(stages)
    micro_batches = work.micro_batches(replicas)
    training, hidden = trainer_arguments(work, replicas), model.get_input_embeddings().weight
    boundary = work.tokens * hidden.shape[1] * hidden.element_size()
    found = []
    for number, stage in enumerate(stages):
        trained = [weight for weight in stage.parameters if weight.requires_grad]
        held = sum(map(_bytes, [*stage.parameters, *model.buffers()]))
        gradients = sum(map(_bytes, trained))
        optimizer, notes = optimizer_bytes(trained, training, _bytes)
        note = "; ".join([*notes, activations.note] if activations.note else notes)
        copies = gradients if replicas > 1 else 0
        under_way = micro_batches
        if work.schedule == "1f1b":
            under_way = min(micro_batches, len(stages) - number)
        last = number == len(stages) - 1
        once = len(stage.layers) * activations.once
        each = len(stage.layers) * activations.each + ((number > 0) + (not last)) * boundary

        # The optimizer's step; the first backward pass, before which there may be no gradients; and
        # a later one. The last stage is in its head, too, at that moment.
        beside = Counter(activations=activations.beside)
        if last:
            beside = max(beside, activations.head, key=Counter.total)
        moments = [
            Counter(gradients=gradients),
            beside + Counter(activations=once + under_way * each),
            beside + Counter(activations=once + (under_way - 1) * each, gradients=gradients),
        ]
        if micro_batches > under_way:
            moments[1]["gradients"] += gradients
        for moment in moments:
            moment.update(parameters=held, gradients=copies, optimizer=optimizer)
        highest = max(moments, key=Counter.total)
        terms = [name for name in MemoryEstimate.__annotations__ if name != "note"]
        sizes = {name: round(highest[name]) for name in terms}
        found.append(MemoryEstimate(**sizes, note=note))
    return max(found, key=lambda one: one.total)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
