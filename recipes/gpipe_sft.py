"""GPipe: a pipeline of micro-batches over processes (Huang et al. 2018, arXiv:1811.06965).

The layers are cut into stages, one for each process, so that none holds the whole model, its
gradients or the optimizer's states. Each step's rows are cut into micro-batches that follow one
another through the stages, forward and then back; only the states between two stages are sent.

Choose it where a model does not fit into one GPU and the links between GPUs are slow: FSDP sends
all weights in each step. In (stages - 1) / (micro_batches + stages - 1) of a step a process waits.

    accelerate launch --config_file accelerate_configs/pipeline.yaml recipes/gpipe_sft.py
    torchrun --nproc_per_node 4 recipes/gpipe_sft.py --stages 2 --schedule 1f1b
    accelerate launch --config_file accelerate_configs/pipeline.yaml recipes/gpipe_sft.py \\
      --peft lora --learning_rate 5e-4 --micro_batches 16
    python recipes/plan.py --gpus 8 --model_name_or_path 8B
"""

from dataclasses import dataclass
from typing import ClassVar

from recipelib.cli import RecipeArguments, option, owns_output_dir, run_recipe

DEFAULTS = {
    "output_dir": "runs/gpipe_sft",
    "learning_rate": 1e-4,  # for a small model; 1e-5 for billions of parameters
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,  # rows of a micro-batch
    "train_sampling_strategy": "group_by_length",  # a step's rows are padded to one length
}


@dataclass
class GPipeArguments(RecipeArguments):
    """Arguments of this method."""

    checkpoints: ClassVar[str] = "pipeline"

    stages: int | None = option(
        None, "Processes of a pipeline; by default all. With twice as many there are two.", least=1
    )
    micro_batches: int = option(
        4, "Parts of a step; with four times the stages a process waits a fifth of it.", least=1
    )
    schedule: str = option(
        "gpipe",
        "gpipe: all forward, then all back (in the paper with --activation_checkpointing); 1f1b: "
        "in turn, which keeps fewer activations; interleaved: two stages in each process, half "
        "the bubble, twice the messages.",
        choices=["gpipe", "1f1b", "interleaved"],
    )
    peft: str | None = option(
        None, "lora: train adapters instead of all parameters.", choices=["lora"]
    )
    r: int = option(16, "Rank of the update.", least=1, needs="--peft lora")
    alpha: int = option(32, "The update is scaled by alpha / r.", least=1, needs="--peft lora")


@owns_output_dir
def main(args: GPipeArguments, training) -> dict | None:
    """Train a model whose layers stand in several processes, and score it beside the base model.

    Returns:
        What metrics.json holds; None after --preview.
    """
    # Imported here, so that --help answers at once.
    from peft import LoraConfig, get_peft_model

    from recipelib.pipeline import PipelineTrainer, Stages, check_pipeline, load_part
    from recipelib.reporting import preview, save_run
    from recipelib.task import load_task

    check_pipeline(args, training)
    task = load_task(args, training)  # template, tokenizer, checked and encoded rows
    if args.preview:
        return preview(task, args.preview)
    # Layers are cut by what they cost; this process loads its own, the others are only shapes.
    stages = Stages.of(args, training, task.encoded.counts)
    model = load_part(args, training, stages, float32=not args.peft)
    if args.peft:
        lora = LoraConfig(
            r=args.r,
            lora_alpha=args.alpha,
            target_modules="all-linear",
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora, revision=args.revision)
    trainer = PipelineTrainer(model, training, task, stages=stages, args=args)

    base = task.score(trainer.pipeline, "base model")
    trainer.train()
    tuned = task.score(trainer.pipeline, "tuned model")
    trainer.save_model()
    method = f"gpipe and {args.peft}" if args.peft else "gpipe"
    return save_run(trainer, task, base, tuned, method=method, more=trainer.pipeline_figures())


if __name__ == "__main__":
    run_recipe(main, GPipeArguments, __doc__, DEFAULTS)
