"""The rows of a task in a form that other trainers read, and the file that keeps them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recipelib.data import origin_of, parse_columns, template_for
from recipelib.encoding import check_form, encode_formatted, show_counts
from recipelib.prompts import TEMPLATE_FOLDER, PromptTemplate
from recipelib.runtime import (
    Store,
    UserError,
    progress_bar,
    replacing,
    require_at_least,
    say,
    write_jsonl,
)
from recipelib.task.task import load_rows_of, load_template, make_encoder, require_causal

if TYPE_CHECKING:
    from datasets import Dataset

_FILES = (".parquet", ".jsonl", ".json", ".csv")
_NEED_A_MODEL = ("revision", "chat_template_kwargs", "max_length", "trust_remote_code")


def format_task(args, training, output: str, form: str, split: str) -> Path:
    """Write the rows that a training with these arguments would see.

    Args:
        args: a recipe's `RecipeArguments`, `given` among them; without a template the columns of
            the data set tell what it is, and without a model nothing is shortened.
        training: of its `RecipeConfig` `seed`, `max_length` (None for the default), `pad_token`,
            `trust_remote_code`, `dataset_num_proc` and `dataset_cache`.
        output: the file to write, or a folder.
        form: one of `encoding.FORMS`.
        split: "train", or "eval" for the rows that are kept for evaluation.
    Returns:
        What was written.
    Raises:
        UserError: arguments or rows that will not do; then nothing is written.
    """
    require_at_least(training, max_length=1, dataset_num_proc=1, seed=0)
    if args.template is not None:
        template = load_template(args, training)
    elif args.dataset is not None:
        how = {"encoding": args.encoding, "field": args.field}
        template, guess = template_for(args.dataset, args.train_split, **how)
        say(f"{args.dataset}: {guess}")
        template = template.with_columns(parse_columns(args.columns))
    else:
        raise UserError("--template: name one, or a --dataset whose columns say what they are")
    named = args.model_name_or_path is not None
    rendering = args.rendering if "rendering" in args.given else None
    chat = check_form(template, form, rendering, named)
    path = Path(output)
    nested = form in ("messages", "ids") or (chat and form == "prompt_completion")
    _check_output(path, template, args, nested)
    encoder = None
    if named:
        args.rendering = "chat" if chat else "text"
        training.max_length = training.max_length or 1024
        require_causal(args, training)
        encoder = make_encoder(template, args, training)
    else:
        values = {**vars(args), **vars(training)}
        if idle := [name for name in _NEED_A_MODEL if values[name]]:
            raise UserError(
                f"--{idle[0]}: of which model? Pass --model_name_or_path, or leave it out"
            )

    store, held_out = Store.of(training), split == "eval"
    rows = load_rows_of(template, args, training, store)[held_out]
    encoded = encode_formatted(
        rows.rows,
        template,
        form,
        encoder=encoder,
        chat=chat,
        seed=0 if held_out else training.seed,  # as where the loss is followed while training
        store=store,
        kind="evaluation" if held_out else "training",
    )
    _write(encoded.examples, path)
    show_counts(encoded, form, rows.skipped, rows=rows.source)
    store.say_what_was_kept()
    return path


def _check_output(output: Path, template: PromptTemplate, args, nested: bool) -> None:
    """
    Raises:
        UserError: the output cannot be written, or would take the place of rows.
    """
    suffix, shown = output.suffix.lower(), f"--output {output}"
    if suffix and suffix not in _FILES:
        raise UserError(f"{shown}: not one of {', '.join(_FILES)}, or a folder for Arrow files")
    if suffix == ".csv" and nested:
        raise UserError(
            f"{shown}: CSV holds texts only, and these are lists; write .parquet or .jsonl"
        )
    if output.is_dir() or (output.exists() and not suffix):
        raise UserError(f"{shown}: is there already; name another, or delete it")
    rows = TEMPLATE_FOLDER / origin_of(template, args)["path"]
    if rows.exists() and output.resolve().is_relative_to(rows.resolve()):
        what = "are read from there" if rows.is_dir() else "are read from it"
        raise UserError(f"{shown}: the rows {what}; write elsewhere")


def _write(rows: Dataset, output: Path) -> None:
    """Write a data set by the suffix of the file: whole, or not at all."""
    suffix = output.suffix.lower()
    records = ({key: row[key] for key in row if row[key] is not None} for row in rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not suffix:
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".format_rows-") as folder:
                rows.save_to_disk(Path(folder, output.name))
                os.replace(Path(folder, output.name), output)
        elif suffix == ".jsonl":
            write_jsonl(output, _with_bar(records, len(rows)))
        else:
            with replacing(output) as temporary:
                if suffix == ".parquet":
                    rows.to_parquet(temporary)
                elif suffix == ".csv":
                    rows.to_csv(temporary)
                else:
                    _write_array(_with_bar(records, len(rows)), temporary)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from None


def _write_array(records: Iterable[Mapping], path: Path) -> None:
    """Write records as one array of JSON, each on a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(records):
            file.write(",\n" if number else "[\n")
            json.dump(record, file, ensure_ascii=False)
        file.write("\n]\n")


def _with_bar(records: Iterable[Mapping], total: int) -> Iterator[Mapping]:
    """The records, with a progress bar over them."""
    with progress_bar("writing", total) as bar:
        for record in records:
            yield record
            bar.update()
