"""What every recipe begins with: template, checked rows, tokenizer, examples, and their score."""

from recipelib.task.classes import ClassTask, load_class_task
from recipelib.task.cloze import ClozeTask, load_cloze_task, load_word_task
from recipelib.task.few_shot import FewShotTask, load_few_shot_task
from recipelib.task.formatting import format_task
from recipelib.task.mixture import Mixture, load_tasks, mix
from recipelib.task.task import Task, load_task, load_template

__all__ = [
    "ClassTask",
    "ClozeTask",
    "FewShotTask",
    "Mixture",
    "Task",
    "format_task",
    "load_class_task",
    "load_cloze_task",
    "load_few_shot_task",
    "load_task",
    "load_tasks",
    "load_template",
    "load_word_task",
    "mix",
]
