"""Tunes all parameters of a model with `RecipeTrainer`, as a recipe of its own would."""

from recipelib.cli import RecipeArguments, run_recipe
from recipelib.models.loading import load_model
from recipelib.runtime.console import say
from recipelib.task.task import load_task
from recipelib.training.trainer import RecipeTrainer

DEFAULTS = {}


def main(args: RecipeArguments, training) -> None:
    """Train, and say how often the first layer was computed since the trainer was made."""
    task = load_task(args, training)
    trainer = RecipeTrainer(load_model(args, training), training, task)
    calls = []
    norm = trainer.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    task.score(trainer.model, "before")
    trainer.train()
    task.score(trainer.model, "after")
    trainer.save_model()
    trainer.save_state()
    say(f"first layer computed {len(calls)} times")


if __name__ == "__main__":
    run_recipe(main, RecipeArguments, __doc__, DEFAULTS)
