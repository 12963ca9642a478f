"""A task that is examples and nothing else: all that a trainer asks of one."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from datasets import Dataset

from recipelib.encoding.examples import EncodedRows


@dataclass
class ExamplesTask:
    """What `RecipeTrainer` reads of a task. Without a meter no memory is measured and no plan is
    shown.
    """

    encoded: EncodedRows
    tokenizer: object
    held_out_examples: Dataset | None = None
    checkpoint: str | None = None
    memory: None = None
    model_name: str = "a tiny model"
    sources: dict[str, str] = field(default_factory=dict)

    def held_out(self) -> Dataset | None:
        """The examples whose loss is followed while training."""
        return self.held_out_examples


def plain(examples: Dataset) -> list[dict]:
    """The ids and labels of examples, without what else their columns hold."""
    return examples.select_columns(["input_ids", "labels"]).to_list()


def encoded_from(examples: Iterable[dict]) -> EncodedRows:
    """Examples, each `input_ids` and `labels`, as if they had been encoded."""
    return EncodedRows.of((example["input_ids"], example["labels"]) for example in examples)


def examples_task(
    examples: Sequence[dict] | Dataset,
    tokenizer,
    held_out: Sequence[dict] | Dataset | None = None,
    checkpoint: str | None = None,
) -> ExamplesTask:
    """A task of these examples, each `input_ids` and `labels`. The tokenizer is copied: a trainer
    gives it a pad token.
    """
    held_out = encoded_from(held_out).examples if held_out else None
    return ExamplesTask(encoded_from(examples), copy.deepcopy(tokenizer), held_out, checkpoint)
