"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

The model stays frozen; beside the W of each linear layer a product of two thin matrices is trained:
y = W x + (alpha / r) B A x. A starts Gaussian and B zero, so training begins at exactly the base
model. Afterwards B A can be added into W, and the tuned model is as fast as the base.

Choose it when one model serves many tasks, or when tuning all parameters does not fit: it trains
a few percent of them, usually to the same score. With a lot of data full tuning can learn more.
As long as the rank is enough for the data, LoRA learns as full tuning does if it adapts all layers,
the MLPs too, at about ten times full tuning's rate and in small batches (Schulman et al. 2025, LoRA
Without Regret), which are the defaults here.

    accelerate launch recipes/lora_sft.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/lora_sft.py
    accelerate launch recipes/lora_sft.py --template sst2 --max_train_samples 800 --r 8
    accelerate launch recipes/lora_sft.py --template my_task.yaml --dataset rows.jsonl --preview 3
    accelerate launch recipes/lora_sft.py --adapter runs/lora_sft --output_dir runs/more
    python recipes/merge.py runs/lora_sft
"""

from dataclasses import dataclass

from recipelib.cli import RecipeArguments, adapter_option, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {
    "output_dir": "runs/lora_sft",
    "learning_rate": 5e-4,  # ten times a usual one of full tuning; in short runs try more
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 2,
    # 8 rows a step, in 4 parts of similar length: little padding, whatever the lengths.
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "train_sampling_strategy": "batch_rebalance",
}


@dataclass
class LoraArguments(RecipeArguments):
    """Arguments of this method."""

    adapter: str | None = adapter_option()
    r: int = option(16, "Rank of the update: 8 to 64; with more data it can be higher.", least=1)
    alpha: int = option(
        32, "The update is scaled by alpha / r; twice r is a common start.", least=1
    )
    lora_dropout: float = option(
        0.0, "Dropout on the update's input: 0.05 to 0.1 for few rows.", least=0, below=1
    )
    target_modules: list[str] = option(
        ["all-linear"],
        "Layers to adapt: all-linear (all but the head), or names: q_proj v_proj, which learn less "
        "than with the MLPs, at any rank.",
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
        None,
        "LoRA+: B learns so many times faster than A; the paper's is 16 (Hayou 2024).",
        least=0,
    )
    load_in_4bit: bool = option(
        False, "QLoRA: the frozen base in 4 bits; a quarter of bf16's memory (Dettmers 2023)."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.pissa and self.load_in_4bit:
            raise UserError("--pissa: starts from the full weights; leave out it or --load_in_4bit")


@owns_output_dir
def main(args: LoraArguments, training) -> dict | None:
    """Train a LoRA adapter and score it beside the base model.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from peft import LoraConfig, get_peft_model

    from recipelib.adapters import open_adapter, save_as_lora, save_start
    from recipelib.models import four_bit_loading, layer_names, load_model, without_lora
    from recipelib.reporting import preview, save_run
    from recipelib.task import load_task
    from recipelib.training import RecipeTrainer

    start = open_adapter(args, training, "LORA")  # of --adapter
    quantized = four_bit_loading(args, training) if args.load_in_4bit else {}
    task = load_task(args, training)  # template, tokenizer, checked and encoded rows
    if args.preview:
        return preview(task, args.preview)
    model = load_model(args, training, float32=bool(start and start.trains_layers), **quantized)

    # y = W x + (alpha / r) B A x, with A Gaussian and B = 0: training starts at the base model.
    lora = LoraConfig(
        r=args.r,
        lora_alpha=args.alpha,
        lora_dropout=args.lora_dropout,
        target_modules=layer_names(model, args.target_modules),
        exclude_modules=without_lora(model),
        init_lora_weights="pissa" if args.pissa else "gaussian",
        use_rslora=args.rslora,
        use_dora=args.dora,
        task_type="CAUSAL_LM",
    )
    model = start.on(model) if start else get_peft_model(model, lora, revision=args.revision)
    if args.pissa:  # which has taken B A out of W
        save_start(model, training.output_dir)
    # LoRA+: B learns faster than A.
    ratio = args.loraplus_ratio
    rates = {} if ratio is None else {"lora_B": ratio * training.learning_rate}
    trainer = RecipeTrainer(model, training, task, rates=rates)

    base = task.score(trainer.model, "adapter before" if start else "base model")
    trainer.train()
    tuned = task.score(trainer.model, "tuned model")
    trainer.save_model()
    if args.pissa:
        save_as_lora(training.output_dir)
    return save_run(trainer, task, base, tuned, method="lora", more=start and start.facts)


if __name__ == "__main__":
    run_recipe(main, LoraArguments, __doc__, DEFAULTS)
