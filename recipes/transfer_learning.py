"""Transfer learning: train the top of a pre-trained model and leave the rest as it is.

`--mode freeze` trains the last layers (ULMFiT, Howard and Ruder 2018, arXiv:1801.06146). The frozen
ones compute the same in every pass: they are run once, and what they put out is kept on disk.
`--mode features` runs the model once and trains a small one on its states.

Choose it where time or memory is short: above frozen layers a pass takes a fraction of the time,
and features take one pass. Choose LoRA for a task that is far from what the model was trained on.

    accelerate launch recipes/transfer_learning.py --train_layers 5
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/transfer_learning.py
    accelerate launch recipes/transfer_learning.py --peft lora --learning_rate 5e-4
    accelerate launch recipes/transfer_learning.py --mode features --probe all
"""

from dataclasses import dataclass
from functools import partial

from recipelib.cli import RecipeArguments, option, owns_output_dir, run_recipe
from recipelib.runtime import UserError

DEFAULTS = {
    "output_dir": "runs/transfer_learning",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "batch_rebalance",
}
PROBES = ["logistic", "svm", "boosting", "neighbors", "mlp"]
freezing = partial(option, needs="--mode freeze")
featuring = partial(option, needs="--mode features")


@dataclass
class TransferArguments(RecipeArguments):
    """Arguments of this method."""

    mode: str = option(
        "freeze", "freeze: train the top; features: a small model.", choices=["freeze", "features"]
    )
    train_layers: int | None = freezing(None, "train the last N layers; else a sixth.", least=0)
    freeze_layers: int | None = freezing(None, "or freeze the first N.", least=0)
    trains = property(lambda self: self.mode == "freeze")
    train_modules: list[str] | None = freezing(None, "or what has these dotted parts: layers.29.")
    train_embeddings: bool = freezing(False, "the embeddings, too: then no layer is frozen below.")
    train_norms: bool = freezing(False, "the norms of frozen layers, too; likewise.")
    train_head: bool = freezing(False, "the head, too; it is untied from the embeddings.")
    layer_decay: float = freezing(
        1.0, "a layer's rate is so many times that of the layer above: 0.8 to 0.95.", least=0
    )
    unfreeze_every: int | None = freezing(
        None, "begin with the last layer, and train one more every so many steps.", least=1
    )
    peft: str | None = freezing(
        None, "lora or bottleneck adapters in the layers instead.", choices=["lora", "bottleneck"]
    )
    head: str = freezing(
        "words", "words: as the template answers; classifier: new.", choices=["words", "classifier"]
    )
    cache: bool = option(True, "Keep what frozen layers compute; false: compute it in each pass.")
    cache_dtype: str | None = freezing(
        None, "its precision; bfloat16 takes half.", choices=["float32", "bfloat16", "float16"]
    )
    cache_dir: str | None = option(None, "Its folder; else that of prepared rows.")
    clear_cache: bool = option(False, "First delete what all runs have kept there.")
    layer: str = featuring("all", "the states behind layer N (0: embeddings); all: of the best.")
    pooling: str | None = featuring(
        None, "of a text's tokens: mean, last, cls (first), max; last, or mean if masked.",
        choices=["mean", "last", "cls", "max"],
    )  # fmt: skip
    probe: str = featuring("logistic", "small model; all: the best.", choices=[*PROBES, "all"])

    def __post_init__(self):
        super().__post_init__()
        ways = ("train_layers", "freeze_layers", "train_modules")
        chosen = [name for name in ways if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise UserError(f"--{chosen[1]}: --{chosen[0]} says what is trained; leave one out")
        for name in ("train_modules", "train_embeddings", "train_norms", "train_head"):
            if self.peft and getattr(self, name):
                raise UserError(f"--{name}: with --peft adapters are trained; leave it out")


@owns_output_dir
def main(args: TransferArguments, training) -> dict | None:
    """Train the top of a model, or a small model on its states, and score it beside the untouched
    model.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from recipelib.activations import FrozenLayers
    from recipelib.adapters import adapt_layers
    from recipelib.models import load_model, top_layers, train_only
    from recipelib.reporting import preview, save_run
    from recipelib.task import load_class_task, load_word_task
    from recipelib.training import GradualUnfreezing, keep_states, rates_by_depth, trainer_of

    if args.mode == "features" or args.head == "classifier":
        task = load_class_task(args, training, trains=args.mode == "freeze")
    else:
        task = load_word_task(args, training)
    if args.preview:
        return preview(task, args.preview)
    if args.mode == "features":
        return train_on_features(task, args, training)
    model = load_model(args, training, float32=not args.peft, **task.kind_of_model)
    layers = top_layers(model, args.train_layers, args.freeze_layers)
    if args.peft:
        model = adapt_layers(model, args.peft, layers, args.revision)
    else:
        train_only(model, layers, args)
    frozen = FrozenLayers.of(model)  # which compute the same in every pass
    cache = keep_states(frozen, model, task, args, training)
    thaw = [GradualUnfreezing(frozen, args.unfreeze_every, training)] if args.unfreeze_every else []
    rates = rates_by_depth(model, training.learning_rate, args.layer_decay)
    trainer = trainer_of(task)(model, training, task, rates=rates, cache=cache, callbacks=thaw)

    base = task.score(trainer.model, "base model")
    trainer.train()
    tuned = task.score(trainer.model, "tuned model")
    trainer.save_model()
    more = {**task.read_by, **(cache.figures if cache else {})}
    method = f"freeze and {args.peft}" if args.peft else "freeze"
    return save_run(trainer, task, base, tuned, method=method, more=more)


def train_on_features(task, args: TransferArguments, training) -> dict:
    """Run the model once, and train a small one on its states."""
    from recipelib.activations import FrozenLayers
    from recipelib.models import load_model, place_model
    from recipelib.probes import choose_probe
    from recipelib.reporting import save_features_run

    model = load_model(args, training, masked=task.masked, headless=True).requires_grad_(False)
    frozen = FrozenLayers.of(model)
    model = place_model(model, training)
    base = task.score_untouched(model)
    train, evaluation = task.features(model, frozen, args)  # states, pooled over tokens
    choice = choose_probe(train, task.class_numbers, args.probe, task.classes, training.seed)
    tuned = task.score_chosen(choice.probe.scores(evaluation[choice.layer]), "small model")
    return save_features_run(task, training, model, choice, base, tuned)


if __name__ == "__main__":
    run_recipe(main, TransferArguments, __doc__, DEFAULTS)
