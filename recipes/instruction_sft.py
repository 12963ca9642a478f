"""Instruction tuning: one model learns many tasks from their instructions, and so to follow
instructions that it was not trained on (Wei et al. 2021, FLAN, arXiv:2109.01652; Sanh et al. 2021,
T0, arXiv:2110.08207).

Each task is a template, with its own data, its instruction and several phrasings; or data that
comes as conversations (OpenAI's messages, ShareGPT, Alpaca, prompt and completion), which is
recognized by its columns. All assistant turns are trained, and nothing else. `--heldout_template`
scores a task that was not trained, before and after: that is what the method is for.

Choose it for a model that is to do many things; for one task `lora_sft.py` is cheaper. All
parameters are trained: 16 bytes each, divided by the number of GPUs under FSDP; `--lora true` needs
a fraction of that.

    accelerate launch recipes/instruction_sft.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/instruction_sft.py \\
        --template sst2 trec esnli --heldout_template rte --mixing equal --neftune_noise_alpha 5
    accelerate launch recipes/instruction_sft.py --dataset chats.jsonl --packing true
    accelerate launch recipes/instruction_sft.py --template sst2=data/sst2 auto=chats.jsonl
"""

from dataclasses import dataclass

from recipelib.cli import RecipeArguments, loss_option, option, owns_output_dir, run_recipe

DEFAULTS = {
    "output_dir": "runs/instruction_sft",
    "learning_rate": 1e-4,  # for a small model; 1e-5 for billions of parameters
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 1,
    # 8 rows a step, in 2 parts of similar length: little padding, whatever the lengths.
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "batch_rebalance",
}
BUNDLED = ["movie_reviews", "word_problems"]


@dataclass
class InstructionArguments(RecipeArguments):
    """Arguments of this method."""

    template: list[str] = option(
        [], "Tasks: names or .yaml files, each TEMPLATE or TEMPLATE=DATA; auto=DATA guesses."
    )
    heldout_template: list[str] = option(
        [], "Tasks, written likewise, that are scored before and after but not trained."
    )
    columns: list[str] = option(
        [], "Where columns have other names: text=review, with several tasks sst2.text=review."
    )
    mixing: str = option(
        "size",
        "Each task's share of a pass: by its size; equal; or T, by size ** (1 / T): both "
        "repeat the rows of small tasks.",
    )
    max_train_samples: int | None = option(
        300, "At most so many rows of all tasks together in one pass; -1: all.", least=1
    )
    max_eval_samples: int | None = option(
        30, "Rows of each task that are scored; -1: all.", least=1
    )
    rendering: str = option(
        "chat", "chat: through the tokenizer's chat template, or a plain one; or text.",
        choices=["text", "chat"],
    )  # fmt: skip
    loss: str = loss_option()
    lora: bool = option(False, "Train a LoRA adapter instead; raise --learning_rate.")
    r: int = option(16, "rank of the update.", least=1, needs="--lora true")
    alpha: int = option(32, "it is scaled by alpha / r.", least=1, needs="--lora true")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a lower loss, and keep the best.", least=1
    )
    sample_steps: int | None = option(
        None,
        "Write an answer to a few evaluation rows into samples.jsonl every so many steps.",
        least=1,
    )


@owns_output_dir
def main(args: InstructionArguments, training) -> dict | None:
    """Train on a mixture of tasks, and score each, beside the untouched model.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from peft import LoraConfig, get_peft_model

    from recipelib.data import mixture_counts
    from recipelib.models import load_model, without_lora
    from recipelib.reporting import preview, save_run
    from recipelib.task import load_tasks, mix
    from recipelib.training import RecipeTrainer, SampleWriter, stop_early

    named = args.template or ([f"auto={args.dataset}"] if args.dataset else BUNDLED)
    tasks = load_tasks(args, training, named, args.heldout_template)
    # The mixture: so many rows of each task make one pass.
    sizes = [task.train.available for task in tasks if task.train]
    counts = mixture_counts(sizes, args.mixing, args.max_train_samples)
    mixture = mix(tasks, counts, args, training)
    if args.preview:
        return preview(mixture, args.preview)
    model = load_model(args, training, float32=not args.lora)
    if args.lora:
        lora = LoraConfig(
            r=args.r,
            lora_alpha=args.alpha,
            target_modules="all-linear",
            exclude_modules=without_lora(model),
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, revision=args.revision)
    callbacks = []
    if args.early_stopping_patience:
        callbacks.append(stop_early(training, args.early_stopping_patience))
    if args.sample_steps:
        callbacks += [SampleWriter.of(task, args.sample_steps) for task in tasks]
    trainer = RecipeTrainer(model, training, mixture, callbacks=callbacks, loss=args.loss)

    base = mixture.score(trainer.model, "before")
    trainer.train()
    tuned = mixture.score(trainer.model, "after")
    trainer.save_model()
    more = {"mixing": args.mixing, "mixture": mixture.shares, "tasks": mixture.compare(base, tuned)}
    more["loss"] = args.loss
    method = "instruction lora" if args.lora else "instruction full"
    return save_run(trainer, mixture, base, tuned, method=method, more=more)


if __name__ == "__main__":
    run_recipe(main, InstructionArguments, __doc__, DEFAULTS)
