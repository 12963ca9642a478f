"""A task that is examples and nothing else: all that a trainer asks of one."""

import copy
from dataclasses import dataclass, field

from recipelib.encoding.examples import EncodedRows


@dataclass
class ExamplesTask:
    """What `RecipeTrainer` reads of a task. Without a meter no memory is measured and no plan is
    shown.
    """

    encoded: EncodedRows
    tokenizer: object
    held_out_examples: list[dict] = field(default_factory=list)
    checkpoint: str | None = None
    memory: None = None
    model_name: str = "a tiny model"
    sources: dict[str, str] = field(default_factory=dict)

    def held_out(self) -> list[dict]:
        """The examples whose loss is followed while training."""
        return self.held_out_examples


def examples_task(
    examples: list[dict],
    tokenizer,
    held_out: list[dict] | None = None,
    checkpoint: str | None = None,
) -> ExamplesTask:
    """A task of these examples, each `input_ids` and `labels`. The tokenizer is copied: a trainer
    gives it a pad token.
    """
    encoded = EncodedRows()
    for row, example in enumerate(examples):
        encoded.add(row, example["input_ids"], example["labels"])
    encoded.counts.rows = len(examples)
    return ExamplesTask(encoded, copy.deepcopy(tokenizer), held_out or [], checkpoint)
