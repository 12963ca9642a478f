"""The trainers and their arguments, and what a step is made of: packing, batches, callbacks."""

from recipelib.training.callbacks import SampleWriter, stop_early
from recipelib.training.class_trainer import ClassTrainer
from recipelib.training.cloze_trainer import ClozeTrainer, keep_best
from recipelib.training.config import RecipeConfig
from recipelib.training.frozen import GradualUnfreezing, keep_states, rates_by_depth, trainer_of
from recipelib.training.trainer import RecipeTrainer

__all__ = [
    "ClassTrainer",
    "ClozeTrainer",
    "GradualUnfreezing",
    "RecipeConfig",
    "RecipeTrainer",
    "SampleWriter",
    "keep_best",
    "keep_states",
    "rates_by_depth",
    "stop_early",
    "trainer_of",
]
