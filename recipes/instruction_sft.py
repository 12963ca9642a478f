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

import time
from dataclasses import dataclass, replace

from recipelib.cli import RecipeArguments, option, run_recipe
from recipelib.runtime.errors import UserError, require_at_least

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

ADAPTER_SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""
MODEL_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""


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
        "size", "Each task's share: size, equal, or a temperature T: by size ** (1 / T)."
    )
    max_train_samples: int | None = option(
        300, "Rows of all tasks together in one pass; -1: as many as there are."
    )
    max_eval_samples: int | None = option(30, "Rows of each task that are scored; -1: all.")
    rendering: str = option(
        "chat", "chat: through the tokenizer's chat template, or a plain one; or text.",
        choices=["text", "chat"],
    )  # fmt: skip
    lora: bool = option(False, "Train a LoRA adapter instead; raise --learning_rate.")
    r: int = option(16, "LoRA: rank of the update.")
    alpha: int = option(32, "LoRA: the update is scaled by alpha / r.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a lower loss, and keep the best."
    )
    sample_steps: int | None = option(
        None, "Write an answer to a few evaluation rows into samples.jsonl every so many steps."
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, r=1, alpha=1, early_stopping_patience=1, sample_steps=1)


@dataclass
class Task:
    """A template with its rows; `train` is None where it is held out."""

    template: object
    train: object
    evaluation: object
    encoder: object = None


