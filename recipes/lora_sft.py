"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

The model stays frozen; beside the W of each linear layer a product of two thin matrices is trained:
y = W x + (alpha / r) B A x. A starts Gaussian and B zero, so training begins at exactly the base
model. Afterwards B A can be added into W, and the tuned model is as fast as the base.

Choose it when one model serves many tasks, or when tuning all parameters does not fit: it trains
a few percent of them, usually to the same score. With a lot of data full tuning can learn more.

    accelerate launch recipes/lora_sft.py
    accelerate launch recipes/lora_sft.py --template sst2 --max_train_samples 800 --merge true
    accelerate launch recipes/lora_sft.py --template my_task.yaml --dataset rows.jsonl --preview 3
"""

import shutil
import time
from dataclasses import dataclass

from common.arguments import RecipeArguments, option, require_at_least, run_recipe

DEFAULTS = {
    "output_dir": "runs/lora_sft",
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
}

LOAD_SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {adapter!r})
tokenizer = AutoTokenizer.from_pretrained({adapter!r})
"""


@dataclass
class LoraArguments(RecipeArguments):
    """Arguments of this method."""

    r: int = option(16, "Rank of the update: 8 to 64; more data bears more.")
    alpha: int = option(32, "The update is scaled by alpha / r; twice r is a common start.")
    lora_dropout: float = option(0.0, "Dropout on the update's input: 0.05 to 0.1 for few rows.")
    target_modules: list[str] = option(
        ["all-linear"], "Layers to adapt: all-linear (without the head), or names: q_proj v_proj."
    )
    rslora: bool = option(
        False, "Scale by alpha / sqrt(r): stable at high ranks (Kalajdzievski 2023)."
    )
    dora: bool = option(
        False, "Learn magnitude apart from direction: better at low ranks, slower (Liu 2024)."
    )
    pissa: bool = option(
        False, "Start at W's principal directions; saved as plain LoRA of rank 2r (Meng 2024)."
    )
    loraplus_ratio: float | None = option(
        None, "LoRA+: B learns so many times faster than A; the paper's is 16 (Hayou 2024)."
    )
    merge: bool = option(False, "Also write the merged model to OUTPUT_DIR/merged.")

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, r=1, alpha=1, lora_dropout=0, loraplus_ratio=0)


def main(args: LoraArguments, training) -> dict | None:
    """Train a LoRA adapter and score it beside the base model.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from torch.optim import AdamW
    from transformers import set_seed

    from common.checkpoints import find_checkpoint
    from common.data import load_splits, overlap, parse_columns
    from common.encoding import PromptEncoder, encode_rows
    from common.evaluation import evaluate_task
    from common.launch import progress, say
    from common.models import describe_model, load_model, load_tokenizer, require_modules
    from common.predicting import answer_file
    from common.report import MemoryMeter
    from common.results import preview, publish, save_run, show_plan
    from common.template import PromptTemplate
    from common.trainer import RecipeTrainer

    if args.predict:
        return answer_file(args, training)
    model_name, output_dir = args.model_name_or_path, training.output_dir
    load = {"revision": args.revision, "trust_remote_code": training.trust_remote_code}

    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    train, evaluation = load_splits(template, args, training.seed, progress=progress("checking"))
    if shared := overlap(train, evaluation, template):
        say(f"warning: {shared} evaluation rows are training rows too; the score will flatter")
    tokenizer = load_tokenizer(model_name, **load)
    encoder = PromptEncoder(
        template, tokenizer, training.max_length, args.rendering, args.chat_template_kwargs
    )
    encoded = encode_rows(encoder, train.rows, seed=training.seed, progress=progress("encoding"))
    if args.preview:
        return preview(encoded, tokenizer, args.preview)

    checkpoint = find_checkpoint(output_dir, training.resume_from_checkpoint)
    memory = MemoryMeter()
    model = load_model(
        model_name,
        dtype=training.model_dtype[0],
        attn_implementation=args.attn_implementation,
        **load,
    ).to(training.device)
    target_modules = args.target_modules
    if target_modules == ["all-linear"]:
        target_modules = "all-linear"
    else:
        require_modules(model, target_modules)
    budget = {"max_new_tokens": args.max_new_tokens, "batch_tokens": args.eval_batch_tokens}
    base = evaluate_task(model, encoder, evaluation.rows, description="scoring base", **budget)
    say(f"base model: {base}")

    # y = W x + (alpha / r) B A x
    lora = LoraConfig(
        r=args.r,
        lora_alpha=args.alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_modules,
        init_lora_weights="pissa" if args.pissa else "gaussian",
        use_rslora=args.rslora,
        use_dora=args.dora,
        task_type="CAUSAL_LM",
    )
    set_seed(training.seed)
    model = get_peft_model(model, lora)
    if args.pissa:
        save_start(model, output_dir)
    optimizer = None
    if args.loraplus_ratio:
        optimizer = create_loraplus_optimizer(
            model,
            AdamW,
            lr=training.learning_rate,
            loraplus_lr_ratio=args.loraplus_ratio,
            weight_decay=training.weight_decay,
        )
    held_out = None
    if training.eval_strategy != "no":  # the loss on the evaluation rows, while training
        held_out = Dataset.from_list(encode_rows(encoder, evaluation.rows).examples)
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(encoded.examples),
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    name = describe_model(model_name)
    show_plan(name, model, encoded, training, {"train": train.source, "eval": evaluation.source})
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start

    tuned = evaluate_task(model, encoder, evaluation.rows, description="scoring tuned", **budget)
    if args.pissa:
        save_as_lora(model, output_dir)
    else:
        trainer.save_model(output_dir)
    metrics = save_run(
        trainer,
        encoder,
        encoded,
        base,
        tuned,
        method="lora",
        model_name=name,
        load_snippet=LOAD_SNIPPET.format(
            base=model.get_base_model().name_or_path, adapter=output_dir
        ),
        peak_memory_bytes=memory.stop(),
        train_seconds=seconds,
        skipped_rows=train.skipped,
    )
    if args.merge:
        model.merge_and_unload().save_pretrained(f"{output_dir}/merged")
        tokenizer.save_pretrained(f"{output_dir}/merged")
        say(f"merged model: {output_dir}/merged")
    if training.publish:
        publish(output_dir, training)
    return metrics


def save_start(model, output_dir: str) -> None:
    """Keep the adapter that PiSSA starts from, of which it has taken the product out of W."""
    config = model.peft_config["default"]
    method, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(f"{output_dir}/pissa_start")
    config.init_lora_weights = method


def save_as_lora(model, output_dir: str) -> None:
    """Save PiSSA's adapter less its start: a plain LoRA of rank 2r that fits the untouched base."""
    start = f"{output_dir}/pissa_start"
    model.save_pretrained(output_dir, path_initial_model_for_weight_conversion=start)
    shutil.rmtree(start)


if __name__ == "__main__":
    run_recipe(main, LoraArguments, __doc__, DEFAULTS)
