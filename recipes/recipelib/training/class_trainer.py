"""Training a classification head and what is below it."""

from __future__ import annotations

import torch

from recipelib.encoding import ClassCollator
from recipelib.training.batches import micro_batches
from recipelib.training.choice_trainer import ChoiceTrainer
from recipelib.training.fake_step import MicroBatch
from recipelib.training.memory import MemoryEstimate, estimate_memory


class ClassTrainer(ChoiceTrainer):
    """A `ChoiceTrainer` of a classification head."""

    def __init__(self, model, training, task, **options):
        collator = ClassCollator(task.tokenizer.pad_token_id)
        super().__init__(model, training, task, data_collator=collator, **options)
        self.model.config.use_cache = False  # a head writes nothing

    def scores(self, model, inputs) -> torch.Tensor:
        """[rows, classes] the head's logits."""
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**batch).logits.float()

    def _estimate(self) -> MemoryEstimate:
        lengths = self.task.encoded.lengths
        batches = [lengths[batch] for batch in micro_batches(lengths, self.args)]
        widest = max(batches, key=lambda batch: len(batch) * batch.max())
        padded = bool((widest != widest[0]).any())
        batch = MicroBatch(len(widest), int(widest.max()), len(widest), padded)
        return estimate_memory(self.model, self.args, batch, _loss_of_shapes)


def _loss_of_shapes(model, training, batch: MicroBatch) -> torch.Tensor:
    """The loss of `ClassTrainer` for a batch of these shapes, see `fake_step.step_peaks`."""
    tokens = torch.zeros(batch.rows, batch.width, dtype=torch.long, device=training.device)
    halved = training.bf16 or training.fp16
    dtype = torch.float16 if training.fp16 else torch.bfloat16
    with torch.autocast(training.device.type, dtype, enabled=halved):
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits.float().log_softmax(-1)[:, 0].sum()
