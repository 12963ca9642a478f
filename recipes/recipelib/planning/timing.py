"""How long a step takes: what is computed, what is sent and waited for, where a pipeline idles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from recipelib.models import find_layers, group_of
from recipelib.planning.cutting import Stage
from recipelib.planning.gpus import Gpu
from recipelib.planning.workload import Workload
from recipelib.training import Sharding

_MASTER_BYTES = 4  # of a trained parameter, and so of its gradient
_PACKED_BYTES = 0.5  # of a weight in 4 bits
_REACHED = 0.8  # of a bandwidth's peak


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: of the GPU, or the pipeline's stage, that computes the longest.
        traffic: of all that it sends.
        waited: of the traffic, what computing does not hide.
        bubble: while it waits for the pipeline to fill and to drain.
    """

    compute: float
    traffic: float
    waited: float
    bubble: float = 0.0

    @property
    def total(self) -> float:
        """Of the whole step."""
        return self.compute + self.waited + self.bubble


class Passes(NamedTuple):
    """Of a micro-batch, forward and backward: first floating-point operations, then seconds."""

    forward: float
    backward: float


def flops(model: nn.Module, work: Workload) -> tuple[list[Passes], Passes]:
    """The floating-point operations of a micro-batch in each layer, and in the head.

    A weight takes part in one multiplication and one addition for each token in the forward pass,
    in as many for the gradient of its input, and, where it is trained, in as many for its own
    gradient. Attention multiplies queries by keys and scores by values: 2 x 2 x length x width for
    each token, half of which the causal mask leaves, and twice that in the backward pass. With
    recomputing, the backward pass of a layer begins with its forward pass.
    """
    groups, config = group_of(model), model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    scores = 2 * work.length * width
    layers = [[scores, 2 * scores] for _ in find_layers(model).layers]
    for name, weight in model.named_parameters():
        if isinstance(number := groups[name], int) and weight.dim() > 1:
            layers[number][0] += 2 * weight.numel()
            layers[number][1] += (4 if weight.requires_grad else 2) * weight.numel()
    again = work.activation_checkpointing
    tokens, head = work.tokens, model.get_output_embeddings().weight
    projected = work.supervised * tokens * head.numel()
    return (
        [
            Passes(tokens * forward, tokens * (backward + again * forward))
            for forward, backward in layers
        ],
        Passes(2 * projected, (4 if head.requires_grad else 2) * projected),
    )


def seconds(work: Workload, gpu: Gpu, *parts: Passes) -> Passes:
    """How long some parts of a model take for a micro-batch; float32 takes twice as long (TF32)."""
    speed = 1e12 * gpu.tflops * work.utilization / (1 if work.halved else 2)
    return Passes(*(sum(one) / speed for one in zip(*parts, strict=True)))


def ring_speed(group: int, work: Workload, gpu: Gpu) -> float:
    """The bytes a second at which a group of so many neighboring GPUs passes data around a ring.
    Between nodes the GPUs of a node share what goes through, each over its own network adapter.
    """
    if group <= work.gpus_per_node:
        return _REACHED * 1e9 * gpu.link_gbs
    return _REACHED * 1e9 * min(gpu.link_gbs, work.gpus_per_node * gpu.network_gbs)


def all_reduce(trained: int, group: int, work: Workload, gpu: Gpu) -> float:
    """The seconds in which a group adds up the gradients of so many parameters, in a ring."""
    return 2 * (group - 1) / group * _MASTER_BYTES * trained / ring_speed(group, work, gpu)


