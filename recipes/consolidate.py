"""Put a sharded checkpoint together: one file that PEFT or transformers loads.

Under an accelerate config with sharded state dicts each process writes its own part of a
checkpoint, fast and without gathering anything. Training goes on from such parts as they are, also
with another number of processes; to use a checkpoint otherwise, its weights have to be in one file.
(What a run leaves at its end is whole under every config.)

    python recipes/consolidate.py runs/lora_sft/checkpoint-20
    python recipes/consolidate.py runs/lora_sft/checkpoint-20 --output step20

Reading the parts unpickles an index that torch wrote, so use it on your own checkpoints only.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from recipelib.runtime import UserError


def consolidate(checkpoint: str, output: str | None = None) -> Path:
    """Write the weights of a sharded checkpoint into one safetensors file.

    Args:
        checkpoint: a `checkpoint-N` folder.
        output: the folder to write to; the checkpoint itself by default.
    Returns:
        The file: `adapter_model.safetensors`, or `model.safetensors` where a whole model was tuned.
    Raises:
        UserError: no checkpoint, one that is not whole, or one that is not sharded.
    """
    from recipelib.runtime import checkpoint_kind, clear_model, is_whole

    source = Path(checkpoint)
    target = Path(output) if output else source
    if not is_whole(source):
        raise UserError(
            f"{checkpoint}: no whole checkpoint (its trainer_state.json is missing or cut short); "
            "pass a checkpoint-N folder of a run"
        )
    kind = checkpoint_kind(source)
    if kind == "pipeline":
        raise UserError(
            f"{checkpoint}: of a pipeline; recipes/gpipe_sft.py goes on from it with "
            "--resume_from_checkpoint, and what it leaves at its end is whole"
        )
    if kind != "sharded":
        raise UserError(f"{checkpoint}: not sharded: its weights are in one file already")
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if (target / "metrics.json").exists():
        raise UserError(f"--output {output}: holds a run; name another folder")

    from accelerate.utils import merge_fsdp_weights

    adapter = (source / "adapter_config.json").is_file()
    file = target / ("adapter_model.safetensors" if adapter else "model.safetensors")
    target.mkdir(parents=True, exist_ok=True)
    if target != source:  # with the tokenizer, and where answers end
        clear_model(target)
        for pattern in ("*config.json", "tokenizer.json", "*.jinja", "*/*.jinja"):
            for found in source.glob(pattern):
                copy = target / found.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(found, copy)
    # Beside the target, and moved at the end: half of a file never carries its name.
    with tempfile.TemporaryDirectory(dir=target, prefix="consolidating-") as folder:
        merge_fsdp_weights(source / "pytorch_model_fsdp_0", folder)
        os.replace(Path(folder) / "model.safetensors", file)
    return file


def main(argv: list[str] | None = None) -> None:
    """Read the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the checkpoint-N folder of a run")
    parser.add_argument("--output", help="the folder to write to; the checkpoint itself by default")
    args = parser.parse_args(argv)
    try:
        print(f"written: {consolidate(args.checkpoint, args.output)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
