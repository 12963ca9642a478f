"""A task as text: the template file, its checks and its sandbox, label words, conversations."""

from recipelib.prompts.columns import PREFERENCES
from recipelib.prompts.conversations import Turn, read_list
from recipelib.prompts.questions import Demonstration, Question
from recipelib.prompts.schema import TEMPLATE_FOLDER, find_template
from recipelib.prompts.template import PromptTemplate
from recipelib.prompts.values import RowError, as_list, class_name, is_empty
from recipelib.prompts.verbalizer import COMBINE, combine_words, label_scores, same_word

__all__ = [
    "COMBINE",
    "PREFERENCES",
    "TEMPLATE_FOLDER",
    "Demonstration",
    "PromptTemplate",
    "Question",
    "RowError",
    "Turn",
    "as_list",
    "class_name",
    "combine_words",
    "find_template",
    "is_empty",
    "label_scores",
    "read_list",
    "same_word",
]
