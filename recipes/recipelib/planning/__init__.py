"""What a strategy will take before anything is launched: memory, time, where a pipeline is cut."""

from recipelib.planning.cutting import cut_layers, layer_costs
from recipelib.planning.gpus import GPUS, Gpu
from recipelib.planning.skeletons import read_config, skeleton
from recipelib.planning.strategies import USABLE, Plan, compare_strategies
from recipelib.planning.table import answer, show_plans
from recipelib.planning.workload import Workload

__all__ = [
    "GPUS",
    "USABLE",
    "Gpu",
    "Plan",
    "Workload",
    "answer",
    "compare_strategies",
    "cut_layers",
    "layer_costs",
    "read_config",
    "show_plans",
    "skeleton",
]
