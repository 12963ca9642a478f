"""What fits on some GPUs, and what is fastest: from a model's config alone, without its weights.

Compares, for all parameters and for LoRA, a whole model on each GPU (DDP), a share (FSDP2) and a
stage of a pipeline ("pipeline 4 x 2": 4 stages, each with 2 replicas); for all parameters also
shares in the CPU's memory (offloaded), for LoRA also a base in 4 bits (QLoRA).

    python recipes/plan.py
    python recipes/plan.py --model_name_or_path 8B --gpus 8
    python recipes/plan.py --model_name_or_path 70B --gpus 64 --gpu a100-80gb --batch 256
    python recipes/plan.py --model_name_or_path my_model --gpu rtx4090 --gpus 4 --length 2048

Memory of a GPU, in GiB: parameters, gradients, the optimizer's states, activations and logits. The
last two are those of one step that is computed with shapes instead of values. All parameters are
trained in float32 under bf16 autocast, 16 bytes each; LoRA's base has 2 bytes, in 4 bits 0.52.
  DDP       all of it on each GPU, and copies of the gradients that are sent
  FSDP2     1/N of parameters, gradients and states; whole are what lies outside the layers, and
            three layers
  pipeline  those of a stage's layers; activations of all micro-batches of a step (gpipe), or of as
            many as there are stages from this one on (1f1b)
A plan fits where that is at most 90 % of the GPU's memory: CUDA and NCCL need some, too.

Time of a step, with N GPUs, S stages, M micro-batches and P parameters:
  compute   operations / (the GPU's peak x --utilization); each token takes 2 P (the head's P only
            for the --supervised part) and 2 x layers x length x width for attention; the backward
            pass twice that, of frozen weights once; recomputing once more
  traffic   DDP 2 (N - 1)/N x the gradients, once; FSDP2 (N - 1)/N x (all weights twice, and the
            gradients), for each micro-batch; a pipeline sends batch x length x hidden size on and
            back. Bandwidths are taken at 80 %; GPUs of a node share their network adapters
  waited    of the traffic, what exceeds that which is computed meanwhile: DDP the last backward
            pass, FSDP2 and a pipeline the whole micro-batch
  bubble    (S - 1)/(M + S - 1) of a pipeline's time

Not counted: what optimizers compute (with offloading that is much, on the CPU), loading of rows,
kernels that start slowly on few tokens. A mixture of experts counts as if all were computed.
"""

import argparse
import sys
from dataclasses import fields, replace

from recipelib.runtime import UserError


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out is left out."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--model_name_or_path",
        default=None,
        help="hub id, folder with a config.json, or 8B or 70B for Llama 3.1's [the bundled model]",
    )
    parser.add_argument("--gpus", type=int, help="how many in all [8]")
    parser.add_argument("--gpus_per_node", type=int, help="how many of them in one node [8]")
    parser.add_argument(
        "--gpu", default="h100", help="h100, h200, a100-80gb, a100-40gb, l40s or rtx4090 [h100]"
    )
    for name, meaning in {
        "memory_gib": "memory, GiB",
        "tflops": "peak in bfloat16, 1e12 operations a second",
        "link_gbs": "bandwidth within a node, one way, 1e9 bytes a second",
        "network_gbs": "its share of the bandwidth between nodes, likewise",
    }.items():
        parser.add_argument(f"--{name}", type=float, help=f"{meaning} [that of --gpu]")
    parser.add_argument("--length", type=int, help="tokens of a row [1024]")
    parser.add_argument("--batch", type=int, help="rows of a step, on all GPUs together [64]")
    parser.add_argument("--micro_batch", type=int, help="rows of a forward pass [1]")
    parser.add_argument("--supervised", type=float, help="part of the tokens with a loss [0.5]")
    parser.add_argument("--r", type=int, help="LoRA's rank [16]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="[bfloat16]")
    parser.add_argument("--optim", help="the optimizer, as the trainer names it [adamw_torch]")
    parser.add_argument(
        "--activation_checkpointing", action="store_true", help="layers are computed twice"
    )
    parser.add_argument("--schedule", choices=["gpipe", "1f1b"], help="of pipelines [1f1b]")
    parser.add_argument("--utilization", type=float, help="part of the peak that is reached [0.4]")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> None:
    """Print the table of strategies, and the fastest of those that fit.

    Raises:
        UserError: a number that makes no sense, an unknown GPU, or a model without a config.
    """
    # Imported here, so that --help answers at once.
    from recipelib.models import describe_model
    from recipelib.planning import (
        GPUS,
        USABLE,
        Gpu,
        Workload,
        answer,
        compare_strategies,
        read_config,
        show_plans,
    )

    given = vars(args)
    if args.gpu not in GPUS:
        raise UserError(f"--gpu {args.gpu}: not known; one of {', '.join(GPUS)}")
    own = {one.name: given[one.name] for one in fields(Gpu) if one.name in given}
    if wrong := [name for name, value in own.items() if not value > 0]:
        raise UserError(f"--{wrong[0]} {own[wrong[0]]:g}: must be above 0")
    gpu = replace(GPUS[args.gpu], **own)
    work = Workload(**{one.name: given[one.name] for one in fields(Workload) if one.name in given})
    config = read_config(args.model_name_or_path)

    plans = compare_strategies(config, work, gpu)
    name = describe_model(args.model_name_or_path)
    title = (
        f"{name} on {work.gpus} x {args.gpu} ({gpu.memory_gib:g} GiB), {work.dtype}, "
        f"{work.batch} rows of {work.length:,} tokens a step"
    )
    show_plans(title, plans)
    print(answer(plans, USABLE * gpu.memory_gib))


def main(argv: list[str] | None = None) -> None:
    """Read the command line; a user's mistake ends in one line and exit code 2."""
    try:
        plan(arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