def replicas_time(model: nn.Module, work: Workload, gpu: Gpu, packed: bool = False) -> StepTime:
    """Where each GPU holds the whole model. The gradients are added up once in a step, while the
    backward pass of the last micro-batch goes on.

    Args:
        packed: whether the frozen weights of the layers have 4 bits. They are unpacked in each
            pass: read from the GPU's memory, and written to it in 16 bits.
    """
    layers, head = flops(model, work)
    forward, backward = seconds(work, gpu, *layers, head)
    if packed:
        groups = group_of(model)
        frozen = sum(
            weight.numel()
            for name, weight in model.named_parameters()
            if isinstance(groups[name], int) and not weight.requires_grad
        )
        moved = frozen * (_PACKED_BYTES + work.torch_dtype.itemsize)
        unpacking = moved / (_REACHED * 1e9 * gpu.memory_gbs)
        forward += unpacking
        backward += (2 if work.activation_checkpointing else 1) * unpacking
    traffic = all_reduce(_trained(model.parameters()), work.gpus, work, gpu)
    return StepTime(
        compute=work.micro_batches(work.gpus) * (forward + backward),
        traffic=traffic,
        waited=max(0.0, traffic - backward),
    )


def shards_time(model: nn.Module, work: Workload, gpu: Gpu, sharding: Sharding) -> StepTime:
    """Where FSDP2 gives each GPU a share. For each micro-batch all weights are gathered twice, in
    the dtype that is computed in, and the gradients of those that are trained are added up and
    divided, while layers before or after are computed. Offloaded shares come from the CPU's memory
    as often, at the same time, and their gradients go back; the optimizer's step, which the CPU
    then makes, is not counted.
    """
    layers, head = flops(model, work)
    compute = sum(seconds(work, gpu, *layers, head))
    weights = [*model.parameters()]
    trained, size = _trained(weights), work.torch_dtype.itemsize
    gathered = 2 * size * sum(weight.numel() for weight in weights) + size * trained
    others = (work.gpus - 1) / work.gpus
    traffic = others * gathered / ring_speed(work.gpus, work, gpu)
    if sharding.offloaded:
        stored = sum(
            weight.numel() * (_MASTER_BYTES if weight.requires_grad else weight.element_size())
            for weight in weights
        )
        moved = (2 * stored + _MASTER_BYTES * trained) / work.gpus
        traffic = max(traffic, moved / (_REACHED * 1e9 * gpu.host_gbs))
    micro_batches = work.micro_batches(work.gpus)
    return StepTime(
        compute=micro_batches * compute,
        traffic=micro_batches * traffic,
        waited=micro_batches * max(0.0, traffic - compute),
    )


def pipeline_time(model: nn.Module, work: Workload, gpu: Gpu, stages: Sequence[Stage]) -> StepTime:
    """Where a GPU holds a stage. With S stages, M micro-batches and t seconds for the slowest stage
    to compute one, forward and backward, a step takes (M + S - 1) t, of which (S - 1) t are the
    bubble (Huang et al. 2019, arXiv:1811.06965).

    A stage sends its output on, and the gradient of its input back, while it computes another
    micro-batch. The replicas of a stage are neighbors, in one node as far as they fit; they add
    up their gradients during the last backward pass.
    """
    layers, head = flops(model, work)
    replicas = work.gpus // len(stages)
    micro_batches = work.micro_batches(replicas)
    parts = [[layers[number] for number in stage.layers] for stage in stages]
    parts[-1].append(head)
    slowest = max((seconds(work, gpu, *part) for part in parts), key=sum)
    hidden = model.get_input_embeddings().weight
    boundary = work.tokens * hidden.shape[1] * hidden.element_size()
    link = gpu.link_gbs if work.gpus <= work.gpus_per_node else gpu.network_gbs
    sending = 2 * boundary / (_REACHED * 1e9 * link)
    adding_up = all_reduce(max(_trained(stage.parameters) for stage in stages), replicas, work, gpu)
    slot = max(sum(slowest), sending)
    return StepTime(
        compute=micro_batches * sum(slowest),
        traffic=micro_batches * sending + adding_up,
        waited=micro_batches * (slot - sum(slowest)) + max(0.0, adding_up - slowest.backward),
        bubble=(len(stages) - 1) * slot,
    )


def _trained(weights) -> int:
    return sum(weight.numel() for weight in weights if weight.requires_grad)
