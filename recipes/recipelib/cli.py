"""The arguments that every recipe has, and their parsing: fast --help, one-line errors."""

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from recipelib.runtime.errors import UserError, require_at_least
from recipelib.runtime.files import load_yaml
from recipelib.runtime.launch import end_process_group

USAGE = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; a list becomes a default factory."""
    metadata["help"] = help.replace("%", "%%")  # argparse formats it
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RecipeArguments:
    """Arguments of every recipe: the model, the template, the rows and what to do with them."""

    model_name_or_path: str | None = option(
        None, "Hub id, folder or .gguf file; without it the bundled SmolLM2-135M-Instruct."
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a hub model; pin it to repeat a run."
    )
    attn_implementation: str | None = option(
        None, "Attention code: sdpa (the usual default), eager, or a GPU's flash_attention_2."
    )
    template: str = option(
        "movie_reviews", "The task: a name in data_templates/ or the path of your own .yaml file."
    )
    dataset: str | None = option(
        None, "Hub id (owner/name or owner/name:config), folder or file; else the template's."
    )
    columns: list[str] = option(
        [], "Template variables and your columns, where they differ: text=review label=stars."
    )
    train_split: str | None = option(None, "Training split; the template names a default.")
    eval_split: str | None = option(None, "Evaluation split; the template names a default.")
    max_train_samples: int | None = option(
        None, "Train on a random draw of this many rows; -1: on all."
    )
    max_eval_samples: int | None = option(None, "Score a random draw of this many rows; -1: all.")
    skip_bad_rows: bool = option(
        False, "Leave out rows that the template cannot read instead of stopping."
    )
    rendering: str = option(
        "text", "text, or chat: through the tokenizer's chat template.", choices=["text", "chat"]
    )
    chat_template_kwargs: dict | str | None = option(
        None, "JSON passed to the chat template, for instance '{\"enable_thinking\": false}'."
    )
    max_new_tokens: int = option(256, "Longest answer when a task is scored by generating.")
    eval_batch_tokens: int = option(
        4096, "Tokens, padding included, in one scoring batch; lower it if memory runs out."
    )
    preview: int = option(
        0, "Show this many training examples, supervised tokens marked, and stop."
    )
    predict: str | None = option(
        None, "A file of rows without answers: answer them with what --output_dir holds and stop."
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) == -1:
                setattr(self, name, None)
        at_least_one = ("max_train_samples", "max_eval_samples", "max_new_tokens")
        require_at_least(self, **dict.fromkeys(at_least_one, 1), eval_batch_tokens=1, preview=0)
        if not isinstance(self.chat_template_kwargs, str):
            return
        cure = "write it as '{\"key\": value}'"
        try:
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--chat_template_kwargs: no JSON ({error}); {cure}") from None
        if not isinstance(self.chat_template_kwargs, dict):
            raise UserError(f"--chat_template_kwargs: JSON, but no object; {cure}")


def _print_help(arguments: type, description: str, defaults: Mapping[str, Any]) -> None:
    """The recipe's own arguments first, then the common ones; no library is imported for it."""
    common = {one.name for one in dataclasses.fields(RecipeArguments)}
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
        add_help=False,
        usage=USAGE,
    )
    titles = {False: "this method", True: "every recipe"}
    groups = {key: parser.add_argument_group(title) for key, title in titles.items()}
    for one in dataclasses.fields(arguments):
        default = one.default
        if default is dataclasses.MISSING:
            default = " ".join(one.default_factory()) or None
        shown = f" [{default}]".replace("%", "%%")
        shown = "" if default is None or default is False else shown
        choices = one.metadata.get("choices") or ()
        if any(not re.search(rf"\b{choice}\b", one.metadata["help"]) for choice in choices):
            shown = f" One of {', '.join(choices)}.{shown}"
        # A flag has no metavar, so none is printed; nothing is parsed here.
        groups[one.name in common].add_argument(
            f"--{one.name}", action="store_true", help=one.metadata["help"] + shown
        )
    trainer = parser.add_argument_group("the trainer's, as this recipe sets them (all: --help_all)")
    for name, value in defaults.items():
        trainer.add_argument(f"--{name}", action="store_true", help=f"[{value}]")
    parser.print_help()


