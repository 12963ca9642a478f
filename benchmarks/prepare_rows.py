"""How fast rows are prepared: from a file of JSON lines to examples on disk, ours beside TRL's.

    python benchmarks/prepare_rows.py                     # about 15 minutes on two cores
    python benchmarks/prepare_rows.py --quick             # a tenth of the rows, one round
    python benchmarks/prepare_rows.py --data two_turns --processes 1

Three data sets of drawn words: conversations of two questions, conversations of forty, and short
reviews with a label. Beside the conversations stands what `SFTTrainer` does before it trains
(`assistant_only_loss`, a chat template with generation marks); beside the reviews a plain
`datasets.map` of the tokenizer over prompt and answer in one text, row by row and in batches. Ours
checks every row, renders and encodes it and masks the prompt; theirs read the file with
`load_dataset`.

Each run is a process of its own with an empty cache, then one with the cache that the first left:
the second start. Sides take turns; imports, the tokenizer's loading and the rest of TRL's trainer
do not count. Memory is the most that all processes of a side held together, shared pages counted
once (the sum of proportional set sizes, Linux only). A run fails unless both sides made equally
many tokens.

The last line is one JSON object; a `ratio` is our rows per second over theirs.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from measuring import (
    RunFailed,
    cores,
    in_turn,
    parser_of,
    require_least,
    run_arm,
    run_script,
    set_numbers,
    show_table,
)

from recipelib.runtime import versions, write_json, write_jsonl

FULL, QUICK = {"rounds": 3}, {"rounds": 1}
# The data sets: rows, questions of a conversation (0: a review), words of a question and an answer.
DATA = {
    "two_turns": (20_000, 2, 50, 120),
    "forty_turns": (2_000, 40, 20, 60),
    "reviews": (50_000, 0, 20, 0),
}
PEERS = {
    "two_turns": ["trl"],
    "forty_turns": ["trl"],
    "reviews": ["map", "map_in_batches"],
}
MAX_LENGTH = 8192
# ChatML; TRL needs to be told where the assistant's words begin and end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The benchmark's own command line."""
    parser = parser_of(__doc__, "a tenth of the rows, one round")
    parser.add_argument("--data", nargs="+", choices=list(DATA), help="data sets [all]")
    parser.add_argument("--processes", type=int, help="dataset_num_proc of both sides [the cores]")
    parser.add_argument("--rounds", type=int, help=f"runs of each side [{FULL['rounds']}]")
    parser.add_argument("--rows", type=int, help="rows of each data set [as many as above]")
    for name in ("file", "cache", "result"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    set_numbers(args, FULL, QUICK)
    args.processes = args.processes or cores()
    require_least(args, "processes", 1)
    require_least(args, "rows", 1)
    return args


def main(argv: list[str] | None = None) -> dict | None:
    """Measure all sides on all data sets."""
    args = parse_arguments(argv)
    if args.measure:
        return measure(args)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for data in args.data or list(DATA):
            results[data] = compare(data, args, Path(folder))
    summary = {"processes": args.processes, "data": results, "versions": versions()}
    for data, result in results.items():
        print_table(data, result, args.processes)
    print(json.dumps(summary))
    return summary


# The rows ----------------------------------------------------------------------------------------

WORDS = (
    "the a of to and in is it for on with as that this by from at are be or an which one some many "
    "list write give name find make describe explain short long word number city river friend "
    "teacher story question answer reason example first last good new small different every day "
    "morning water music color animal paper garden winter market letter window mountain"
)


def generate_rows(data: str, count: int) -> list[dict]:
    """Rows of drawn words, no two alike."""
    _, questions, asked, answered = DATA[data]
    draw, words = random.Random(f"prepare-{data}"), WORDS.split()

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(length // 2, length * 3 // 2)))

    if not questions:
        labels = ("negative", "positive")
        return [
            {"sentence": f"{text(asked)} {row}", "label": draw.choice(labels)}
            for row in range(count)
        ]
    return [
        {
            "messages": [
                {"role": role, "content": f"{text(length)} {row}."}
                for _ in range(questions)
                for role, length in (("user", asked), ("assistant", answered))
            ]
        }
        for row in range(count)
    ]


# One run, in a process of its own ----------------------------------------------------------------


class Held:
    """The most bytes that this process and its children held together, as a context."""

    def __enter__(self):
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._done.wait(0.2):
            held = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:  # it has ended
                    continue
            self.peak = max(self.peak, held)


def measure(args: argparse.Namespace) -> None:
    """Prepare `args.file` by one side, and write what was measured to `args.result`."""
    import logging

    logging.disable(logging.WARNING)
    from recipelib.models import load_tokenizer

    tokenizer = load_tokenizer(args.model_name_or_path)
    tokenizer.chat_template = CHAT_TEMPLATE
    prepare = {"ours": with_ours, "trl": with_trl}.get(args.measure, with_map)(args, tokenizer)
    with Held() as held:
        start = time.perf_counter()
        counted, besides = prepare()
        seconds = time.perf_counter() - start - besides
    tokens, supervised = counted()
    write_json(
        args.result,
        {
            "seconds": seconds,
            "memory_bytes": held.peak,
            "tokens": tokens,
            "supervised": supervised,
        },
    )


def with_ours(args: argparse.Namespace, tokenizer):
    """As a recipe does it: the rows checked, then encoded."""
    import datasets  # noqa: F401  imports do not count

    from recipelib.data.formats import template_for
    from recipelib.data.rows import load_rows
    from recipelib.encoding import PromptEncoder, encode_rows
    from recipelib.prompts import PromptTemplate
    from recipelib.runtime import Store

    def prepare() -> tuple[Callable[[], tuple[int, int]], float]:
        store = Store(args.processes, args.cache)
        if args.data == ["reviews"]:
            template = PromptTemplate.load("movie_reviews")
        else:
            template, _ = template_for(str(args.file))
        rows = load_rows(template, str(args.file), "train", store=store)
        encoder = PromptEncoder(template, tokenizer, MAX_LENGTH)
        counts = encode_rows(encoder, rows.rows, store=store).counts
        # Theirs ends a conversation with a line feed, ours with the answer's end; a review's text
        # has no end marker in theirs.
        more = counts.rows if args.data != ["reviews"] else -counts.rows
        return lambda: (counts.tokens + more, counts.supervised_tokens), 0

    return prepare


def with_trl(args: argparse.Namespace, tokenizer):
    """What `SFTTrainer` does with its data set before it trains."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    training = SFTConfig(
        output_dir=str(args.cache / "out"),
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        dataset_num_proc=args.processes,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )

    class Timed(SFTTrainer):
        def _prepare_dataset(self, dataset, *rest, **options):
            start = time.perf_counter()
            self.prepared = super()._prepare_dataset(dataset, *rest, **options)
            self.preparing = time.perf_counter() - start
            return self.prepared

    def prepare() -> tuple[Callable[[], tuple[int, int]], float]:
        rows = load_dataset(
            "json", data_files=str(args.file), split="train", cache_dir=str(args.cache)
        )
        start = time.perf_counter()
        trainer = Timed(model, training, train_dataset=rows, processing_class=tokenizer)
        besides = time.perf_counter() - start - trainer.preparing
        masked = "assistant_masks" in trainer.prepared.column_names
        mask = "assistant_masks" if masked else "labels"
        return lambda: count(trainer.prepared, mask), besides

    return prepare


def with_map(args: argparse.Namespace, tokenizer):
    """A map of the tokenizer over prompt and answer as one text."""
    from datasets import load_dataset

    from recipelib.prompts import PromptTemplate

    template = PromptTemplate.load("movie_reviews")
    words = {label: found[0] for label, found in template.verbalizer.items()}
    before, after = template.prompts[0].split("{{ text }}")
    batched = args.measure == "map_in_batches"

    def encode(rows: dict) -> dict:
        if not batched:
            text = f"{before}{rows['sentence']}{after} {words[rows['label']]}"
            return {"input_ids": tokenizer(text)["input_ids"]}
        pairs = zip(rows["sentence"], rows["label"], strict=True)
        texts = [f"{before}{sentence}{after} {words[label]}" for sentence, label in pairs]
        return {"input_ids": tokenizer(texts)["input_ids"]}

    def prepare() -> tuple[Callable[[], tuple[int, int]], float]:
        rows = load_dataset(
            "json", data_files=str(args.file), split="train", cache_dir=str(args.cache)
        )
        found = rows.map(
            encode,
            batched=batched,
            num_proc=args.processes if args.processes > 1 else None,
            remove_columns=rows.column_names,
        )
        return lambda: count(found, None), 0

    return prepare


def count(examples, mask: str | None) -> tuple[int, int]:
    """The tokens of examples and those that are supervised, or 0 without a mask."""
    import pyarrow.compute as compute

    table = examples.with_format("arrow")[:]
    tokens = compute.sum(compute.list_value_length(table["input_ids"])).as_py()
    if mask is None:
        return tokens, 0
    flat = compute.list_flatten(table[mask])
    wanted = compute.not_equal(flat, -100) if mask == "labels" else compute.equal(flat, 1)
    return tokens, compute.sum(wanted).as_py()


# All runs ----------------------------------------------------------------------------------------


def compare(data: str, args: argparse.Namespace, folder: Path) -> dict:
    """All sides on one data set.

    Raises:
        RunFailed: a run failed, or made other tokens.
    """
    count_of_rows = args.rows or DATA[data][0] // (10 if args.quick else 1)
    file = folder / f"{data}.jsonl"
    write_jsonl(file, generate_rows(data, count_of_rows))
    # Forked processes share the cores; the tokenizers' own threads would compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def run(arm: str, number: int) -> dict:
        cache = folder / f"cache-{data}-{arm}-{number}"
        cache.mkdir()
        starts = [
            run_arm(__file__, arm, args, folder, data=[data], file=file, cache=cache)
            for _ in range(2)
        ]
        return {"cold": starts[0], "second": starts[1]}

    def said(one: dict) -> str:
        return (
            f"{one['cold']['seconds']:.1f} s, {one['cold']['memory_bytes'] / 2**20:.0f} MiB; "
            f"second start {one['second']['seconds']:.1f} s"
        )

    def check(arm: str, one: dict, first: dict) -> None:
        for start in one.values():
            if start["tokens"] != first["cold"]["tokens"]:
                raise RunFailed(
                    f"{data}, {arm}: {start['tokens']} tokens, ours {first['cold']['tokens']}"
                )
            if start["supervised"] not in (0, first["cold"]["supervised"]):
                raise RunFailed(
                    f"{data}, {arm}: {start['supervised']} supervised tokens, ours "
                    f"{first['cold']['supervised']}"
                )

    runs = in_turn(["ours", *PEERS[data]], args.rounds, run, said, check)
    arms = {
        arm: {
            "rows_per_second": count_of_rows * args.rounds
            / sum(one["cold"]["seconds"] for one in several),
            "seconds": [one["cold"]["seconds"] for one in several],
            "second_start": [one["second"]["seconds"] for one in several],
            "memory_bytes": max(one["cold"]["memory_bytes"] for one in several),
        }
        for arm, several in runs.items()
    }  # fmt: skip
    rate = arms["ours"]["rows_per_second"]
    return {
        "rows": count_of_rows,
        "tokens": runs["ours"][0]["cold"]["tokens"],
        "ratio": {peer: rate / arms[peer]["rows_per_second"] for peer in PEERS[data]},
        "arms": arms,
    }


def print_table(data: str, result: dict, processes: int) -> None:
    """The figures of all sides on one data set."""
    show_table(
        f"{data}: {result['rows']:,} rows of {result['tokens'] / result['rows']:.0f} tokens, "
        f"{processes} processes",
        ("", "rows/s", "seconds", "memory", "second start"),
        [
            (
                arm,
                f"{one['rows_per_second']:,.0f}",
                f"{sum(one['seconds']) / len(one['seconds']):.1f}",
                f"{one['memory_bytes'] / 2**20:,.0f} MiB",
                f"{sum(one['second_start']) / len(one['second_start']):.2f} s",
            )
            for arm, one in result["arms"].items()
        ],
        caption=", ".join(f"{ratio:.2f} times {peer}" for peer, ratio in result["ratio"].items()),
    )


if __name__ == "__main__":
    run_script(main)
