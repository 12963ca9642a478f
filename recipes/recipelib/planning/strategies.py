"""The strategies for some GPUs beside one another: what each takes of them, and which fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from recipelib.planning.cutting import layer_costs, stages_of
from recipelib.planning.gpus import Gpu
from recipelib.planning.memory import layer_activations, pipeline_memory, process_memory
from recipelib.planning.skeletons import skeleton
from recipelib.planning.timing import StepTime, pipeline_time, replicas_time, shards_time
from recipelib.planning.workload import Workload
from recipelib.training import MemoryEstimate, Sharding, Steps

FULL, LORA, QLORA = "all parameters", "LoRA", "QLoRA"
DDP, FSDP2, OFFLOADED = "DDP", "FSDP2", "FSDP2, offloaded"
# Of a GPU's memory; the rest is left to CUDA, to NCCL's buffers, to what the allocator keeps.
USABLE = 0.9
_BEST_PIPELINES = 2


@dataclass(frozen=True)
class Plan:
    """What a strategy comes to.

    Attributes:
        method: what is trained: FULL, LORA or QLORA.
        layout: what each GPU holds: "DDP", "FSDP2", "pipeline 4 x 2" (4 stages, each with 2
            replicas).
        memory: of the GPU that needs the most.
        time: of a step.
        fits: whether the memory suffices.
    """

    method: str
    layout: str
    memory: MemoryEstimate
    time: StepTime
    fits: bool

    @property
    def order(self) -> tuple[bool, float]:
        """By which plans are sorted: what fits, the fastest first; then what comes close."""
        return not self.fits, self.time.total if self.fits else self.memory.total


def pipeline_depths(gpus: int, layers: int) -> list[int]:
    """The numbers of stages that use all GPUs, each stage with equally many replicas."""
    return [stages for stages in range(2, min(gpus, layers) + 1) if gpus % stages == 0]


def compare_strategies(config, work: Workload, gpu: Gpu) -> list[Plan]:
    """All strategies that make sense on so many GPUs; of the pipelines of each method the best.

    Args:
        config: the model's, of transformers.
    Returns:
        What fits, the fastest first; then what does not, the smallest first.
    """
    replica = skeleton(config, torch.float32)
    # FSDP gathers in the dtype that is computed in; there is no autocast.
    gathered = skeleton(config, work.torch_dtype) if work.halved else replica
    lora = skeleton(config, work.torch_dtype, work.r)
    packed = skeleton(config, work.torch_dtype, work.r, packed=True)
    whole, shared = Sharding(), Sharding(sharded=True)
    offloaded = Sharding(sharded=True, offloaded=True)
    copies = DDP if work.gpus > 1 else "one GPU"
    steps: Steps = {}  # each is made once, whatever strategies it serves

    def plan(method: str, layout: str, memory: MemoryEstimate, time: StepTime) -> Plan:
        fits = memory.total <= USABLE * gpu.memory_gib * 2**30
        return Plan(method, layout, memory, time, fits)

    def data_parallel(method: str, layout: str, model: nn.Module, sharding: Sharding) -> Plan:
        memory = process_memory(model, work, sharding, steps)
        if sharding.sharded:
            return plan(method, layout, memory, shards_time(model, work, gpu, sharding))
        time = replicas_time(lora if method == QLORA else model, work, gpu, method == QLORA)
        return plan(method, layout, memory, time)

    plans = [
        data_parallel(FULL, copies, replica, whole),
        data_parallel(LORA, copies, lora, whole),
        data_parallel(QLORA, copies, packed, whole),
    ]
    if work.gpus > 1:
        plans.append(data_parallel(FULL, FSDP2, gathered, shared))
        plans.append(data_parallel(LORA, FSDP2, lora, shared))
    plans.append(data_parallel(FULL, OFFLOADED, gathered, offloaded))
    for method, model in ((FULL, replica), (LORA, lora)):
        pipelines = _pipelines(model, work, gpu, steps, partial(plan, method))
        plans += sorted(pipelines, key=lambda one: one.order)[:_BEST_PIPELINES]
    return sorted(plans, key=lambda one: one.order)


def _pipelines(
    model: nn.Module, work: Workload, gpu: Gpu, steps: Steps, plan: Callable[..., Plan]
) -> Sequence[Plan]:
    """One plan for each number of stages."""
    costs = layer_costs(model, work.supervised)
    depths = pipeline_depths(work.gpus, len(costs[0]))
    activations = layer_activations(model, work, steps) if depths else None
    found = []
    for depth in depths:
        stages, replicas = stages_of(model, costs, depth), work.gpus // depth
        layout = f"pipeline {depth}" + (f" x {replicas}" if replicas > 1 else "")
        memory = pipeline_memory(model, work, stages, activations)
        found.append(plan(layout, memory, pipeline_time(model, work, gpu, stages)))
    return found
