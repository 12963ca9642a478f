"""Show which rows each process sees in each epoch and step, without training anything.

The recipes' own samplers deal out rows by number, once for each process; beside them torch's
DistributedSampler does. A star marks a row that this epoch has seen before: it makes shares even.
A bar parts the batches that are accumulated in one step. --packing lays the rows of a batch end to
end and changes nothing here.

    python recipes/show_epoch.py --num_processes 3 --rows 10 --epochs 2
    python recipes/show_epoch.py --num_processes 2 --rows 20 --gradient_accumulation_steps 2 \\
        --train_sampling_strategy batch_rebalance
    python recipes/show_epoch.py --num_processes 3 --rows 10 --dataloader_drop_last true
    python recipes/show_epoch.py --num_processes 2 --rows 10 --streaming_files 4
"""

import argparse
import random
import sys
from functools import partial
from itertools import islice
from types import SimpleNamespace

from recipelib.runtime import UserError, require_at_least

STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance"]
OPTIONS = {
    "num_processes": (2, "Processes, usually one for each GPU"),
    "rows": (10, "Rows of the data set"),
    "epochs": (2, "Epochs to show; of a stream how often its rows are read"),
    "per_device_train_batch_size": (2, "Rows of a batch"),
    "gradient_accumulation_steps": (1, "Batches of a step in each process"),
    "seed": (42, "Draws the order, and the lengths of rows that are drawn by length"),
    "streaming_files": (0, "As --streaming true reads so many files; 0: rows as usual"),
}
# What else the trainer's arguments hold, of which nothing shows here.
LOADING = {
    "data_seed": None,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": None,
    "dataloader_prefetch_factor": None,
    "dataloader_in_order": True,
    "dataloader_pin_memory": False,
}
Batches = list[list[int]]  # of one process


def dealt(args: argparse.Namespace, lengths: list[int]) -> list[list[Batches]]:
    """[epochs][processes] the batches that the recipes' trainers take."""
    from recipelib.training import training_batches

    training = SimpleNamespace(**{**LOADING, **vars(args)})
    share = partial(training_batches, range(args.rows), lengths, training, list)
    size, processes = args.per_device_train_batch_size, args.num_processes
    loaders = [share(size=size, processes=processes, process=rank) for rank in range(processes)]
    epochs = []
    for epoch in range(args.epochs):
        for loader in loaders:
            loader.set_epoch(epoch)
        epochs.append([list(loader) for loader in loaders])
    return epochs


def dealt_by_torch(args: argparse.Namespace) -> list[list[Batches]]:
    """[epochs][processes] the batches of torch's `DistributedSampler`."""
    from torch.utils.data import BatchSampler, DistributedSampler

    size, drop_last = args.per_device_train_batch_size, args.dataloader_drop_last
    epochs = [[] for _ in range(args.epochs)]
    for rank in range(args.num_processes):
        own = DistributedSampler(
            range(args.rows), args.num_processes, rank, seed=args.seed, drop_last=drop_last
        )
        for epoch, batches in enumerate(epochs):
            own.set_epoch(epoch)
            batches.append(list(BatchSampler(own, size, drop_last)))
    return epochs


def streamed(args: argparse.Namespace) -> list[Batches]:
    """[processes] the batches of a stream, for which one pass follows another."""
    from datasets import Dataset

    from recipelib.data import stream_passes, stream_share

    data = Dataset.from_dict({"row": range(args.rows)}).to_iterable_dataset(args.streaming_files)
    size, world, processes = args.per_device_train_batch_size, args.num_processes, []
    number = -(-args.epochs * args.rows // (size * world))
    for rank in range(world):
        own = islice(stream_passes(stream_share(data, args.seed, rank, world)), number * size)
        rows = [row["row"] for row in own]
        processes.append([rows[start : start + size] for start in range(0, len(rows), size)])
    return processes


def show(name: str, processes: list[Batches], accumulated: int, *, stars: bool = True) -> None:
    """Print a line for each step, with a column for each process."""
    steps, seen, again = {}, set(), 0
    for number in range(max(map(len, processes))):  # the batches in the order of time
        step = steps.setdefault(number // accumulated, [[] for _ in processes])
        for own, batches in zip(step, processes, strict=True):
            texts = []
            for row in batches[number] if number < len(batches) else ():
                texts.append(f"{row}{'*' if stars and row in seen else ''}")
                again += row in seen
                seen.add(row)
            own.append(" ".join(texts))
    table = {name: [f"process {rank}" for rank in range(len(processes))]}
    for step, cells in steps.items():
        table[f"  step {step + 1}"] = [" | ".join(cell) for cell in cells]
    wide = 3 + max(len(cell) for cells in table.values() for cell in cells)
    for head, cells in table.items():
        print(f"{head:14}{''.join(f'{cell:{wide}}' for cell in cells)}".rstrip())
    print(f"  {len(seen)} rows" + (f", {again} repeated" if stars and again else ""))


def main(argv: list[str] | None = None) -> None:
    """Read the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} [{default}].")
    parser.add_argument("--train_sampling_strategy", choices=STRATEGIES, default="random")
    flag = {"type": {"true": True, "false": False}.get, "choices": [True, False]}
    flag |= {"metavar": "true", "default": False, "nargs": "?", "const": True}
    meaning = "Leave out what does not fill a batch of each process [false]."
    parser.add_argument("--dataloader_drop_last", help=meaning, **flag)
    args = parser.parse_args(argv)
    try:
        least = {name: 0 if name in ("seed", "streaming_files") else 1 for name in OPTIONS}
        require_at_least(args, **least)
        accumulated = args.gradient_accumulation_steps
        if args.streaming_files:
            return show("recipes", streamed(args), accumulated, stars=False)
        draw = random.Random(args.seed)
        lengths = [draw.randint(5, 60) for _ in range(args.rows)]
        if args.train_sampling_strategy in STRATEGIES[2:]:
            print("tokens:", ", ".join(f"{row}: {tokens}" for row, tokens in enumerate(lengths)))
        both = zip(dealt(args, lengths), dealt_by_torch(args), strict=True)
        for epoch, (ours, torchs) in enumerate(both):
            print(f"epoch {epoch + 1}")
            show("recipes", ours, accumulated)
            show("torch", torchs, accumulated)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
