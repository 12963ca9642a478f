"""Tunes all parameters of a model with `RecipeTrainer`, as a recipe of its own would: a test runs
it under `accelerate launch`, or calls `main`.
"""

import sys

from datasets import Dataset

from recipelib.cli import RecipeArguments, parse_arguments
from recipelib.data.rows import load_splits
from recipelib.encoding.examples import encode_rows
from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.models.loading import load_pretrained, load_tokenizer
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.checkpoints import find_checkpoint
from recipelib.runtime.console import say
from recipelib.training.trainer import RecipeTrainer


def main(argv: list[str]) -> None:
    args, training = parse_arguments(RecipeArguments, "", {}, argv)
    template = PromptTemplate.load(args.template)
    tokenizer = load_tokenizer(args.model_name_or_path)
    encoder = PromptEncoder(template, tokenizer, training.max_length)
    train, evaluation = load_splits(template, args, training.seed)
    checkpoint = find_checkpoint(training.output_dir, training.resume_from_checkpoint)
    model = load_pretrained(args.model_name_or_path, dtype=training.model_dtype[0])
    calls = []
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(encode_rows(encoder, train.rows).examples),
        processing_class=tokenizer,
    )
    model = trainer.shard()
    say(f"before: {evaluate_task(model, encoder, evaluation.rows)}")
    trainer.train(resume_from_checkpoint=checkpoint)
    say(f"after: {evaluate_task(model, encoder, evaluation.rows)}")
    trainer.save_model(training.output_dir)
    trainer.save_state()
    say(f"first layer computed {len(calls)} times")


if __name__ == "__main__":
    main(sys.argv[1:])
