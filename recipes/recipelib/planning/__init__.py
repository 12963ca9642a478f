"""What a strategy will take before anything is launched: memory, time, where a pipeline is cut."""

from recipelib.planning.cutting import Stage, cut_layers, layer_costs, stages_of
from recipelib.planning.gpus import GPUS, Gpu
from recipelib.planning.memory import layer_activations, pipeline_memory, process_memory
from recipelib.planning.skeletons import SHAPES, read_config, skeleton
from recipelib.planning.strategies import FULL, LORA, QLORA, USABLE, Plan, compare_strategies
from recipelib.planning.table import answer, show_plans
from recipelib.planning.workload import Workload

__all__ = [
    "FULL",
    "GPUS",
    "LORA",
    "QLORA",
    "SHAPES",
    "USABLE",
    "Gpu",
    "Plan",
    "Stage",
    "Workload",
    "answer",
    "compare_strategies",
    "cut_layers",
    "layer_activations",
    "layer_costs",
    "pipeline_memory",
    "process_memory",
    "read_config",
    "show_plans",
    "skeleton",
    "stages_of",
]