def _closest(name: str, known: Iterable[str], dashes: str = "") -> str:
    starts = [one for one in known if name and one.startswith(name)]  # no abbreviation is taken
    close = difflib.get_close_matches(name, known, 1, cutoff=0.75) or starts
    return f"did you mean {dashes}{close[0]}?" if close else "see --help and --help_all"


def _read_config(parser: argparse.ArgumentParser, path: Path, hints: Mapping[str, Any]) -> dict:
    """The values of a --config file, checked and converted as the command line's are."""
    actions = {one.dest: one for one in reversed(parser._actions)}  # --bf16 before --no_bf16
    values = {}
    for key, value in load_yaml(path).items():
        if key not in actions:
            raise UserError(f"{path}: {key}: unknown key; {_closest(key, actions)}")
        kinds = {get_origin(one) or one for one in (hints[key], *get_args(hints[key]))}
        several = isinstance(value, list) and value and actions[key].nargs == "+"
        if (value is None or isinstance(value, list | dict)) and not several:
            if type(value) not in kinds:
                names = {list: "a list", dict: "keys and values"}
                problem = f"cannot be {names.get(type(value), 'null')}"
                raise UserError(f"{path}: {key}: {problem}; see --help_all")
            values[key] = value
            continue
        try:
            words = [str(one) for one in (value if several else [value])]
            values[key] = parser._get_values(actions[key], words)
        except argparse.ArgumentError as error:
            word = isinstance(value, bool) and actions[key].choices  # YAML's no is False
            quote = "; put a word such as no into quotes" if word else ""
            raise UserError(f"{path}: {key}: {error.message}{quote}") from None
    return values


def parse_arguments(
    arguments: type,
    description: str,
    defaults: Mapping[str, Any],
    argv: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """The recipe's arguments and its trainer's (`recipelib.training.trainer.RecipeConfig`).

    Args:
        arguments: the recipe's dataclass.
        description: the recipe's docstring, the head of its --help.
        defaults: the trainer's arguments that this recipe sets otherwise.
        argv: the command line; `sys.argv[1:]` by default.
    Raises:
        UserError: an unknown or malformed argument or key of the --config file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        _print_help(arguments, description, defaults)
        sys.exit(0)

    # Where it is installed it recommends, on some CPUs, a package for a path that we keep shut.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl import TrlParser

    from recipelib.training.config import RecipeConfig

    class Parser(TrlParser):
        def error(self, message: str):
            raise UserError(f"command line: {message}")

    parser = Parser((arguments, RecipeConfig), allow_abbrev=False, add_help=False, usage=USAGE)
    parser.set_defaults_with_config(**defaults)
    if "--help_all" in argv:
        parser.print_help()
        sys.exit(0)
    hints = get_type_hints(RecipeConfig) | get_type_hints(arguments)
    for place, argument in enumerate(argv):
        if argument.startswith("--config="):
            argv[place : place + 1] = argument.split("=", 1)
    while "--config" in argv:
        place = argv.index("--config")
        if place + 1 == len(argv):
            raise UserError("command line: --config needs a file")
        parser.set_defaults(**_read_config(parser, Path(argv[place + 1]), hints))
        del argv[place : place + 2]
    try:
        parsed, training, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    # The trainer's own checks: a value, a file or a package that is missing.
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"arguments: {' '.join(str(error).split())}") from None
    if rest:
        name = rest[0].split("=")[0].lstrip("-").replace("-", "_")
        cure = _closest(name, [one.dest for one in parser._actions], "--")
        raise UserError(f"command line: unknown argument {rest[0]}; {cure}")
    return parsed, training


def run_recipe(
    main: Callable,
    arguments: type,
    description: str,
    defaults: Mapping[str, Any],
    resume: str = "--resume_from_checkpoint last",
) -> None:
    """Parse the command line, run `main`, and end a user's mistake in one line and exit code 2.

    Args:
        resume: what an interrupted run is told to go on with.
    """
    try:
        main(*parse_arguments(arguments, description, defaults))
        end_process_group()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            f"interrupted; {resume} goes on from what was saved, if anything was", file=sys.stderr
        )
        sys.exit(130)
