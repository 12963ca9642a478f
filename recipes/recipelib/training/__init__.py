"""The trainers and their arguments, and what a step is made of: packing, batches, callbacks."""

from recipelib.training.callbacks import SampleWriter, stop_early
from recipelib.training.cloze_trainer import ClozeTrainer, keep_best
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

__all__ = [
    "ClozeTrainer",
    "RecipeConfig",
    "RecipeTrainer",
    "SampleWriter",
    "keep_best",
    "stop_early",
]
