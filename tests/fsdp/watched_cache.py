"""transfer_learning.py, which notes beside its cache the shards that each process writes: in
CACHE_DIR/RUN-RANK. A run called so loses a shard before it begins.
"""

from pathlib import Path

import transfer_learning
from transfer_learning import DEFAULTS, TransferArguments

from recipelib.activations import StateCache
from recipelib.cli import run_recipe
from recipelib.inference import process_group
from recipelib.runtime import is_main_process

LOSES = "_without_one"


def main(args: TransferArguments, training) -> dict | None:
    """Run the recipe."""
    folder, run = Path(args.cache_dir), Path(training.output_dir).name
    if run.endswith(LOSES) and is_main_process():
        sorted(folder.glob("activations-*/states-*"))[5].unlink()
    write = StateCache._write

    def note(self, shard, states):
        with (folder / f"{run}-{process_group()[0]}").open("a") as file:
            print(shard, file=file)
        write(self, shard, states)

    StateCache._write = note
    try:
        return transfer_learning.main(args, training)
    finally:
        StateCache._write = write


if __name__ == "__main__":
    run_recipe(main, TransferArguments, __doc__, DEFAULTS)
