"""A task whose classes are read from what the model computes of a row's text, not from words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from recipelib.activations import FrozenLayers, cache_folder, kept_features
from recipelib.data import RowStream, origin_of
from recipelib.encoding import (
    CausalAsker,
    ClassRows,
    EncodedRows,
    MaskedAsker,
    class_asker,
    class_encoding,
    encode_class_rows,
    encode_cloze_rows,
    encode_into,
    encode_stream,
)
from recipelib.evaluation import TaskScore, identify_rows, score_chosen, score_classes, score_cloze
from recipelib.models import describe_model, nature_of_model
from recipelib.runtime import Store, UserError, say
from recipelib.task.task import (
    Task,
    begin,
    load_rows_of,
    load_template,
    make_encoder,
    refuse_options_of_texts,
    refuse_predict,
    say_how_many,
)

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(kw_only=True)
class ClassTask(Task):
    """A task with classes.

    Attributes:
        asker: how a row becomes a text: the prompt, or for a masked model the cloze.
        masked: whether the model is a masked language model.
        scored: the evaluation rows as they are read.
        features_seconds: how long computing features took.
        features_of: what they were made of, and how; to make those of other rows.
    """

    asker: CausalAsker | MaskedAsker
    masked: bool
    scored: ClassRows
    features_seconds: float = 0.0
    features_of: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """The labels, in the order of their numbers."""
        return list(self.template.verbalizer)

    @property
    def kind_of_model(self) -> dict[str, Any]:
        """The classes that its head has."""
        return {"classes": self.classes}

    @property
    def read_by(self) -> dict[str, Any]:
        """The head, and how rows become texts."""
        return {"head": "classifier", "masked": self.masked, "classes": self.classes}

    def held_out(self) -> Dataset:
        """The evaluation rows, to follow their loss while training."""
        return self.encode(self.evaluation.rows).examples

    def encode(self, rows: Sequence[Mapping]) -> EncodedRows:
        """Rows with answers as they are trained on."""
        return encode_into(self.store, rows, class_encoding(self.asker))

    def score_untouched(self, model) -> TaskScore:
        """The score of the language model as it is, by its label words."""
        rows, budget = self.evaluation.rows, self.budget["batch_tokens"]
        if not self.masked:
            return super().score(model, "untouched model")
        filled = encode_cloze_rows(self.asker, rows)
        result = score_cloze(
            model, self.asker, filled, batch_tokens=budget, description="scoring untouched model"
        )
        return self._said(result, "untouched model")

    def score_chosen(self, scores: np.ndarray, name: str) -> TaskScore:
        """How well the evaluation rows' classes are told by scores, [rows, classes]."""
        result = score_chosen(self.encoder, self.scored, scores)
        return self._said(result, name)

    @property
    def class_numbers(self) -> np.ndarray:
        """[examples] the class of each training example."""
        return self.encoded.examples.with_format("numpy")["labels"][:]

    def features(
        self, model, frozen: FrozenLayers, args
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """The features of the training examples and of the evaluation rows: by the layer's number
        [rows, width].

        Args:
            model: on its device, or sharded.
            frozen: all its layers.
            args: a recipe's `layer`, `pooling`, `cache`, `cache_dir` and `clear_cache`.
        Raises:
            UserError: the model has no such layer.
        """
        depth, layer = len(frozen.layers), args.layer
        if layer != "all" and not (layer.isdecimal() and int(layer) <= depth):
            raise UserError(f"--layer {layer}: pass a number from 0 to {depth}, or all")
        numbers = range(depth + 1) if layer == "all" else [int(layer)]
        pooling = args.pooling or ("mean" if self.masked else "last")
        texts = {"training": self.encoded.examples["input_ids"][:], "evaluation": self.scored.ids}
        root = cache_folder(args, self.store)
        start, found = time.perf_counter(), []
        with self.memory.sampling():
            for rows, ids in texts.items():
                kept = kept_features(
                    model,
                    frozen,
                    ids,
                    self.tokenizer.pad_token_id,
                    root,
                    layer=None if layer == "all" else int(layer),
                    pooling=pooling,
                    batch_tokens=self.budget["batch_tokens"],
                    description=f"features of {rows} rows",
                )
                found.append(dict(zip(numbers, kept, strict=True)))
        self.features_seconds = time.perf_counter() - start
        self.features_of = {
            "model_name_or_path": args.model_name_or_path,
            "revision": args.revision,
            "pooling": pooling,
        }
        return tuple(found)

    def score(self, model, name: str) -> TaskScore:
        """Let a model with a classification head choose, and say how well it did."""
        result = score_classes(
            model,
            self.encoder,
            self.scored,
            batch_tokens=self.budget["batch_tokens"],
            description=f"scoring {name}",
        )
        return self._said(result, name)

    def _said(self, result: TaskScore, name: str) -> TaskScore:
        identify_rows(result.records, self.evaluation.rows)
        say(f"{name}: {result}")
        return result


def load_class_task(args, training, *, trains: bool = True) -> ClassTask:
    """As `load_task`, for what reads classes from a model's states.

    Args:
        trains: False where the model only gives features.
    Raises:
        UserError: as `load_task`; a template without classes.
    """
    refuse_predict(args)
    if args.streaming and not trains:
        raise UserError("--streaming: features are computed before training; leave it out")
    if training.resume_from_checkpoint and not trains:
        raise UserError("--resume_from_checkpoint: features have no checkpoints; leave it out")
    if training.packing:
        raise UserError("--packing: texts of which a class is read are padded; leave it out")
    refuse_options_of_texts(training)
    template = load_template(args, training)
    if template.options:
        raise UserError(
            f"{template.path}: options: differ from row to row, and a head or a small model has "
            "the same classes for all; run recipes/cloze_sft.py or lora_sft.py"
        )
    if not template.label or not template.verbalizer:
        raise UserError(f"{template.path}: verbalizer: is missing; it names the classes")
    store = Store.of(training)
    train, evaluation = load_rows_of(template, args, training, store)
    if not args.streaming:
        say_how_many(len(train.rows), train.available)
    masked = nature_of_model(args, training).masked
    encoder = make_encoder(template, args, training)
    asker = class_asker(encoder, masked)
    encoding = class_encoding(asker)
    if isinstance(train, RowStream):
        encoded = encode_stream(train, [encoding], training)
    else:
        encoded = encode_into(store, train.rows, encoding)
    task = ClassTask(
        encoder=encoder,
        train=train,
        evaluation=evaluation,
        model_name=describe_model(args.model_name_or_path),
        budget={"batch_tokens": args.eval_batch_tokens},
        encoded=encoded,
        store=store,
        origin=origin_of(template, args, published=training.publish),
        asker=asker,
        masked=masked,
        scored=encode_class_rows(asker, evaluation.rows),
    )
    begin(task, args, training)
    return task
