"""Writes training examples in forms that other trainers read: turns, prompts and completions, texts
and ids. They are those that the recipes train: drawn, shortened and left out alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recipelib.data import check_dataset
from recipelib.encoding.examples import (
    EncodedRows,
    Encoding,
    drawn_questions,
    encode_into,
    training_examples,
)
from recipelib.encoding.prompt_encoder import Counts, PromptEncoder, TrainingExample
from recipelib.prompts import PromptTemplate, Turn
from recipelib.runtime import Store, UserError, code_digest, cores, digest, print_table, say

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = ("messages", "prompt_completion", "text", "ids")
_PLAIN = {"role", "content"}


class _MoreFound(Exception):
    """A record has what its columns do not hold: the words of `_more_than_text` for it."""


def format_rows(
    data: Dataset,
    template: PromptTemplate,
    form: str = "messages",
    *,
    tokenizer=None,
    max_length: int = 1024,
    rendering: str | None = None,
    chat_template_kwargs: Mapping | None = None,
    seed: int = 42,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """What a template makes of a data set, for any trainer; `recipes/format_rows.py` as a call.

        rows = format_rows(load_dataset("stanfordnlp/sst2", split="train"), template, "messages")

    Args:
        data: a `datasets.Dataset`; every row is checked, none is held out.
        form: messages ({role, content} turns), prompt_completion, text, or ids (`input_ids`,
            `attention_mask`, and `labels` that are -100 where nothing is learned).
        tokenizer: of the model to be trained, by which rows are shortened to `max_length` tokens
            and left out where they do not fit; without one, texts are as long as they are.
        rendering: chat: turns, through the tokenizer's chat template; text, which is the default;
            messages and ready conversations are always a chat.
        chat_template_kwargs: further arguments of the chat template.
        seed: draws each row's phrasing and wrong candidates where the template has several.
        skip_bad_rows: leave bad rows out and count them, instead of raising.
        num_proc: processes; by default one for each core.
    Returns:
        The examples, in a file that goes with this process; `save_to_disk` keeps them.
    Raises:
        UserError: a mistake in the arguments or the rows, or no row fits.
    """
    chat = check_form(template, form, rendering, tokenizer is not None)
    store, encoder = Store(num_proc or cores()), None
    template, rows = check_dataset(template, data, skip_bad_rows=skip_bad_rows, store=store)
    if tokenizer is not None:
        shown = "chat" if chat else "text"
        encoder = PromptEncoder(template, tokenizer, max_length, shown, chat_template_kwargs)
    encoded = encode_formatted(
        rows.rows, template, form, encoder=encoder, chat=chat, seed=seed, store=store
    )
    show_counts(encoded, form, rows.skipped)
    return encoded.examples


def check_form(
    template: PromptTemplate, form: str, rendering: str | None, has_tokenizer: bool
) -> bool:
    """Whether the rows of a template are turns of a chat in this form.

    Raises:
        UserError: no such form, or one that goes another way.
    """
    if form not in FORMS:
        raise UserError(f"--as {form}: must be one of {', '.join(FORMS)}")
    if rendering not in (None, "text", "chat"):
        raise UserError(f"--rendering {rendering}: must be text or chat")
    conversation = template.conversation is not None
    if rendering == "text" and (conversation or form == "messages"):
        what = f"{template.name} has conversations" if conversation else "messages are turns"
        raise UserError(f"--rendering text: {what}, which are a chat; leave it out")
    chat = conversation or form == "messages" or rendering == "chat"
    if not has_tokenizer and (form == "ids" or (form == "text" and chat)):
        what = "ids are" if form == "ids" else "a chat as one text is"
        raise UserError(
            f"--as {form}: {what} of one model's tokenizer; pass --model_name_or_path (in Python "
            "tokenizer)"
        )
    return chat


def encode_formatted(
    rows: Sequence[Mapping],
    template: PromptTemplate,
    form: str,
    *,
    encoder: PromptEncoder | None,
    chat: bool,
    seed: int,
    store: Store,
    kind: str = "training",
) -> EncodedRows:
    """Rows that the room `data` has checked, in a form of `FORMS`.

    Args:
        encoder: shortens them; None for texts as long as they are.
        chat: from `check_form`.
        kind: what errors call the rows.
    Raises:
        UserError: no row fits, or the chat template rejects a conversation.
    """
    more: frozenset[str] = frozenset()
    while True:  # most rows have nothing more than text; where some have, one is met soon
        try:
            encoding = _encoding(template, form, encoder, chat, seed, kind, more)
            encoded = encode_into(store, rows, encoding)
            break
        except _MoreFound as found:
            more |= found.args[0]
    if "weight" in more:
        say(
            "turns of the assistant that are not learned have weight: 0, which TRL does not read; "
            "as prompt_completion or as ids they are not learned there either"
        )
    return encoded


def _encoding(
    template: PromptTemplate,
    form: str,
    encoder: PromptEncoder | None,
    chat: bool,
    seed: int,
    kind: str,
    more: frozenset[str],
) -> Encoding:
    """How rows become records of a form, with columns for what is more than text in them."""
    from datasets import Json, List, Value

    text, tokens, objects = Value("string"), List(Value("int32")), List(Json())
    # In Arrow all turns have the same keys. Where they differ, each is an object of JSON.
    turns = objects if "keys" in more else List({"role": text, "content": text})
    features = {
        "messages": {"messages": turns},
        "prompt_completion": dict.fromkeys(("prompt", "completion"), turns if chat else text),
        "text": {"text": text},
        "ids": {"input_ids": tokens, "attention_mask": List(Value("int8")), "labels": tokens},
    }[form]
    if "tools" in more:
        features["tools"] = objects

    def encode(number: int, row: Mapping, counts: Counts) -> Iterator[tuple[int, tuple]]:
        if encoder:
            examples = training_examples(encoder, number, row, seed, counts, kind)
        else:
            examples = _unshortened(template, number, row, seed)
        for example in examples:
            supervised = counts.add_example(example.labels)
            for record in _records(template, form, encoder, chat, example):
                if found := _more_than_text(record) - more:
                    raise _MoreFound(found)
                yield (
                    supervised,
                    [
                        _as_json(record.get(name)) if column is objects else record.get(name)
                        for name, column in features.items()
                    ],
                )

    made_by = encoder.identity if encoder else code_digest("prompts", "encoding")
    return Encoding(
        digest(made_by, template.fields, form, chat, seed, sorted(more)),
        features,
        encode,
        f"--max_length {encoder.max_length}: no {kind} row fits; raise it" if encoder else "",
    )


def _as_json(items: Sequence[Mapping] | None) -> list[str] | None:
    return items and [json.dumps(item, ensure_ascii=False) for item in items]


def _unshortened(
    template: PromptTemplate, number: int, row: Mapping, seed: int
) -> Iterator[TrainingExample]:
    """What is trained of a row, as long as it is and without ids."""
    for question, phrasing in drawn_questions(template, number, row, seed):
        turns = list(question.turns)
        while turns and not _is_learned(turns[-1]):
            turns.pop()
        turns = [
            {**turn, "content": turn["content"].strip()} if turn["role"] == "assistant" else turn
            for turn in turns
        ]
        yield TrainingExample([], [], replace(question, turns=tuple(turns)), phrasing)


def _is_learned(turn: Turn) -> bool:
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _records(
    template: PromptTemplate,
    form: str,
    encoder: PromptEncoder | None,
    chat: bool,
    example: TrainingExample,
) -> Iterator[dict[str, Any]]:
    """What is written of an example: column -> value. As prompt and completion a conversation is
    one record for each turn that is learned, with the turns before it as the prompt.
    """
    question = example.question
    if form == "ids":
        mask = [1] * len(example.ids)
        yield {"input_ids": example.ids, "attention_mask": mask, "labels": example.labels}
    elif chat and form == "text":
        prefix, decode = encoder.text.prefix, encoder.text.tokenizer.decode
        # What the tokenizer puts before each text, it will put before this one.
        own = example.ids[: len(prefix)] == prefix
        ids = example.ids[len(prefix) :] if own else example.ids
        yield {"text": decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)}
    elif chat:
        turns = list(question.turns) or _asked_and_answered(template, example)
        if encoder:
            turns = encoder.text.chat.as_taken(turns)
        tools = {"tools": list(question.tools)} if question.tools else {}
        if form == "messages":
            yield {"messages": list(turns), **tools}
            return
        for place, turn in enumerate(turns):
            if _is_learned(turn):
                before = [
                    {key: turn[key] for key in turn if key != "weight"} for turn in turns[:place]
                ]
                yield {"prompt": before, "completion": [turn], **tools}
    else:
        system, prompt = template.system(question), template.prompt(question, example.phrasing)
        prompt = f"{system}\n\n{prompt}" if system else prompt
        if form == "prompt_completion":
            yield {"prompt": prompt, "completion": question.target}
        else:
            end = encoder.text.tokenizer.eos_token if encoder else ""
            yield {"text": f"{prompt}{question.target}{end}"}


def _asked_and_answered(template: PromptTemplate, example: TrainingExample) -> list[Turn]:
    """The turns of a prompt and its answer."""
    question = example.question
    system = template.system(question)
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": template.prompt(question, example.phrasing)},
        {"role": "assistant", "content": question.target.strip()},
    ]


def _more_than_text(record: Mapping[str, Any]) -> frozenset[str]:
    """What a record has more than turns of text: turns with other keys, weights, tools."""
    columns = [record.get(name, ()) for name in ("messages", "prompt", "completion")]
    keys = {
        key for turns in columns if not isinstance(turns, str) for turn in turns for key in turn
    }
    found = {"keys"} if keys - _PLAIN else set()
    return frozenset(found | (keys & {"weight"}) | ({"tools"} & record.keys()))


def show_counts(encoded: EncodedRows, form: str, skipped: int, **more: Any) -> None:
    """Print what became of the rows, as before training.

    Args:
        skipped: how many bad ones were left out.
        more: further rows of the table.
    """
    counts, written = encoded.counts, len(encoded.examples)
    left_out = f", {counts.left_out:,} left out: too long" if counts.left_out else ""
    skipped = f"; {skipped:,} bad ones were left out" if skipped else ""
    shown = {"examples": f"{counts.examples:,} from {counts.rows:,} rows{skipped}"}
    if counts.tokens:
        shown["examples"] += f"; {counts.shortened:,} shortened{left_out}"
        shown["tokens"] = f"{counts.tokens:,}, of which {counts.supervised_tokens:,} supervised"
    else:
        shown["shortened"] = "none: no tokenizer is named that could tell how long they are"
    if written != counts.examples:
        shown["records"] = f"{written:,}, one for each turn that is learned"
    print_table(f"As {form}", {**shown, **more})