def main(args: InstructionArguments, training) -> dict | None:
    """Train on a mixture of tasks, and score each, beside the untouched model.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from recipelib.data.drawing import draw_rows, mixture_counts
    from recipelib.encoding.chat_template import ensure_chat_template
    from recipelib.encoding.examples import EncodedRows, encode_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.evaluation.evaluation import evaluate_task
    from recipelib.evaluation.scores import mean_score
    from recipelib.models.loading import describe_model, load_model, load_tokenizer
    from recipelib.reporting.card import publish
    from recipelib.reporting.predicting import answer_file
    from recipelib.reporting.preview import preview
    from recipelib.reporting.run import save_run
    from recipelib.runtime.checkpoints import check_adapter, find_checkpoint
    from recipelib.runtime.console import say
    from recipelib.training.callbacks import SampleWriter, stop_early
    from recipelib.training.memory import MemoryMeter, estimate_memory
    from recipelib.training.plan import show_plan
    from recipelib.training.trainer import RecipeTrainer

    if args.predict:
        return answer_file(args, training)
    model_name, output_dir = args.model_name_or_path, training.output_dir
    load = {"revision": args.revision, "trust_remote_code": training.trust_remote_code}

    tasks = load_tasks(args, training.seed)
    trained = [task for task in tasks if task.train]
    tokenizer = load_tokenizer(model_name, **load)
    if args.rendering == "chat" and ensure_chat_template(tokenizer):
        say("the tokenizer has no chat template: a plain one is used, and saved with the model")
    for task in tasks:
        task.encoder = PromptEncoder(
            task.template, tokenizer, training.max_length, args.rendering, args.chat_template_kwargs
        )
    # The mixture: so many rows of each task make one pass.
    sizes = [task.train.available for task in trained]
    counts = mixture_counts(sizes, args.mixing, args.max_train_samples)
    if sum(counts) < sum(sizes):
        few = f"{sum(counts):,} of {sum(sizes):,}"
        say(f"training on {few} rows; --max_train_samples -1 takes all")
    encoded, mixture = EncodedRows(), {}
    for task, count in zip(trained, counts, strict=True):
        rows = draw_rows(task.train.rows, count, training.seed)
        some = encode_rows(task.encoder, rows, seed=training.seed)
        encoded.extend(some)
        mixture[task.template.name] = {"rows": count, "supervised": some.counts.supervised_tokens}
    if args.preview:
        return preview(encoded, tokenizer, args.preview)

    checkpoint = find_checkpoint(output_dir, training.resume_from_checkpoint)
    memory = MemoryMeter()
    # What is trained stays in float32; autocast or FSDP compute in less.
    model = load_model(
        model_name,
        dtype=training.model_dtype[0] if args.lora else torch.float32,
        attn_implementation=args.attn_implementation,
        **load,
    )
    set_seed(training.seed)
    if args.lora:
        lora = LoraConfig(
            r=args.r,
            lora_alpha=args.alpha,
            target_modules="all-linear",
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, revision=args.revision)
    check_adapter(checkpoint, model)
    callbacks = []
    if args.early_stopping_patience:
        callbacks.append(stop_early(training, args.early_stopping_patience))
    if args.sample_steps:
        callbacks += [
            SampleWriter(task.encoder, task.evaluation.rows[:2], args.sample_steps)
            for task in tasks
        ]
    held_out = None
    if training.eval_strategy != "no":  # the loss on the trained tasks' evaluation rows
        parts = [encode_rows(task.encoder, task.evaluation.rows) for task in trained]
        held_out = Dataset.from_list([example for part in parts for example in part.examples])
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(encoded.examples),
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    estimated = estimate_memory(model, training, encoded.examples)
    model = trainer.shard()

    def score_all(when: str) -> dict:
        scores = {}
        for task in tasks:
            name = task.template.name
            scores[name] = evaluate_task(
                model,
                task.encoder,
                task.evaluation.rows,
                max_new_tokens=args.max_new_tokens,
                batch_tokens=args.eval_batch_tokens,
                description=f"scoring {name} {when}",
            )
            say(f"{name}{'' if task.train else ' (held out)'} {when}: {scores[name]}")
        return scores

    base = score_all("before")
    name = describe_model(model_name)
    shares = {task: f"{one['rows']:,} rows" for task, one in mixture.items()}
    show_plan(name, model, encoded, training, shares, estimated)
    memory.restart()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    peak = memory.stop()

    tuned = score_all("after")
    trainer.save_model(output_dir)
    snippet = ADAPTER_SNIPPET if args.lora else MODEL_SNIPPET
    names = [task.template.name for task in trained]
    metrics = save_run(
        trainer,
        trained[0].encoder,
        encoded,
        mean_score({one: base[one] for one in names}),
        mean_score({one: tuned[one] for one in names}),
        method="instruction lora" if args.lora else "instruction full",
        model_name=name,
        load_snippet=snippet.format(base=model.name_or_path, folder=output_dir),
        estimated=estimated,
        peak_memory_bytes=peak,
        peak_resident_bytes=memory.resident,
        train_seconds=seconds,
        skipped_rows=sum(task.train.skipped for task in trained),
        templates=[task.template for task in trained],
        more={"mixing": args.mixing, "mixture": mixture, "tasks": compare(tasks, base, tuned)},
    )
    if training.publish:
        publish(output_dir, training)
    return metrics


def load_tasks(args: InstructionArguments, seed: int) -> list[Task]:
    """The trained tasks, then those held out, each with its rows.

    Raises:
        UserError: arguments or rows that will not do.
    """
    from recipelib.data.formats import template_for
    from recipelib.data.rows import load_splits, overlap, parse_columns
    from recipelib.prompts.template import PromptTemplate
    from recipelib.runtime.console import progress, say

    named = args.template or ([f"auto={args.dataset}"] if args.dataset else BUNDLED)
    items = [(one, True) for one in named] + [(one, False) for one in args.heldout_template]
    if args.template and args.dataset and len(items) > 1:
        raise UserError("--dataset: goes with one task; write TEMPLATE=DATA for each of several")
    tasks, used = [], set()
    for item, is_trained in items:
        template_name, _, data = item.partition("=")
        data = data or (args.dataset if args.template else None)
        if template_name == "auto":
            template, guess = template_for(data, args.train_split)
            say(f"{data}: {guess}")
        else:
            template = PromptTemplate.load(template_name)
        columns = {}
        for given in args.columns:
            task, dot, mapping = given.partition(".")
            if not dot and len(items) > 1:
                raise UserError(f"--columns {given}: of which task? Write TASK.variable=column")
            if not dot or task == template.name:
                columns |= parse_columns([mapping if dot else given])
                used.add(given)
        if columns:
            fields = template.fields
            columns = {**fields.get("columns", {}), **columns}
            template = PromptTemplate({**fields, "columns": columns}, template.path)
        if template.name in [task.template.name for task in tasks]:
            raise UserError(f"--template {item}: a task {template.name!r} is there; rename one")
        rows = load_splits(
            template, replace(args, dataset=data), seed, progress=progress("checking")
        )
        if is_trained and (shared := overlap(*rows, template)):
            say(f"warning: {template.name}: {shared} evaluation rows are training rows too")
        tasks.append(Task(template, rows[0] if is_trained else None, rows[1]))
    if unused := [one for one in args.columns if one not in used]:
        raise UserError(f"--columns {unused[0]}: there is no such task")
    return tasks


def compare(tasks: list[Task], base: dict, tuned: dict) -> dict:
    """What metrics.json says of each task."""
    return {
        task.template.name: {
            "metric": tuned[task.template.name].metric,
            "score": tuned[task.template.name].score,
            "stderr": tuned[task.template.name].stderr,
            "base_score": base[task.template.name].score,
            "eval_rows": tuned[task.template.name].rows,
            "heldout": task.train is None,
        }
        for task in tasks
    }


if __name__ == "__main__":
    run_recipe(main, InstructionArguments, __doc__, DEFAULTS)
