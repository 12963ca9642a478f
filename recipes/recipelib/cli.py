"""The arguments that every recipe has, and their parsing: fast --help, one-line errors."""

import argparse
import dataclasses
import difflib
import json
import logging
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from recipelib.prompts import COMBINE
from recipelib.runtime import (
    Terminated,
    UserError,
    end_process_group,
    end_with_launcher,
    heeding_sigterm,
    in_one_line,
    is_main_process,
    load_yaml,
    rank,
    sole_run,
)

USAGE = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    below: float | None = None,
    needs: str | None = None,
    **more: Any,
) -> Any:
    """A dataclass field with its help text; a list becomes a default factory.

    Args:
        least, below: a number must be at least `least`, and less than `below`; None passes.
        needs: the option, and its values, without which this one has no effect and is refused:
            "--lora true", "--tune soft_prompt or prefix", "--samples 2 or more".
        more: metadata for the parser, such as `choices`.
    """
    help = f"With {needs}: {help}" if needs else help
    # argparse would take a % in the help for a format.
    limits = {"least": least, "below": below, "needs": needs}
    metadata = {"help": help.replace("%", "%%"), **limits, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def adapter_option() -> Any:
    """The option of the recipes that train an adapter, or a trained one further."""
    return option(
        None,
        "Folder or hub id of a trained adapter of this method: train it further, with its own "
        "settings, on its own model unless another is named.",
    )


def loss_option() -> Any:
    """The option of the recipes that train a model to write."""
    return option(
        "nll",
        "nll: the usual one; dft: each token weighted by its probability, so that unlikely ones "
        "pull less (Wu et al. 2025).",
        choices=["nll", "dft"],
    )


@dataclass
class RecipeArguments:
    """Arguments of every recipe: the model, the template, the rows and what to do with them."""

    # How the recipe writes checkpoints, if not as the launch's config says (`checkpoint_kind`).
    checkpoints: ClassVar[str | None] = None
    trains: ClassVar[bool] = True  # whether the trainer's options for training count
    named: ClassVar[frozenset[str]] = frozenset()  # the options that were not left at their default

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
    eval_split: str | None = option(
        None, "Evaluation split; the template names a default. all: of a file that is only scored."
    )
    field: str | None = option(
        None, "Where a JSON file's object has its rows: data, or data.examples."
    )
    encoding: str | None = option(
        None, "Of text files that are not UTF-8: latin-1, cp1252, utf-16, ..."
    )
    max_train_samples: int | None = option(
        None, "Train on a random draw of this many rows; -1: on all.", least=1
    )
    max_eval_samples: int | None = option(
        None, "Score a random draw of this many rows; -1: all.", least=1
    )
    skip_bad_rows: bool = option(
        False, "Leave out rows that the template cannot read instead of stopping."
    )
    streaming: bool = option(
        False,
        "Read the training rows of the hub or of Parquet files while training, for more than the "
        "disk holds; needs --max_steps.",
    )
    rendering: str = option(
        "text", "text, or chat: through the tokenizer's chat template.", choices=["text", "chat"]
    )
    chat_template_kwargs: dict | str | None = option(
        None, "JSON passed to the chat template, for instance '{\"enable_thinking\": false}'."
    )
    max_new_tokens: int = option(
        256, "Longest answer when a task is scored by generating.", least=1
    )
    eval_batch_tokens: int = option(
        4096,
        "Tokens, padding included, in one scoring batch; lower it if memory runs out.",
        least=1,
    )
    preview: int = option(
        0, "Show this many training examples, supervised tokens marked, and stop.", least=0
    )
    predict: str | None = option(
        None, "A file of rows without answers: answer them with what --output_dir holds and stop."
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) == -1:
                setattr(self, name, None)
        for argument in dataclasses.fields(self):
            name, value = argument.name, getattr(self, argument.name)
            least, below = (argument.metadata.get(limit) for limit in ("least", "below"))
            if value is None:
                continue
            if least is not None and not value >= least:
                raise UserError(f"--{name} {value}: must be {least} or more")
            if below is not None and not value < below:
                raise UserError(f"--{name} {value}: must be below {below}")
            needs = argument.metadata.get("needs")
            if needs and value != argument.default and not self._has(needs):
                raise UserError(f"--{name}: changes nothing without {needs}; leave it out")
        if self.trains and self.predict and getattr(self, "adapter", None):
            raise UserError("--adapter: --predict answers with what --output_dir holds; pass it so")
        if not isinstance(self.chat_template_kwargs, str):
            return
        cure = "write it as '{\"key\": value}'"
        try:
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--chat_template_kwargs: no JSON ({error}); {cure}") from None
        if not isinstance(self.chat_template_kwargs, dict):
            raise UserError(f"--chat_template_kwargs: JSON, but no object; {cure}")

    def _has(self, needs: str) -> bool:
        """Whether an option has one of the values that another one needs, see `option`."""
        name, *words = needs.removeprefix("--").split()
        value = getattr(self, name)
        if type(value) is int:
            return value >= int(words[0])
        return str(value).lower() in words


@dataclass
class ClozeArguments(RecipeArguments):
    """Arguments of the recipes that ask and train through label words."""

    cloze: bool = option(
        False,
        "Ask a causal model by the template's cloze, wherever its mask is, instead of the prompt.",
    )
    combine: str = option(
        "logsumexp",
        "How words make a label's score: logsumexp adds their probabilities, mean as OpenPrompt, "
        "max takes the likeliest.",
        choices=list(COMBINE),
    )
    soft_verbalizer: bool = option(
        False, "Train an embedding per label, which starts at its words, to read the cloze (WARP)."
    )
    calibrate: bool = option(
        False, "Divide by what the model says without content: for models that favor one label."
    )
    per_class: int | None = option(
        None,
        "Few-shot: draw this many training rows per class, and as many to choose the best pass.",
        least=1,
    )
    draws: int = option(1, "With --per_class: draws of rows, each with its own run.", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.draws > 1 and not self.per_class:
            raise UserError("--draws: draws of which rows? Pass --per_class, such as 16")
        if self.soft_verbalizer and self.calibrate:
            raise UserError("--calibrate: --soft_verbalizer has no words; leave one of them out")


# Options that recipes no longer have, and values that an option no longer takes -> what to run.
_MOVED = {
    "group_by_length": "pass --train_sampling_strategy group_by_length",
    "warmup_ratio": "pass it as --warmup_steps: below 1 it is a share of all steps",
    "merge": "run 'python recipes/merge.py OUTPUT_DIR' afterwards",
    "search_label_words": "run recipes/search_label_words.py",
    "tune model": "run recipes/cloze_sft.py",
    "tune both": "run recipes/cloze_sft.py --soft_prompt true",
    "tune none": "run recipes/cloze_sft.py --score_only true",
}


def _moved(name: str, value: Any, known: Container[str]) -> str | None:
    """The message for an option, or for its value, that has moved; None if it has not."""
    was = f"{name} {value}" if name in known else name
    return f"{was}: has moved; {_MOVED[was]}" if was in _MOVED else None


def _print_help(arguments: type, description: str, defaults: Mapping[str, Any]) -> None:
    """Print the recipe's own arguments, then the common ones and those of the trainer that the
    recipe sets. No library is imported for it.
    """
    common = {argument.name for argument in dataclasses.fields(RecipeArguments)}
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
        add_help=False,
        usage=USAGE,
    )
    titles = {False: "this method", True: "every recipe"}
    groups = {key: parser.add_argument_group(title) for key, title in titles.items()}
    for argument in dataclasses.fields(arguments):
        name, default, text = argument.name, argument.default, argument.metadata["help"]
        if default is dataclasses.MISSING:
            default = " ".join(argument.default_factory()) or None
        shown = f" [{default}]".replace("%", "%%")
        shown = "" if default is None or default is False else shown
        choices = argument.metadata.get("choices") or ()
        if any(not re.search(rf"\b{choice}\b", text) for choice in choices):
            shown = f" One of {', '.join(choices)}.{shown}"
        # As a flag, so that no metavar is printed; this parser only prints.
        groups[name in common].add_argument(f"--{name}", action="store_true", help=text + shown)
    trainer = parser.add_argument_group("the trainer's, as this recipe sets them (all: --help_all)")
    for name, value in defaults.items():
        shown = "by what is trained" if value is None else value
        trainer.add_argument(f"--{name}", action="store_true", help=f"[{shown}]")
    parser.print_help()


def _closest(name: str, known: Iterable[str], dashes: str = "") -> str:
    starts = [key for key in known if name and key.startswith(name)]  # abbreviations are refused
    close = difflib.get_close_matches(name, known, 1, cutoff=0.75) or starts
    return f"did you mean {dashes}{close[0]}?" if close else "see --help and --help_all"


def _converted(
    parser: argparse.ArgumentParser, given: Mapping[str, Any], hints: Mapping[str, Any], source: str
) -> dict:
    """Values from elsewhere, checked and converted like those of the command line.

    Args:
        given: option -> value.
        hints: option -> type.
        source: what an error calls the place that the values come from.
    """
    # Reversed, so that the first action of a name counts: --bf16, not --no_bf16.
    actions = {action.dest: action for action in reversed(parser._actions)}
    values = {}
    for key, value in given.items():
        if moved := _moved(key, value, actions):
            raise UserError(f"{source}: {moved}")
        if key not in actions:
            raise UserError(f"{source}: {key}: unknown key; {_closest(key, actions)}")
        value = list(value) if isinstance(value, tuple) else value  # from Python
        kinds = {get_origin(kind) or kind for kind in (hints[key], *get_args(hints[key]))}
        several = isinstance(value, list) and value and actions[key].nargs == "+"
        if (value is None or isinstance(value, list | dict)) and not several:
            if type(value) not in kinds:
                names = {list: "a list", dict: "keys and values"}
                problem = f"cannot be {names.get(type(value), 'null')}"
                raise UserError(f"{source}: {key}: {problem}; see --help_all")
            values[key] = value
            continue
        try:
            words = [str(word) for word in (value if several else [value])]
            values[key] = parser._get_values(actions[key], words)
        except argparse.ArgumentError as error:
            word = isinstance(value, bool) and actions[key].choices  # YAML's no is False
            quote = "; put a word such as no into quotes" if word else ""
            raise UserError(f"{source}: {key}: {error.message}{quote}") from None
    return values


def arguments(recipe: ModuleType, **options: Any) -> tuple[Any, Any]:
    """What a recipe's `main` takes, with the defaults that its command line has.

        lora_sft.main(*arguments(lora_sft, template="sst2", max_steps=10))

    Args:
        recipe: the recipe's module, or a copy of it.
        options: the recipe's and the trainer's options, by their names on the command line.
    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    kind = recipe.main.__annotations__["args"]
    if isinstance(kind, str):  # a copy may begin with `from __future__ import annotations`
        kind = getattr(recipe, kind)
    parsed, training = parse_arguments(kind, recipe.__doc__, recipe.DEFAULTS, [], options)
    training.command = _command(recipe, options)
    return parsed, training


def _command(recipe: ModuleType, options: Mapping[str, Any]) -> list[str]:
    """The words of a command line that gives a recipe these options, for the model card."""
    script = Path(getattr(recipe, "__file__", None) or f"{recipe.__name__}.py")
    inside = script.is_relative_to(Path.cwd())
    words = [str(script.relative_to(Path.cwd()) if inside else script.name)]
    for name, value in options.items():
        values = [*value] if isinstance(value, list | tuple) else [value]
        if values and values != [None]:
            plain = [
                json.dumps(one) if isinstance(one, bool | dict) else str(one) for one in values
            ]
            words += [f"--{name}", *plain]
    return words


def parse_arguments(
    arguments: type,
    description: str,
    defaults: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """The recipe's arguments and its trainer's (`recipelib.training.RecipeConfig`).

    Args:
        arguments: the recipe's dataclass.
        description: the recipe's docstring, with which its --help begins.
        defaults: the trainer's arguments whose defaults this recipe changes.
        argv: the command line; `sys.argv[1:]` by default.
        given: options that are set before the command line is read.
    Raises:
        UserError: an unknown or malformed argument, or key of the --config file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        _print_help(arguments, description, defaults)
        sys.exit(0)
    for word, following in pairwise([*argv, ""]):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            known = arguments.__dataclass_fields__
            if moved := _moved(name.replace("-", "_"), value or following, known):
                raise UserError(f"--{moved}")

    # On some CPUs bitsandbytes recommends a package for a code path that we turn off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl import TrlParser

    from recipelib.training import RecipeConfig, refuse_unused

    class Parser(TrlParser):
        def add_argument(self, *names: str, least=None, below=None, needs=None, **options):
            return super().add_argument(*names, **options)  # the dataclass checks the limits

        def error(self, message: str):
            raise UserError(f"command line: {message}")

    parser = Parser((arguments, RecipeConfig), allow_abbrev=False, add_help=False, usage=USAGE)
    parser.set_defaults_with_config(**defaults)
    if "--help_all" in argv:
        parser.print_help()
        sys.exit(0)
    hints = get_type_hints(RecipeConfig) | get_type_hints(arguments)
    parser.set_defaults(**_converted(parser, given or {}, hints, "arguments"))
    words = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    sources = [[word.replace("-", "_") for word in words], [*(given or {})]]
    for place, argument in enumerate(argv):
        if argument.startswith("--config="):
            argv[place : place + 1] = argument.split("=", 1)
    while "--config" in argv:
        place = argv.index("--config")
        if place + 1 == len(argv):
            raise UserError("command line: --config needs a file")
        path = Path(argv[place + 1])
        values = load_yaml(path)
        parser.set_defaults(**_converted(parser, values, hints, str(path)))
        sources.append([*values])
        del argv[place : place + 2]
    try:
        parsed, training, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    # The trainer checks its values itself, and may miss a file or a package.
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"arguments: {' '.join(str(error).split())}") from None
    if rest:
        name = rest[0].split("=")[0].lstrip("-").replace("-", "_")
        cure = _closest(name, [action.dest for action in parser._actions], "--")
        raise UserError(f"command line: unknown argument {rest[0]}; {cure}")
    parsed.named = frozenset(name for source in sources for name in source)
    stops_early = bool(getattr(parsed, "early_stopping_patience", None))
    loss = getattr(parsed, "loss", "nll")
    refuse_unused(training, sources, trains=parsed.trains, stops_early=stops_early, loss=loss)
    return parsed, training


