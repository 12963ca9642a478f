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
"""

import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipelib.cli import RecipeArguments, option, run_recipe
from recipelib.runtime.errors import UserError, require_at_least

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

LOAD_SNIPPET = """\
import peft_bottleneck  # a file of this folder: put it beside your script; PEFT learns the method
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {adapter!r})
tokenizer = AutoTokenizer.from_pretrained({adapter!r})
"""


@dataclass
class AdapterArguments(RecipeArguments):
    """Arguments of this method."""

    bottleneck_size: int = option(64, "Width m of the bottleneck: 8 to 256; more data bears more.")
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
    adapter_dropout: float = option(0.0, "Dropout of what is added: 0.05 to 0.1 for few rows.")
    init_weights: str = option(
        "near_identity",
        "near_identity: small random weights, as the paper; identity: exactly the base model.",
        choices=["near_identity", "identity"],
    )
    train_norms: bool = option(
        False, "Train the model's layer norms, too, as the paper; all weights are float32 then."
    )
    top_layers: int | None = option(
        None, "Adapters in so many layers at the top only: no backward pass below them."
    )
    target_modules: list[str] | None = option(
        None, "For models that are not known: the linear layers that end sublayers: o_proj fc2."
    )
    adapterhub: str | None = option(
        None, "Folder of an adapter that AdapterHub's adapters saved: start from it, as it is."
    )
    drop_adapters_below: int | None = option(
        None, "Also score without those below this layer, and keep that adapter (AdapterDrop 2021)."
    )
    load_in_4bit: bool = option(
        False, "The frozen base in 4 bits, as QLoRA: a quarter of bf16's memory (Dettmers 2023)."
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(
            self, bottleneck_size=1, adapter_dropout=0, top_layers=1, drop_adapters_below=1
        )
        if self.adapter_dropout >= 1:
            raise UserError(f"--adapter_dropout {self.adapter_dropout}: must be below 1")
        own = ("bottleneck_size", "placement", "adapter_input", "act", "scaling", "init_weights")
        own += ("adapter_dropout", "train_norms", "top_layers", "target_modules")
        for name in own if self.adapterhub else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name}: an adapter of --adapterhub is as it is; leave it out")
        if self.scaling != "learned":
            try:
                self.scaling = float(self.scaling)
            except ValueError:
                raise UserError(
                    f"--scaling {self.scaling}: pass a number, or the word learned"
                ) from None


def main(args: AdapterArguments, training) -> dict | None:
    """Train bottleneck adapters and score them beside the base model.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import set_seed

    from recipelib.adapters import bottleneck
    from recipelib.adapters.adapterhub import load_adapterhub
    from recipelib.data.rows import load_splits, overlap, parse_columns
    from recipelib.encoding.examples import encode_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.evaluation.evaluation import evaluate_task
    from recipelib.models.loading import describe_model, load_model, load_tokenizer, require_modules
    from recipelib.models.quantization import four_bit_loading, require_unquantized
    from recipelib.models.sharding import decoder_layers
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
    try:
        # h + scaling * up(act(down(h))), after each sublayer
        config = bottleneck.BottleneckConfig(
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
    except ValueError as error:
        raise UserError(f"--{error}") from None
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
    # PEFT adds adapters in float32, but trains norms in the model's dtype.
    model = load_model(
        model_name,
        dtype=torch.float32 if args.train_norms else training.model_dtype[0],
        attn_implementation=args.attn_implementation,
        **load,
        **quantized,
    )
    count = model.config.get_text_config().num_hidden_layers
    for name in ("top_layers", "drop_adapters_below"):
        if (getattr(args, name) or 0) >= count:
            raise UserError(f"--{name} {getattr(args, name)}: the model has {count} layers")
    lowest = count - (args.top_layers or count)
    if args.drop_adapters_below and args.drop_adapters_below <= lowest:
        raise UserError(
            f"--drop_adapters_below {args.drop_adapters_below}: the lowest adapters are those of "
            f"layer {lowest}"
        )
    if args.target_modules:
        require_modules(model, args.target_modules)

    if args.top_layers:
        config.layers_to_transform = [*range(lowest, count)]
    set_seed(training.seed)
    try:
        if args.adapterhub:
            model = load_adapterhub(
                model, args.adapterhub, task_type="CAUSAL_LM", revision=args.revision
            )
        else:
            model = get_peft_model(model, config, revision=args.revision)
    except ValueError as error:  # a model whose layers are not known
        names_option = str(error).startswith(("adapter_input", "target_modules"))
        raise UserError(f"--{'' if names_option else 'target_modules: '}{error}") from None
    check_adapter(checkpoint, model)
    if args.drop_adapters_below:
        with without_adapters(model, args.drop_adapters_below) as dropped:
            if not dropped:
                raise UserError("--drop_adapters_below: no adapter is in a layer with a number")
    if args.top_layers:
        # Where activations are recomputed, transformers asks for gradients down to the embeddings.
        decoder_layers(model)[lowest].register_forward_pre_hook(
            lambda layer, given: (given[0].detach(), *given[1:])
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
    )
    estimated = estimate_memory(model, training, encoded.examples)
    model = trainer.shard()
    budget = {"max_new_tokens": args.max_new_tokens, "batch_tokens": args.eval_batch_tokens}
    with without_adapters(model):
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
    more = {}
    if is_main_process():  # an earlier run's
        shutil.rmtree(f"{output_dir}/dropped", ignore_errors=True)
    if args.drop_adapters_below:
        with without_adapters(model, args.drop_adapters_below) as dropped:
            rest = evaluate_task(
                model, encoder, evaluation.rows, description="scoring dropped", **budget
            )
        say(f"without {dropped} adapters below layer {args.drop_adapters_below}: {rest}")
        say(f"scored in {rest.seconds:.1f} s, with all adapters in {tuned.seconds:.1f} s")
        more["dropped_adapters"] = {
            "below": args.drop_adapters_below,
            "adapters": dropped,
            "score": rest.score,
            "eval_seconds": rest.seconds,
        }
        if is_main_process():
            save_without_adapters_below(output_dir, args.drop_adapters_below)
    if is_main_process():
        shutil.copy(bottleneck.__file__, f"{output_dir}/peft_bottleneck.py")
    metrics = save_run(
        trainer,
        encoder,
        encoded,
        base,
        tuned,
        method="adapter",
        model_name=name,
        load_snippet=LOAD_SNIPPET.format(
            base=model.get_base_model().name_or_path, adapter=output_dir
        ),
        estimated=estimated,
        peak_memory_bytes=peak,
        peak_resident_bytes=memory.resident,
        train_seconds=seconds,
        skipped_rows=train.skipped,
        more=more,
    )
    if training.publish:
        publish(output_dir, training)
    return metrics


@contextmanager
def without_adapters(model, below: int | None = None):
    """The base model meanwhile, or only in the layers below a number: AdapterDrop (Rueckle et al.
    2021, arXiv:2010.11918). Gives the number of adapters that are passed over.
    """
    from recipelib.adapters.bottleneck import BottleneckLayer, layer_number

    adapters = [
        one
        for name, one in model.named_modules()
        if isinstance(one, BottleneckLayer)
        and (below is None or is_below(layer_number(name), below))
    ]
    for one in adapters:
        one.passed_over = True
    try:
        yield len(adapters)
    finally:
        for one in adapters:
            one.passed_over = False


def is_below(number: int | None, layer: int) -> bool:
    """Whether a layer is; what stands in none is not."""
    return number is not None and number < layer


def save_without_adapters_below(output_dir: str, layer: int) -> None:
    """Write the adapter without those of the lowest layers to OUTPUT_DIR/dropped, for PEFT."""
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    from recipelib.adapters.bottleneck import layer_number

    weights = load_file(f"{output_dir}/adapter_model.safetensors")
    kept = {
        name: one
        for name, one in weights.items()
        if ".bottleneck_" not in name or not is_below(layer_number(name), layer)
    }
    config = PeftConfig.from_pretrained(output_dir)
    config.layers_to_transform = sorted(
        {layer_number(name) for name in kept if ".bottleneck_" in name} - {None}
    )
    Path(output_dir, "dropped").mkdir(exist_ok=True)
    save_file(kept, f"{output_dir}/dropped/adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(f"{output_dir}/dropped")


if __name__ == "__main__":
    run_recipe(main, AdapterArguments, __doc__, DEFAULTS)
