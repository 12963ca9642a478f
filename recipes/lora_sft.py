"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

The model stays frozen; beside the W of each linear layer a product of two thin matrices is trained:
y = W x + (alpha / r) B A x. A starts Gaussian and B zero, so training begins at exactly the base
model. Afterwards B A can be added into W, and the tuned model is as fast as the base.

Choose it when one model serves many tasks, or when tuning all parameters does not fit: it trains
a few percent of them, usually to the same score. With a lot of data full tuning can learn more.

    accelerate launch recipes/lora_sft.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/lora_sft.py
    accelerate launch recipes/lora_sft.py --template sst2 --max_train_samples 800 --merge true
    accelerate launch recipes/lora_sft.py --template my_task.yaml --dataset rows.jsonl --preview 3
"""

import shutil
import time
from dataclasses import dataclass

from recipelib.cli import RecipeArguments, option, run_recipe
from recipelib.runtime.errors import UserError, require_at_least

DEFAULTS = {
    "output_dir": "runs/lora_sft",
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 2,
    # 8 rows a step, in 4 parts of similar length: little padding, whatever the lengths.
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "train_sampling_strategy": "batch_rebalance",
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
    load_in_4bit: bool = option(
        False, "QLoRA: the frozen base in 4 bits; a quarter of bf16's memory (Dettmers 2023)."
    )
    merge: bool = option(False, "Also write the merged model to OUTPUT_DIR/merged.")

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, r=1, alpha=1, lora_dropout=0, loraplus_ratio=0)
        if self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: must be below 1")
        if self.pissa and self.load_in_4bit:
            raise UserError("--pissa: starts from the full weights; leave out it or --load_in_4bit")


def main(args: LoraArguments, training) -> dict | None:
    """Train a LoRA adapter and score it beside the base model.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from torch.optim import AdamW
    from transformers import set_seed

    from recipelib.data.rows import load_splits, overlap, parse_columns
    from recipelib.encoding.examples import encode_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.evaluation.evaluation import evaluate_task
    from recipelib.models.loading import describe_model, load_model, load_tokenizer, require_modules
    from recipelib.models.quantization import four_bit_loading, require_unquantized
    from recipelib.prompts.template import PromptTemplate
    from recipelib.reporting.card import publish
    from recipelib.reporting.predicting import answer_file
    from recipelib.reporting.preview import preview
    from recipelib.reporting.run import save_run
    from recipelib.runtime.checkpoints import check_adapter, find_checkpoint
    from recipelib.runtime.console import is_main_process, progress, say
    from recipelib.training.memory import MemoryMeter, estimate_memory
    from recipelib.training.plan import show_plan
    from recipelib.training.trainer import RecipeTrainer

    if args.predict:
        return answer_file(args, training)
    model_name, output_dir = args.model_name_or_path, training.output_dir
    load = {"revision": args.revision, "trust_remote_code": training.trust_remote_code}
    quantized = {}
    if args.load_in_4bit:
        require_unquantized(model_name, args.revision)
        quantized = four_bit_loading(training)

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
        **quantized,
    )
    target_modules = args.target_modules
    if target_modules == ["all-linear"]:
        target_modules = "all-linear"
    else:
        require_modules(model, target_modules)

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
    model = get_peft_model(model, lora, revision=args.revision)
    check_adapter(checkpoint, model)
    if args.pissa and is_main_process():
        save_start(model, output_dir)
    held_out = None
    if training.eval_strategy != "no":  # the loss on the evaluation rows, while training
        held_out = Dataset.from_list(encode_rows(encoder, evaluation.rows).examples)
    trainer = RecipeTrainer(
        model,
        training,
        train_dataset=Dataset.from_list(encoded.examples),
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    if args.loraplus_ratio:
        trainer.optimizer = create_loraplus_optimizer(
            model,
            AdamW,
            lr=training.learning_rate,
            loraplus_lr_ratio=args.loraplus_ratio,
            loraplus_weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
        )
    estimated = estimate_memory(model, training, encoded.examples)
    model = trainer.shard()
    budget = {"max_new_tokens": args.max_new_tokens, "batch_tokens": args.eval_batch_tokens}
    base = evaluate_task(model, encoder, evaluation.rows, description="scoring base", **budget)
    say(f"base model: {base}")
    name = describe_model(model_name)
    sources = {"train": train.source, "eval": evaluation.source}
    show_plan(name, model, encoded, training, sources, estimated)
    memory.restart()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    peak = memory.stop()

    tuned = evaluate_task(model, encoder, evaluation.rows, description="scoring tuned", **budget)
    trainer.save_model(output_dir)
    if args.pissa and is_main_process():
        save_as_lora(output_dir)
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
        estimated=estimated,
        peak_memory_bytes=peak,
        peak_resident_bytes=memory.resident,
        train_seconds=seconds,
        skipped_rows=train.skipped,
    )
    if args.merge and is_main_process():  # into the base as it is on disk: here it may be sharded
        whole = load_model(model_name, dtype=training.model_dtype[0], **load)
        whole = PeftModel.from_pretrained(whole, output_dir).merge_and_unload()
        whole.save_pretrained(f"{output_dir}/merged")
        tokenizer.save_pretrained(f"{output_dir}/merged")
        say(f"merged model: {output_dir}/merged")
    if training.publish:
        publish(output_dir, training)
    return metrics


def save_start(model, output_dir: str) -> None:
    """Keep the adapter that PiSSA starts from, of which it has taken the product out of W."""
    model.save_pretrained(f"{output_dir}/pissa_start")


def save_as_lora(output_dir: str) -> None:
    """Make PiSSA's saved adapter a plain LoRA of rank 2r that fits the untouched base:
    W' + s B A = W + s (B A - B0 A0) with W' = W - s B0 A0, so A0 goes below A and -B0 beside B.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    file, start = f"{output_dir}/adapter_model.safetensors", f"{output_dir}/pissa_start"
    trained, first = load_file(file), load_file(f"{start}/adapter_model.safetensors")
    for name, weight in trained.items():
        if ".lora_A." in name:
            trained[name] = torch.cat([weight, first[name]])
        elif ".lora_B." in name:
            trained[name] = torch.cat([weight, -first[name]], dim=1)
    save_file(trained, file, {"format": "pt"})
    config = LoraConfig.from_pretrained(output_dir)
    config.init_lora_weights, config.r = True, 2 * config.r
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the scale s stays
    config.save_pretrained(output_dir)
    shutil.rmtree(start)


if __name__ == "__main__":
    run_recipe(main, LoraArguments, __doc__, DEFAULTS)
