"""Prompt tuning with a verbalizer: a prompt is trained in front of a frozen model.

A template puts a row into a text ("The movie review is: [x] It was [mask]."), the model says how
likely each label word fills it, and a verbalizer makes labels of words. Trained are embeddings that
stand in front of the text (Lester et al. 2021, arXiv:2104.08691), a small network that makes them
(P-tuning, Liu et al. 2021, arXiv:2103.10385), or keys and values in front of those of every layer
(prefix tuning, Li and Liang 2021, arXiv:2101.00190). The model stays as it is.

Choose it for classification, to serve many tasks from one frozen model: a task is a file of some
kilobytes. With many rows LoRA learns more; with few, `cloze_sft.py` trains the model the same way.

    accelerate launch recipes/prompt_tuning.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/prompt_tuning.py
    accelerate launch recipes/prompt_tuning.py --tune prefix
    accelerate launch recipes/prompt_tuning.py --per_class 16 --draws 5
    accelerate launch recipes/prompt_tuning.py --adapter runs/prompt_tuning --output_dir runs/more
"""

from dataclasses import dataclass

from recipelib.cli import ClozeArguments, adapter_option, option, owns_output_dir, run_recipe

DEFAULTS = {
    "output_dir": "runs/prompt_tuning",
    "learning_rate": None,  # what is tuned decides, see RATES
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,  # whose soft prompt is computed once
    "train_sampling_strategy": "batch_rebalance",
}
# Embeddings in front of a frozen model want steps that would ruin the model's own weights. Three
# times a prefix's was better on TREC (0.89 after 0.85) and below the untouched model on SST-2.
RATES = {"soft_prompt": 0.03, "p_tuning": 3e-4, "prefix": 0.01}
LABEL_RATE = 1e-3  # of --soft_verbalizer, at that rate; it rises and falls with --learning_rate


@dataclass
class PromptArguments(ClozeArguments):
    """Arguments of this method."""

    adapter: str | None = adapter_option()
    tune: str = option(
        "soft_prompt",
        "soft_prompt; p_tuning: through a small network; prefix: keys and values in every layer.",
        choices=["soft_prompt", "p_tuning", "prefix"],
    )
    virtual_tokens: int = option(16, "Length of the prompt: 8 to 100; longer is slower.", least=1)
    init: str = option(
        "template",
        "where it starts: at the template's own text, the label words, words drawn from the "
        "vocabulary, or random numbers.",
        choices=["template", "words", "vocabulary", "random"],
        needs="--tune soft_prompt or prefix",
    )
    prompt_encoder: str = option(
        "mlp",
        "the network: mlp, or lstm as in the paper.",
        choices=["mlp", "lstm"],
        needs="--tune p_tuning",
    )


@owns_output_dir
def main(args: PromptArguments, training) -> dict | None:
    """Train a prompt in front of a frozen model, and score both.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from recipelib.adapters import check_prompt, open_adapter
    from recipelib.models import load_model, place_model
    from recipelib.reporting import preview, save_draws
    from recipelib.task import load_cloze_task

    start = open_adapter(args, training, "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
    check_prompt(f"--tune {args.tune}", args, training, prefix=args.tune == "prefix")
    decide = ("tune", "virtual_tokens", "prompt_encoder", "soft_verbalizer")
    task = load_cloze_task(
        args, training, virtual_tokens=args.virtual_tokens, trained_as=decide
    )  # template, tokenizer, checked rows, label words
    if start:
        start.check_labels([*task.words])
    if args.preview:
        return preview(task, args.preview)
    if training.learning_rate is None:
        training.learning_rate = RATES[args.tune]
    model = load_model(args, training, masked=task.masked)
    if start:
        base = task.score(place_model(start.on(model), training), "prompt before")
    else:
        base = task.score_untouched(place_model(model, training))
    del model
    runs = [train(draw, args, run, base, start) for draw, run in task.draws(args, training)]
    return runs[0] if len(runs) == 1 else save_draws(runs, training.output_dir)


def train(task, args: PromptArguments, training, base, start) -> dict:
    """Train a prompt on the rows of one draw; of few-shot draws the best pass is kept."""
    from recipelib.adapters import SoftVerbalizer, compute_prompt_once
    from recipelib.models import load_model
    from recipelib.reporting import save_run
    from recipelib.training import ClozeTrainer, keep_best

    model = load_model(args, training, masked=task.masked)
    model = start.on(model) if start else with_prompt(model, args, task)
    if args.soft_verbalizer and not start:
        SoftVerbalizer.at_words(model, task.words).into(model)
    compute_prompt_once(model)
    rates = {"soft_verbalizer": LABEL_RATE * training.learning_rate / RATES[args.tune]}
    trainer = ClozeTrainer(model, training, task, rates=rates)
    best = keep_best(trainer, task)
    trainer.train()
    tuned = task.score(trainer.model, "tuned model")
    trainer.save_model()
    more = {"tune": args.tune, "virtual_tokens": args.virtual_tokens, "validation_scores": best}
    more |= start.facts if start else {}
    method = f"prompt_tuning ({args.tune})"
    return save_run(trainer, task, base, tuned, method=method, more={**task.facts, **more})


def with_prompt(model, args: PromptArguments, task):
    """PEFT's soft prompt, its network or a prefix in front of the model, which is frozen."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    from recipelib.adapters import (
        keys_and_values,
        prompt_shape,
        start_ids,
        start_prefix,
        start_prompt,
    )

    ids = start_ids(args.init, args.virtual_tokens, task.asker, task.question, task.words)
    prefix = args.tune == "prefix"
    shape = prompt_shape(model, args.virtual_tokens, revision=args.revision, prefix=prefix)
    if args.tune == "p_tuning":
        network = args.prompt_encoder.upper()
        config = PromptEncoderConfig(encoder_reparameterization_type=network, **shape)
        return get_peft_model(model, config)
    if prefix:
        start = keys_and_values(model, ids)
        return start_prefix(get_peft_model(model, PrefixTuningConfig(**shape)), start)
    config = PromptTuningConfig(prompt_tuning_init="RANDOM", **shape)
    return start_prompt(get_peft_model(model, config), ids)


if __name__ == "__main__":
    run_recipe(main, PromptArguments, __doc__, DEFAULTS)
