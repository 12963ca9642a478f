"""How well a model does a task, exactly the same over any number of processes."""

from recipelib.evaluation.answers import score_answers
from recipelib.evaluation.calibration import probabilities
from recipelib.evaluation.classes import score_chosen, score_classes
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.evaluation.label_search import LabelWords, search_label_words
from recipelib.evaluation.labels import score_cloze, score_labels
from recipelib.evaluation.losses import score_losses
from recipelib.evaluation.scores import FewShotScore, TaskScore, mean_score

__all__ = [
    "FewShotScore",
    "LabelWords",
    "TaskScore",
    "evaluate_task",
    "mean_score",
    "probabilities",
    "score_answers",
    "score_chosen",
    "score_classes",
    "score_cloze",
    "score_labels",
    "score_losses",
    "search_label_words",
]