def owns_output_dir(main: Callable) -> Callable:
    """Decorate a recipe's `main(args, training)`: while it runs, no other run writes into the same
    --output_dir, and it ends with its launcher. What cannot be written ends in one line. A preview
    writes nothing.
    """

    @wraps(main)
    def run(args, training):
        end_with_launcher()
        if args.preview:
            return main(args, training)
        with in_one_line(training.output_dir), sole_run(training.output_dir):
            return main(args, training)

    return run


def run_recipe(
    main: Callable,
    arguments: type,
    description: str,
    defaults: Mapping[str, Any],
    *,
    trains: bool = True,
) -> None:
    """Parse the command line and run `main`, or answer the rows of --predict with the result of an
    earlier run. A user's mistake ends in one line and exit code 2, SIGTERM in one and 143.

    Args:
        trains: False for a recipe that answers --predict itself, for it needs no trained result.
    """
    end_with_launcher()
    try:
        with heeding_sigterm():
            args, training = parse_arguments(arguments, description, defaults)
            if args.predict and trains:
                from recipelib.reporting import answer_file

                owns_output_dir(answer_file)(args, training)
            else:
                main(args, training)
            end_process_group()
    except UserError as error:
        by = f" (process {rank()})" if rank() else ""
        print(f"error{by}: {error}", file=sys.stderr)
        sys.exit(2)
    except Terminated as end:
        if is_main_process():
            print(end.line, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        own = "resume" in arguments.__dataclass_fields__
        resume = "--resume true" if own else "--resume_from_checkpoint last"
        print(
            f"interrupted; {resume} goes on from what was saved, if anything was", file=sys.stderr
        )
        sys.exit(130)
