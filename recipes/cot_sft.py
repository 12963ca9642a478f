"""Chain-of-thought tuning: the model learns to reason before it answers (Wei et al. 2022,
arXiv:2201.11903, for prompts; Ho et al. 2022, arXiv:2212.10071, and Hsieh et al. 2023,
arXiv:2305.02301, for tuning).

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

import time
from dataclasses import dataclass

from recipelib.cli import RecipeArguments, option, run_recipe
from recipelib.runtime.errors import UserError, require_at_least

DEFAULTS = {
    "output_dir": "runs/cot_sft",
    "learning_rate": 1.5e-3,  # for few rows and a small model; 2e-5 or so with --full true
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 1.5,
    # Arithmetic is learned slowly: many small steps do better here than few large ones.
    "per_device_train_batch_size": 4,
}

TARGETS = ["rationale_answer", "answer_only", "answer_rationale", "mixed"]

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
class CotArguments(RecipeArguments):
    """Arguments of this method."""

    template: str = option(
        "word_problems", "The task, with a rationale: a name in data_templates/ or your own .yaml."
    )
    max_train_samples: int | None = option(
        300, "Train on a random draw of this many rows; -1: on all."
    )
    max_eval_samples: int | None = option(60, "Score a random draw of this many rows; -1: all.")
    target: str = option(
        "rationale_answer", "What is trained; the answer before or without the reason to compare.",
        choices=TARGETS,
    )  # fmt: skip
    rationale_instruction: str = option(
        "Solve the task step by step.", "With --target mixed: what asks for rationale and answer."
    )
    answer_instruction: str = option(
        "Give only the answer.", "With --target mixed: what asks for the bare answer."
    )
    max_new_tokens: int | None = option(
        None, "Longest text when scored; by default a quarter more than the longest trained one."
    )
    samples: int = option(
        1, "Also score by self-consistency: the majority of this many samples (Wang et al. 2023)."
    )
    temperature: float = option(0.7, "Of these samples.")
    full: bool = option(False, "Train all parameters instead of LoRA; lower --learning_rate.")
    r: int = option(16, "LoRA: rank of the update.")
    alpha: int = option(32, "LoRA: the update is scaled by alpha / r.")

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, samples=1, r=1, alpha=1)
        if not self.temperature > 0:
            raise UserError("--temperature: samples at 0 are all the same; raise it")


def main(args: CotArguments, training) -> dict | None:
    """Train on rationales and score the answers, beside the untouched model.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from recipelib.data.rows import load_splits, overlap, parse_columns
    from recipelib.encoding.examples import EncodedRows, encode_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.evaluation.evaluation import evaluate_task
    from recipelib.models.loading import describe_model, load_model, load_tokenizer
    from recipelib.prompts.template import PromptTemplate
    from recipelib.reporting.card import publish
    from recipelib.reporting.predicting import answer_file
    from recipelib.reporting.preview import preview
    from recipelib.reporting.run import save_run, say_wrong
    from recipelib.runtime.checkpoints import check_adapter, find_checkpoint
    from recipelib.runtime.console import is_main_process, progress, say
    from recipelib.runtime.files import write_jsonl
    from recipelib.training.memory import MemoryMeter, estimate_memory
    from recipelib.training.plan import show_plan
    from recipelib.training.trainer import RecipeTrainer

    if args.predict:
        return answer_file(args, training)
    model_name, output_dir = args.model_name_or_path, training.output_dir
    load = {"revision": args.revision, "trust_remote_code": training.trust_remote_code}

    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    trained, asked = targets(template, args)
    first = next(iter(asked.values()))
    if args.samples > 1 and first.label and not first.rationale:
        raise UserError(
            f"--samples {args.samples}: without its rationale {template.name} is answered by the "
            "likeliest label, which is always the same; leave it out"
        )
    train, evaluation = load_splits(template, args, training.seed, progress=progress("checking"))
    if shared := overlap(train, evaluation, template):
        say(f"warning: {shared} evaluation rows are training rows too; the score will flatter")
    if len(train.rows) < train.available:
        few = f"{len(train.rows):,} of {train.available:,}"
        say(f"training on {few} rows; --max_train_samples -1 takes all")
    tokenizer = load_tokenizer(model_name, **load)

    def encoder_of(one: PromptTemplate) -> PromptEncoder:
        return PromptEncoder(
            one, tokenizer, training.max_length, args.rendering, args.chat_template_kwargs
        )

    encoded = EncodedRows()
    for one in trained:
        encoded.extend(encode_rows(encoder_of(one), train.rows, seed=training.seed))
    if args.preview:
        return preview(encoded, tokenizer, args.preview)

    checkpoint = find_checkpoint(output_dir, training.resume_from_checkpoint)
    memory = MemoryMeter()
    # What is trained stays in float32; autocast or FSDP compute in less.
    model = load_model(
        model_name,
        dtype=torch.float32 if args.full else training.model_dtype[0],
        attn_implementation=args.attn_implementation,
        **load,
    )
    set_seed(training.seed)
    if not args.full:
        lora = LoraConfig(
            r=args.r,
            lora_alpha=args.alpha,
            target_modules="all-linear",
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, revision=args.revision)
    check_adapter(checkpoint, model)
    held_out = None
    if training.eval_strategy != "no":  # the loss on the evaluation rows, while training
        parts = [encode_rows(encoder_of(one), evaluation.rows) for one in trained]
        held_out = Dataset.from_list([example for part in parts for example in part.examples])
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(encoded.examples),
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    estimated = estimate_memory(model, training, encoded.examples)
    model = trainer.shard()
    encoders = {name: encoder_of(one) for name, one in asked.items()}
    max_new_tokens = args.max_new_tokens or encoded.longest_target * 5 // 4
    budget = {"max_new_tokens": max_new_tokens, "batch_tokens": args.eval_batch_tokens}

    def score(name: str, description: str, **options):
        return evaluate_task(
            model, encoders[name], evaluation.rows, description=description, **budget, **options
        )

    main_target, *others = asked
    base = score(main_target, "scoring base")
    say(f"base model: {base}")
    name = describe_model(model_name)
    sources = {"train": train.source, "eval": evaluation.source, "target": args.target}
    show_plan(name, model, encoded, training, sources, estimated)
    memory.restart()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    peak = memory.stop()

    tuned = score(main_target, "scoring tuned")
    more = {"target": args.target, "max_new_tokens": max_new_tokens}
    for other in others:  # of a mixed model also the bare answer
        result = score(other, f"scoring {other}")
        say(f"{other}: {result}")
        more[other] = {"score": result.score, "stderr": result.stderr}
    if args.samples > 1:
        draw = {"samples": args.samples, "temperature": args.temperature, "seed": training.seed}
        voted = score(main_target, f"scoring {args.samples} samples", **draw)
        say(f"majority of {args.samples} samples: {voted}")
        more["self_consistency"] = {"score": voted.score, "stderr": voted.stderr, **draw}
        if is_main_process():
            write_jsonl(f"{output_dir}/predictions_samples.jsonl", voted.records)
    trainer.save_model(output_dir)
    snippet = MODEL_SNIPPET if args.full else ADAPTER_SNIPPET
    metrics = save_run(
        trainer,
        encoders[main_target],
        encoded,
        base,
        tuned,
        method="cot full" if args.full else "cot lora",
        model_name=name,
        load_snippet=snippet.format(base=model.name_or_path, folder=output_dir),
        estimated=estimated,
        peak_memory_bytes=peak,
        peak_resident_bytes=memory.resident,
        train_seconds=seconds,
        skipped_rows=train.skipped,
        more=more,
    )
    say_wrong(tuned)
    if training.publish:
        publish(output_dir, training)
    return metrics


