"""How well a model does a task, exactly the same over any number of processes."""

from recipelib.evaluation.answers import score_answers
from recipelib.evaluation.calibration import probabilities
from recipelib.evaluation.classes import score_chosen, score_classes
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.evaluation.label_search import LabelWords, search_label_words
from recipelib.evaluation.labels import score_cloze, score_labels
from recipelib.evaluation.losses import score_losses
from recipelib.evaluation.scores import (
    RIGHT_OR_WRONG,
    FewShotScore,
    TaskScore,
    identify_rows,
    mean_score,
    records_of,
)

__all__ = [
    "RIGHT_OR_WRONG",
    "FewShotScore",
    "LabelWords",
    "TaskScore",
    "evaluate_task",
    "identify_rows",
    "mean_score",
    "probabilities",
    "records_of",
    "score_answers",
    "score_chosen",
    "score_classes",
    "score_cloze",
    "score_labels",
    "score_losses",
    "search_label_words",
]
