"""In-context learning (Brown et al. 2020, arXiv:2005.14165): no training, examples in the prompt.

A frozen model is asked with k solved examples in front of each question. Labels are chosen by the
likelihood of their words, which can be calibrated (Zhao et al. 2021); free answers are written,
with the reasoning first if there is one (Wei et al. 2022). Several draws show how much they matter.

Choose it when there are too few rows to train on, to see what a model can do before you train, or
to score any trained result; not when prompts have to be short: each pays for its examples.

    python recipes/icl_eval.py
    python recipes/icl_eval.py --template sst2 --shots 8 --draws 5 --score calibrated
    python recipes/icl_eval.py --template gsm8k --shots 8 --samples 5
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/icl_eval.py --shots 4
    python recipes/icl_eval.py --adapter runs/lora_sft --shots 0
"""

from dataclasses import dataclass

from recipelib.cli import RecipeArguments, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {"output_dir": "runs/icl_eval", "max_length": 4096}


@dataclass
class IclArguments(RecipeArguments):
    """Arguments of this method."""

    trains = False
    template: str | None = option(
        None, "The task: a name or your own .yaml file; else the one that a run had, or reviews."
    )
    rendering: str | None = option(
        None, "text or chat; else as the model's run had it, or text.", choices=["text", "chat"]
    )
    shots: int | None = option(
        None, "Demonstrations per prompt: 0, 1, 4, 16; the template's k.", least=0
    )
    sampler: str | None = option(
        None,
        "Which: first, random, balanced over classes, nearest to each row; the template's.",
        choices=["first", "random", "balanced", "nearest"],
    )
    nearest_by: str = option(
        "bm25", "Nearest by words (bm25) or the model's embedding.", choices=["bm25", "embedding"]
    )
    draws: int = option(1, "So many draws of demonstrations; 5 show the spread.", least=1)
    score: str = option(
        "sum",
        "What decides among labels; all are reported. calibrated: where one label always wins.",
        choices=["sum", "mean", "bytes", "pmi", "calibrated"],
    )
    reasoning: str = option(
        "template",
        "template: its rationale first, if it has one; none: the answer only; trigger: zero-shot "
        "chain of thought.",
        choices=["template", "none", "trigger"],
    )
    trigger: str = option(
        "Let's think step by step.", "what it begins with.", needs="--reasoning trigger"
    )
    samples: int = option(1, "Self-consistency: the majority of so many samples.", least=1)
    temperature: float | None = option(None, "0: greedy. [0.7 for several samples]", least=0)
    adapter: str | None = option(None, "Folder or hub id of a PEFT adapter to put on the model.")
    predict: str | None = option(
        None, "A file of rows without answers: answer them, with --adapter if given, and stop."
    )
    resume: bool = option(False, "Go on where an interrupted run with this --output_dir stopped.")

    def __post_init__(self):
        super().__post_init__()
        if self.temperature is None:
            self.temperature = 0.7 if self.samples > 1 else 0.0
        if self.samples > 1 and not self.temperature:
            raise UserError("--samples: samples at --temperature 0 are all the same; raise it")


@owns_output_dir
def main(args: IclArguments, training) -> dict | None:
    """Score a model with demonstrations in its prompts.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    from recipelib.adapters import with_adapter
    from recipelib.data import Demonstrations, nearest_rows
    from recipelib.inference import Journal, embedding_similarity
    from recipelib.models import load_model, place_model
    from recipelib.reporting import preview_prompts, save_few_shot, say_first_prompt
    from recipelib.task import load_few_shot_task

    task = load_few_shot_task(args, training)  # template, tokenizer, rows that are asked, a pool
    template, pool, asked, model = task.template, task.train, task.evaluation, None
    embeds = task.shots and task.sampler == "nearest" and args.nearest_by == "embedding"
    if embeds or not args.preview:
        model = load_model(args, training, masked=task.masked)
        model = place_model(with_adapter(model, task.adapter), training)

    # Each draw chooses the demonstrations of every row, or one fixed set for all rows.
    options = {"seed": training.seed, "solve": task.asker.solve}
    if task.shots and task.sampler == "nearest":
        by = embedding_similarity(model, task.encoder) if embeds else None
        options["nearest"] = nearest_rows(template, pool.rows, asked.rows, task.shots, by)
    draws = [
        Demonstrations(template, pool.rows, task.shots, task.sampler, draw=draw, **options)
        for draw in range(args.draws if task.shots else 0)
    ] or [None]
    if args.preview:
        return preview_prompts(task.asker, asked.rows[: args.preview], draws[0], not args.predict)
    say_first_prompt(task.asker, asked.rows[0], draws[0], not args.predict)

    journal = Journal.of_run(training, args, task.adapter)  # keeps what is scored, for --resume
    with task.memory.sampling():
        result = score(model, task, draws, args, training.seed, journal)
    metrics = save_few_shot(result, task, args, training, model)
    journal.discard()
    return metrics


def score(model, task, draws: list, args: IclArguments, seed: int, journal):
    """Score conversations by their loss, closed answers by the likelihood of the label words, and
    let the model write the others.
    """
    from recipelib.evaluation import score_answers, score_labels, score_losses

    rows, answers = task.evaluation.rows, not args.predict
    options = {**task.budget, "journal": journal}
    if task.template.metric == "loss" and answers:
        return score_losses(model, task.encoder, rows, draws, **options)
    if not task.writes:
        options |= {"score": args.score, "answers": answers}
        return score_labels(model, task.asker, rows, draws, **options)
    return score_answers(
        model,
        task.encoder,
        rows,
        draws,
        max_new_tokens=args.max_new_tokens,
        samples=args.samples,
        temperature=args.temperature,
        trigger=args.trigger if args.reasoning == "trigger" else "",
        seed=seed,
        answers=answers,
        **options,
    )


if __name__ == "__main__":
    run_recipe(main, IclArguments, __doc__, DEFAULTS, trains=False)