def targets(template, args: CotArguments) -> tuple[list, dict]:
    """The templates that are trained, and by their target those that are asked, the one that counts
    first: the task's own with its rationale moved or left out.

    Raises:
        UserError: the template has no rationale.
    """
    from recipelib.prompts.template import PromptTemplate

    fields = template.fields
    if "rationale" not in fields:
        raise UserError(
            f"{template.path}: rationale: is missing; say there where the reasoning comes from, or "
            "take recipes/lora_sft.py for the bare answer"
        )
    bare = {key: value for key, value in fields.items() if key != "rationale"}

    def instructed(fields: dict, instruction: str) -> PromptTemplate:
        system = f"{fields['system']}\n{instruction}" if "system" in fields else instruction
        return PromptTemplate({**fields, "system": system}, template.path)

    if args.target == "mixed":
        reasoned = instructed(fields, args.rationale_instruction)
        answered = instructed(bare, args.answer_instruction)
        return [reasoned, answered], {"rationale_answer": reasoned, "answer_only": answered}
    if args.target == "answer_rationale":
        # Asked for the answer only: what would follow is written after it and cannot change it.
        explained = f"{fields['answer']}\n{fields['rationale']['text'].lstrip(' ')}"
        explained = PromptTemplate({**bare, "answer": explained}, template.path)
        answered = PromptTemplate({**bare, "stop": ["\n", *template.stop]}, template.path)
        return [explained], {args.target: answered}
    one = PromptTemplate(bare, template.path) if args.target == "answer_only" else template
    return [one], {args.target: one}


if __name__ == "__main__":
    run_recipe(main, CotArguments, __doc__, DEFAULTS)
