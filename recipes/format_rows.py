"""Write what a template makes of a data set, for TRL, axolotl or any trainer of your own.

The rows are those that a recipe with the same options trains on: checked, drawn, a tenth of a
single file held out, shortened to --max_length and left out where they do not fit. With
--model_name_or_path they are shortened by that model's tokenizer; without, they stay whole.

    python recipes/format_rows.py --template sst2 --output sst2.parquet
    python recipes/format_rows.py --template sst2 --output sst2_eval.parquet --split eval
    python recipes/format_rows.py --dataset chats.jsonl --as prompt_completion --output rows.jsonl
    python recipes/format_rows.py --template tickets.yaml --as ids --output rows.parquet \\
        --model_name_or_path Qwen/Qwen3-0.6B

    --as messages            {messages}: turns of system, user and assistant, and a column tools
    --as prompt_completion   {prompt, completion}: texts, or turns with --rendering chat; of a
                             conversation one row for each answer that is learned
    --as text                {text}: prompt, answer and, where a model is named, its end marker
    --as ids                 {input_ids, attention_mask, labels}: -100 where nothing is learned

From Python, `recipelib.encoding.format_rows` does the same with a `datasets.Dataset`.
"""

import argparse
import sys
from types import SimpleNamespace

from recipelib.cli import RecipeArguments
from recipelib.runtime import UserError

FORMS = ["messages", "prompt_completion", "text", "ids"]
# The recipes' own options, as they mean them, and what is said of some here.
COMMON = {
    "template": "The task; left out, the columns of --dataset are taken for conversations or "
    "instructions, which is said.",
    **dict.fromkeys(("dataset", "columns", "train_split", "eval_split", "field", "encoding"), ""),
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "skip_bad_rows"), ""),
    "model_name_or_path": "Hub id, folder or .gguf file, by whose tokenizer rows are shortened.",
    "revision": "",
    "rendering": "text, or chat: turns; messages and conversations are always turns.",
    "chat_template_kwargs": "",
}
# Those of their trainer, with the recipes' defaults.
TRAINERS = {
    "max_length": (None, "Tokens of prompt, answer and end marker together, with a model [1024]."),
    "seed": (42, "Draws rows and phrasings [42]."),
    "trust_remote_code": (False, "Run the code that a hub model brings."),
    "dataset_num_proc": (None, "Processes that prepare rows; by default one per core."),
    "dataset_cache": (True, "Keep prepared rows for the next run [true]."),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out of the common options is left out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = ".parquet, .jsonl, .json or .csv; without a suffix a folder for load_from_disk."
    parser.add_argument("--output", required=True, help=f"The file to write: {output}")
    parser.add_argument("--as", dest="form", default="messages", choices=FORMS, help="[messages]")
    parser.add_argument(
        "--split",
        default="train",
        choices=["train", "eval"],
        help="The rows that are trained, or those that are kept for evaluation [train].",
    )

    def add(name: str, default, flag: bool, number: bool, meaning: str, **more) -> None:
        if flag:  # alone, or with true or false behind it
            more |= {"nargs": "?", "const": True, "type": {"true": True, "false": False}.get}
            more |= {"choices": [True, False], "metavar": "true"}
        elif number:
            more |= {"type": int}
        parser.add_argument(f"--{name}", default=default, help=meaning, **more)

    for name, meaning in COMMON.items():
        field = RecipeArguments.__dataclass_fields__[name]
        more = {"nargs": "+"} if name == "columns" else {}
        more |= {"choices": ["text", "chat"]} if name == "rendering" else {}
        number = field.metadata["least"] is not None
        meaning = meaning or field.metadata["help"]
        add(name, argparse.SUPPRESS, field.type is bool, number, meaning, **more)
    for name, (default, meaning) in TRAINERS.items():
        flag = isinstance(default, bool)
        add(name, default, flag, not flag, meaning)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the command line; a user's mistake ends in one line and exit code 2."""
    given = vars(arguments(argv))
    own = {name: given[name] for name in ("output", "form", "split")}
    training = SimpleNamespace(**{name: given[name] for name in TRAINERS}, pad_token=None)
    common = {name: given[name] for name in COMMON if name in given}
    try:
        # Imported here, so that --help answers at once.
        from recipelib.task import format_task

        args = RecipeArguments(**{"template": None, **common})
        args.given = common.keys()
        print(f"written: {format_task(args, training, **own)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
