"""Label words for a task that has none yet (LM-BFF, Gao et al. 2021, arXiv:2012.15723, sec. 4.1).

A verbalizer names the words that stand for each label. Which words a model knows best for a label
shows on a few labeled rows: those that it finds likely in the cloze of that label's rows, and that
together tell the rows apart. The words are shown with their accuracy, and a template with them is
written, to be edited and passed on as --template.

    python recipes/search_label_words.py --template my_task.yaml
    python recipes/search_label_words.py --template my_task.yaml \\
        --model_name_or_path google-bert/bert-base-uncased
"""

from dataclasses import dataclass

from recipelib.cli import RecipeArguments, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {"output_dir": "runs/label_words"}


@dataclass
class SearchArguments(RecipeArguments):
    """Arguments of this tool."""

    trains = False
    cloze: bool = option(
        False,
        "Ask a causal model by the template's cloze, wherever its mask is, instead of the prompt.",
    )
    # What a search does not have of `ClozeArguments`.
    combine, calibrate, soft_verbalizer = "logsumexp", False, False
    per_class, draws = None, 1

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_new_tokens", "predict"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name}: a search answers no rows; leave it out")
        if self.eval_split == "all":
            raise UserError("--eval_split all: words are scored on rows beside those of the search")


@owns_output_dir
def main(args: SearchArguments, training) -> None:
    """Search label words on the training rows, score them on the evaluation rows, and write them
    into a template.
    """
    # Imported here, so that --help answers at once.
    from recipelib.evaluation import search_label_words
    from recipelib.models import load_model, place_model
    from recipelib.reporting import preview, save_label_words
    from recipelib.runtime import refuse_trained_run
    from recipelib.task import load_cloze_task

    refuse_trained_run(training.output_dir)
    # A template without a verbalizer has the rows' classes.
    task = load_cloze_task(args, training, trains=False)
    if task.template.options:
        raise UserError(f"{task.template.path}: options: bring their own words; none is searched")
    if args.preview:
        return preview(task, args.preview)
    model = place_model(load_model(args, training, masked=task.masked), training)
    words = search_label_words(
        model,
        task.asker,
        task.encode(task.train.rows),
        task.scored,
        training.seed,
        batch_tokens=args.eval_batch_tokens,
    )
    save_label_words(words, task.template, training.output_dir)


if __name__ == "__main__":
    run_recipe(main, SearchArguments, __doc__, DEFAULTS)
