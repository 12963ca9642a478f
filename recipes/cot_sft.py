"""Chain-of-thought tuning: reasoning before the answer (Wei et al. 2022, arXiv:2201.11903; trained,
Ho et al. 2022, arXiv:2212.10071, and Hsieh et al. 2023, arXiv:2305.02301).

The training text is rationale and answer, so that each step of a solution is conditioned on the
steps before it. What the reasoning is worth shows on the same rows: `--target answer_only` trains
the bare answer, `answer_rationale` explains afterwards, `mixed` trains answer and rationale under
an instruction each (distilling step by step). Scored by writing and reading the answer.

Choose it when answers need several steps and you have worked solutions. Where the answer is seen at
a glance, the rationale only costs time: each answer is many times longer.

    accelerate launch recipes/cot_sft.py
    accelerate launch recipes/cot_sft.py --target answer_only
    accelerate launch recipes/cot_sft.py --template gsm8k --samples 8 --max_train_samples 2000
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/cot_sft.py --full true
"""

from dataclasses import dataclass

from recipelib.cli import RecipeArguments, loss_option, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {
    "output_dir": "runs/cot_sft",
    "learning_rate": 1.5e-3,  # for few rows and a small model; 2e-5 or so with --full true
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 1.5,
    "per_device_train_batch_size": 4,  # arithmetic is learned slowly, better in many small steps
}


@dataclass
class CotArguments(RecipeArguments):
    """Arguments of this method."""

    template: str = option(
        "word_problems", "The task, with a rationale: a name in data_templates/ or your own .yaml."
    )
    max_train_samples: int | None = option(
        300, "Train on a random draw of this many rows; -1: on all.", least=1
    )
    max_eval_samples: int | None = option(
        60, "Score a random draw of this many rows; -1: all.", least=1
    )
    target: str = option(
        "rationale_answer", "What is trained; the answer before or without the reason to compare.",
        choices=["rationale_answer", "answer_only", "answer_rationale", "mixed"],
    )  # fmt: skip
    rationale_instruction: str = option(
        "Solve the task step by step.", "asks for rationale and answer.", needs="--target mixed"
    )
    answer_instruction: str = option(
        "Give only the answer.", "asks for the bare answer.", needs="--target mixed"
    )
    max_new_tokens: int | None = option(
        None, "Longest text when scored; by default 5/4 of the longest trained one.", least=1
    )
    samples: int = option(
        1, "Also score by self-consistency over so many samples (Wang et al. 2023).", least=1
    )
    temperature: float = option(0.7, "their temperature, above 0.", needs="--samples 2 or more")
    loss: str = loss_option()
    full: bool = option(False, "Train all parameters instead of LoRA; lower --learning_rate.")
    r: int = option(16, "LoRA's rank.", least=1, needs="--full false")
    alpha: int = option(32, "LoRA is scaled by alpha / r.", least=1, needs="--full false")

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise UserError("--temperature: samples at 0 are all the same; raise it")


@owns_output_dir
def main(args: CotArguments, training) -> dict | None:
    """Train on rationales and score the answers, beside the untouched model.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from peft import LoraConfig, get_peft_model

    from recipelib.models import load_model, without_lora
    from recipelib.reporting import preview, save_predictions, save_run, say_wrong
    from recipelib.task import load_task, load_template
    from recipelib.training import RecipeTrainer

    # What is trained, and what is asked: the reasoning before the answer, behind it, or left out.
    trained, (template, *others) = targets(load_template(args, training), args)
    task = load_task(args, training, template, trained=trained)
    if args.preview:
        return preview(task, args.preview)
    model = load_model(args, training, float32=args.full)
    if not args.full:
        lora = LoraConfig(
            r=args.r,
            lora_alpha=args.alpha,
            target_modules="all-linear",
            exclude_modules=without_lora(model),
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, revision=args.revision)
    trainer = RecipeTrainer(model, training, task, loss=args.loss)
    base = task.score(trainer.model, "base model")
    trainer.train()
    tuned = task.score(trainer.model, "tuned model")
    trainer.save_model()
    more = {"target": args.target, "loss": args.loss}
    for bare in others:  # of a mixed model also the bare answer
        result = task.score(trainer.model, "answer only", template=bare)
        more["answer_only"] = {"score": result.score, "stderr": result.stderr}
    if args.samples > 1:  # self-consistency
        draw = {"samples": args.samples, "temperature": args.temperature, "seed": training.seed}
        voted = task.score(trainer.model, f"majority of {args.samples} samples", **draw)
        more["self_consistency"] = {"score": voted.score, "stderr": voted.stderr, **draw}
        save_predictions(training.output_dir, voted, "samples")
    method = f"cot {'full' if args.full else 'lora'}"
    metrics = save_run(trainer, task, base, tuned, method=method, more=more)
    say_wrong(tuned)
    return metrics


def targets(template, args: CotArguments) -> tuple[list, list]:
    """The templates that are trained on each row, and those that are asked, the main one first.

    Raises:
        UserError: the template has no rationale, or its samples would all be the same.
    """
    bare = template.without_rationale()
    trained = asked = [template]
    if args.target == "answer_only":
        trained = asked = [bare]
    elif args.target == "answer_rationale":
        # Asked for the answer only: what would follow is written after it and cannot change it.
        trained, asked = [template.with_rationale_behind()], [bare.with_stop("\n")]
    elif args.target == "mixed":
        reasoned = template.with_instruction(args.rationale_instruction)
        trained = asked = [reasoned, bare.with_instruction(args.answer_instruction)]
    if args.samples > 1 and asked[0].label and not asked[0].rationale:
        raise UserError(
            f"--samples {args.samples}: without its rationale {template.name} is answered by the "
            "likeliest label, which is always the same; leave it out"
        )
    return trained, asked


if __name__ == "__main__":
    run_recipe(main, CotArguments, __doc__, DEFAULTS)
