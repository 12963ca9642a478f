"""Tunes all parameters of a model with `RecipeTrainer`, as a recipe of its own would: a test runs
it under `accelerate launch`, or calls `main`.
"""

import sys

from recipelib.cli import RecipeArguments, parse_arguments
from recipelib.models.loading import load_model
from recipelib.runtime.console import say
from recipelib.task.task import load_task
from recipelib.training.trainer import RecipeTrainer


def main(argv: list[str]) -> None:
    args, training = parse_arguments(RecipeArguments, "", {}, argv)
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
    main(sys.argv[1:])
