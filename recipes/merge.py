"""Add a trained LoRA adapter into its base model: one whole model, as fast as the base.

A run leaves the adapter, a few megabytes that fit its base model. Merged, W + (alpha / r) B A takes
the place of each W, and plain transformers loads the result without PEFT. (Bottleneck adapters are
not linear and soft prompts no weights: neither can be merged.)

    python recipes/merge.py runs/lora_sft
    python recipes/merge.py runs/lora_sft --output merged --dtype bfloat16
"""

import argparse
import sys

from recipelib.runtime import UserError


def main(argv: list[str] | None = None) -> None:
    """Read the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="the folder of a run, or a hub id")
    parser.add_argument("--output", help="the folder to write to; ADAPTER/merged by default")
    parser.add_argument("--model_name_or_path", help="the base model, if it lies elsewhere now")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the merged weights; auto: as the base model was saved",
    )
    args = parser.parse_args(argv)
    try:
        from recipelib.adapters import merge_adapter

        output = args.output or f"{args.adapter}/merged"
        print(
            f"written: {merge_adapter(args.adapter, output, args.model_name_or_path, args.dtype)}"
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
