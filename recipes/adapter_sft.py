"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751).

The model stays frozen; after the attention and the feed-forward sublayer of each layer stands a
small network that is trained: h + up(act(down(h))), with a bottleneck of m between down and up. It
starts near zero, so training begins near the base model.

Choose it when many tasks share one model, each with a few percent of its parameters, or to go on
with what AdapterHub's library has trained. Choose LoRA when speed counts once trained: LoRA can be
merged into the model, an adapter is not linear and computes its part at every token.

    accelerate launch recipes/adapter_sft.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/adapter_sft.py
    accelerate launch recipes/adapter_sft.py --placement ffn --top_layers 10
    accelerate launch recipes/adapter_sft.py --template sst2 --drop_adapters_below 5
    accelerate launch recipes/adapter_sft.py --adapter runs/adapter_sft --output_dir runs/more
"""

from contextlib import nullcontext
from dataclasses import dataclass

from recipelib.cli import RecipeArguments, adapter_option, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {
    "output_dir": "runs/adapter_sft",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 2,
    # 8 rows a step, in 4 parts of similar length: little padding, whatever the lengths.
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "train_sampling_strategy": "batch_rebalance",
}


@dataclass
class AdapterArguments(RecipeArguments):
    """Arguments of this method."""

    adapter: str | None = adapter_option()
    bottleneck_size: int = option(64, "Width m: 8 to 256; with more data it can be wider.", least=1)
    placement: str = option(
        "both",
        "After attention and feed-forward sublayer (Houlsby), or one of them, at half the size.",
        choices=["both", "ffn", "attention"],
    )
    adapter_input: str = option(
        "output",
        "What is read: the sublayer's output; with the residual added (Pfeiffer 2021: residual, "
        "with --placement ffn); or the sublayer's input, in parallel (He 2022).",
        choices=["output", "residual", "input"],
    )
    act: str = option("gelu", "The activation between down and up, as transformers names it.")
    scaling: str = option("1.0", "Factor of what is added; learned: one per adapter, trained.")
    adapter_dropout: float = option(
        0.0, "Dropout of what is added, for few rows.", least=0, below=1
    )
    init_weights: str = option(
        "near_identity",
        "near_identity: small random weights, as the paper; identity: exactly the base model.",
        choices=["near_identity", "identity"],
    )
    train_norms: bool = option(False, "Train the layer norms, too, as the paper, all in float32.")
    top_layers: int | None = option(None, "Adapters in so many layers at the top only.", least=1)
    target_modules: list[str] | None = option(
        None, "For models that are not known: the linear layers that end sublayers: o_proj fc2."
    )
    adapterhub: str | None = option(
        None, "Folder of an adapter that AdapterHub's adapters saved: start from it, as it is."
    )
    drop_adapters_below: int | None = option(
        None, "Also score and keep those from this layer on (AdapterDrop 2021).", least=1
    )
    load_in_4bit: bool = option(False, "The frozen base in 4 bits, as QLoRA (Dettmers 2023).")

    def __post_init__(self):
        super().__post_init__()
        own = ("bottleneck_size", "placement", "adapter_input", "act", "scaling", "init_weights")
        own += ("adapter_dropout", "train_norms", "top_layers", "target_modules")
        for name in own if self.adapterhub else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name}: an adapter of --adapterhub is as it is; leave it out")
        if self.target_modules and self.placement != "both":
            raise UserError("--placement: --target_modules names the places; leave one of them out")
        try:
            self.scaling = self.scaling if self.scaling == "learned" else float(self.scaling)
        except ValueError:
            raise UserError(f"--scaling {self.scaling}: pass a number, or learned") from None


@owns_output_dir
def main(args: AdapterArguments, training) -> dict | None:
    """Train bottleneck adapters and score them beside the base model.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from recipelib import adapters
    from recipelib.models import four_bit_loading, load_model
    from recipelib.reporting import preview, save_run
    from recipelib.task import load_task
    from recipelib.training import RecipeTrainer

    start = adapters.open_adapter(args, training, "BOTTLENECK")  # of --adapter
    # h + scaling * up(act(down(h))), after each sublayer; at first nearly h
    with adapters.errors_name_options():
        config = adapters.BottleneckConfig(
            bottleneck_size=args.bottleneck_size,
            placement=args.placement,
            adapter_input=args.adapter_input,
            act=args.act,
            scaling=args.scaling,
            dropout=args.adapter_dropout,
            init_weights=args.init_weights,
            train_norms=args.train_norms,
            target_modules=args.target_modules,
            task_type="CAUSAL_LM",
        )
    quantized = four_bit_loading(args, training) if args.load_in_4bit else {}
    task = load_task(args, training)  # template, tokenizer, checked and encoded rows
    if args.preview:
        return preview(task, args.preview)
    # PEFT adds adapters in float32, but trains norms in the model's dtype.
    model = load_model(args, training, float32=args.train_norms, **quantized)
    hub, top, below = args.adapterhub, args.top_layers, args.drop_adapters_below
    model = adapters.add_bottlenecks(model, start or config, hub, top, below, args.revision)
    trainer = RecipeTrainer(model, training, task)
    with nullcontext() if start else adapters.without_adapters(model):
        base = task.score(trainer.model, "adapter before" if start else "base model")
    trainer.train()
    tuned, more = task.score(trainer.model, "tuned model"), start.facts if start else {}
    trainer.save_model()
    adapters.save_own_code(training.output_dir)
    if below:
        with adapters.without_adapters(model, below) as count:
            rest = task.score(trainer.model, f"without {count} adapters below layer {below}")
        adapters.save_without_adapters_below(training.output_dir, below)
        figures = {"score": rest.score, "eval_seconds": rest.seconds}
        more |= {"dropped_adapters": {"below": below, "adapters": count, **figures}}
    return save_run(trainer, task, base, tuned, method="adapter", more=more)


if __name__ == "__main__":
    run_recipe(main, AdapterArguments, __doc__, DEFAULTS)
