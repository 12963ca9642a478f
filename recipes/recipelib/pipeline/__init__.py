"""A model cut into stages that stand in several processes, and micro-batches on their way through
them (GPipe): cutting, loading, schedules, the trainer and its checkpoints.
"""

from recipelib.pipeline.pipeline import Pipeline
from recipelib.pipeline.stages import Stages, check_pipeline, load_part
from recipelib.pipeline.trainer import PipelineTrainer

__all__ = ["Pipeline", "PipelineTrainer", "Stages", "check_pipeline", "load_part"]
