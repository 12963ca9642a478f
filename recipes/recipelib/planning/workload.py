"""What a step trains on, and how: the same for all strategies that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from recipelib.runtime import UserError, require_at_least


@dataclass(frozen=True)
class Workload:
    """What a step trains on, and how.

    Attributes:
        gpus: in all.
        gpus_per_node: of them, those in one node.
        batch: rows of a step, on all GPUs together.
        micro_batch: rows of a forward pass.
        length: tokens of a row.
        supervised: of the tokens, the part that has a loss and so is projected onto the vocabulary.
        dtype: "bfloat16" or "float32".
        r: the rank of LoRA.
        optim: the optimizer, as the trainer names it.
        activation_checkpointing: whether layers are computed again in the backward pass.
        schedule: a pipeline's: "gpipe", all forward passes of a step before all backward passes; or
            "1f1b", a stage does a backward pass as soon as it can.
        utilization: of a GPU's peak, the part that a forward or backward pass reaches.
    """

    gpus: int = 8
    gpus_per_node: int = 8
    batch: int = 64
    micro_batch: int = 1
    length: int = 1024
    supervised: float = 0.5
    dtype: str = "bfloat16"
    r: int = 16
    optim: str = "adamw_torch"
    activation_checkpointing: bool = False
    schedule: str = "1f1b"
    utilization: float = 0.4

    def __post_init__(self):
        counts = ("gpus", "gpus_per_node", "batch", "micro_batch", "length", "r")
        require_at_least(self, **dict.fromkeys(counts, 1))
        for name in ("supervised", "utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0 and at most 1")

    @property
    def halved(self) -> bool:
        """Whether it is computed in 16 bits."""
        return self.dtype == "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """What it is computed in."""
        return torch.bfloat16 if self.halved else torch.float32

    @property
    def tokens(self) -> int:
        """Those of a micro-batch."""
        return self.micro_batch * self.length

    def micro_batches(self, replicas: int) -> int:
        """How many forward passes each of so many copies of the model makes in a step; where the
        batch does not divide, some of them stand idle in the last.
        """
        return math.ceil(self.batch / (replicas * self.micro_batch))
