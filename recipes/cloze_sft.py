"""Cloze tuning: classification as the model's own pre-training task (PET, Schick and Schuetze 2021,
arXiv:2001.07676; LM-BFF, Gao et al. 2021, arXiv:2012.15723).

A template puts a row into a text with a blank ("The movie review is: [x] It was [mask]."), the
model says how likely each label word fills it, and a verbalizer makes labels of words. All
parameters are trained to fill in the right word; with `--soft_prompt true` embeddings in front of
the text are trained, too.

Choose it for classification with few rows, above all with masked models such as BERT: nothing is
added whose weights would start at random. To leave the model frozen, `prompt_tuning.py`.

    accelerate launch recipes/cloze_sft.py --per_class 16 --draws 5
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/cloze_sft.py
    accelerate launch recipes/cloze_sft.py --model_name_or_path google-bert/bert-base-uncased
    python recipes/cloze_sft.py --template my_task.yaml --score_only true
"""

from dataclasses import dataclass

from recipelib.cli import ClozeArguments, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {
    "output_dir": "runs/cloze_sft",
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "batch_rebalance",
}
# At that --learning_rate, with which they rise and fall: embeddings in front of a model, or of
# labels, want steps that would ruin its own weights.
RATES = {"prompt_encoder": 0.03, "soft_verbalizer": 1e-3}


@dataclass
class ClozeSftArguments(ClozeArguments):
    """Arguments of this method."""

    soft_prompt: bool = option(False, "Train a soft prompt in front of the text together with it.")
    virtual_tokens: int = option(
        16,
        "its length: 8 to 100; longer is slower.",
        least=1,
        needs="--soft_prompt true",
    )
    init: str = option(
        "template",
        "where it starts: at the template's own text, the label words, words drawn from the "
        "vocabulary, or random numbers.",
        choices=["template", "words", "vocabulary", "random"],
        needs="--soft_prompt true",
    )
    score_only: bool = option(False, "Score the untouched model and stop; train nothing.")
    trains = property(lambda self: not self.score_only)

    def __post_init__(self):
        super().__post_init__()
        if self.soft_verbalizer and self.score_only:
            raise UserError("--soft_verbalizer: is trained; leave it out, or --score_only")


@owns_output_dir
def main(args: ClozeSftArguments, training) -> dict | None:
    """Train a model through the cloze, and score it beside the untouched one.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from recipelib.adapters import check_prompt
    from recipelib.models import load_model, place_model
    from recipelib.reporting import preview, save_draws, save_score
    from recipelib.runtime import refuse_trained_run
    from recipelib.task import load_cloze_task

    if args.soft_prompt:
        check_prompt("--soft_prompt", args, training)
    if args.score_only:
        refuse_trained_run(training.output_dir)
    task = load_cloze_task(
        args,
        training,
        virtual_tokens=args.virtual_tokens if args.soft_prompt else 0,
        trained_as=("soft_prompt", "virtual_tokens", "soft_verbalizer"),
        trains=not args.score_only,
    )  # template, tokenizer, checked rows, label words
    if args.preview:
        return preview(task, args.preview)
    model = load_model(args, training, float32=not args.score_only, masked=task.masked)
    model = place_model(model, training)
    base = task.score_untouched(model)
    if args.score_only:
        return save_score(base, task, training, model)
    del model
    runs = [train(draw, args, run, base) for draw, run in task.draws(args, training)]
    return runs[0] if len(runs) == 1 else save_draws(runs, training.output_dir)


def train(task, args: ClozeSftArguments, training, base) -> dict:
    """Train on the rows of one draw; of few-shot draws the best pass is kept."""
    from peft import PromptTuningConfig, get_peft_model

    from recipelib.adapters import SoftVerbalizer, prompt_shape, start_ids, start_prompt
    from recipelib.models import load_model
    from recipelib.reporting import save_run
    from recipelib.training import ClozeTrainer, keep_best

    model = load_model(args, training, float32=True, masked=task.masked)
    if args.soft_prompt:
        ids = start_ids(args.init, args.virtual_tokens, task.asker, task.question, task.words)
        shape = prompt_shape(model, args.virtual_tokens, revision=args.revision)
        config = PromptTuningConfig(prompt_tuning_init="RANDOM", **shape)
        model = start_prompt(get_peft_model(model, config), ids)
        model.base_model.requires_grad_(True)  # PEFT froze it
    if args.soft_verbalizer:
        SoftVerbalizer.at_words(model, task.words).into(model)
    scale = training.learning_rate / DEFAULTS["learning_rate"]
    rates = {name: scale * rate for name, rate in RATES.items()}
    trainer = ClozeTrainer(model, training, task, rates=rates)
    best = keep_best(trainer, task)
    trainer.train()
    tuned = task.score(trainer.model, "tuned model")
    trainer.save_model()
    more = {
        "tune": "both" if args.soft_prompt else "model",
        "virtual_tokens": args.virtual_tokens if args.soft_prompt else 0,
        "validation_scores": best,
    }
    method = f"cloze ({'model and soft prompt' if args.soft_prompt else 'model'})"
    return save_run(trainer, task, base, tuned, method=method, more={**task.facts, **more})


if __name__ == "__main__":
    run_recipe(main, ClozeSftArguments, __doc__, DEFAULTS)
