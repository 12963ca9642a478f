"""The trainers and their arguments, and what a step is made of: packing, batches, callbacks."""

from recipelib.training.batches import evaluation_batches, training_batches
from recipelib.training.callbacks import SampleWriter, stop_early
from recipelib.training.class_trainer import ClassTrainer
from recipelib.training.cloze_trainer import ClozeTrainer, keep_best
from recipelib.training.config import RecipeConfig
from recipelib.training.ends import end_at
from recipelib.training.fake_step import MicroBatch, Steps, step_peaks
from recipelib.training.frozen import GradualUnfreezing, keep_states, rates_by_depth, trainer_of
from recipelib.training.memory import (
    MemoryEstimate,
    Sharding,
    estimate_memory,
    optimizer_bytes,
)
from recipelib.training.options import refuse_unused
from recipelib.training.plan import show_plan
from recipelib.training.trainer import RecipeTrainer

__all__ = [
    "ClassTrainer",
    "ClozeTrainer",
    "GradualUnfreezing",
    "MemoryEstimate",
    "MicroBatch",
    "RecipeConfig",
    "RecipeTrainer",
    "SampleWriter",
    "Sharding",
    "Steps",
    "end_at",
    "estimate_memory",
    "evaluation_batches",
    "keep_best",
    "keep_states",
    "optimizer_bytes",
    "rates_by_depth",
    "refuse_unused",
    "show_plan",
    "step_peaks",
    "stop_early",
    "trainer_of",
    "training_batches",
]
