"""A model cut into stages that stand in several processes, and its trainer (GPipe)."""

from recipelib.pipeline.pipeline import Pipeline
from recipelib.pipeline.stages import Stages, check_pipeline, load_part
from recipelib.pipeline.trainer import PipelineTrainer

__all__ = ["Pipeline", "PipelineTrainer", "Stages", "check_pipeline", "load_part"]
