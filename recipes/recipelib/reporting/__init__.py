"""What a run shows and leaves: preview, metrics, figures, the model card, predictions."""

from recipelib.reporting.cloze import save_draws, save_score
from recipelib.reporting.features import save_features_run
from recipelib.reporting.few_shot import save_few_shot
from recipelib.reporting.label_words import save_label_words
from recipelib.reporting.predicting import answer_file
from recipelib.reporting.previews import preview, preview_prompts, say_first_prompt
from recipelib.reporting.run import save_predictions, save_run, say_wrong

__all__ = [
    "answer_file",
    "preview",
    "preview_prompts",
    "save_draws",
    "save_features_run",
    "save_few_shot",
    "save_label_words",
    "save_predictions",
    "save_run",
    "save_score",
    "say_first_prompt",
    "say_wrong",
]
