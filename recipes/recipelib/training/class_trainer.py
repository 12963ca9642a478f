"""Training a classification head and what is below it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from recipelib.encoding import ClassCollator
from recipelib.training.batches import micro_batches
from recipelib.training.fake_step import MicroBatch
from recipelib.training.memory import MemoryEstimate, estimate_memory
from recipelib.training.trainer import RecipeTrainer


class ClassTrainer(RecipeTrainer):
    """A `RecipeTrainer` whose loss is the cross-entropy of the right class."""

    def __init__(self, model, training, task, **options):
        training.remove_unused_columns = False
        collator = ClassCollator(task.tokenizer.pad_token_id)
        super().__init__(model, training, task, data_collator=collator, **options)
        # A step's loss is a mean over its rows, as below.
        self._loss_shifts_labels = False
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the classes, summed over the rows and divided by the number of rows in
        the whole step, of all processes and accumulation steps.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        loss = F.cross_entropy(
            logits,
            inputs["labels"],
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if num_items_in_batch is None:
            loss = loss / len(logits)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the gradients will be averaged
        if model.training:
            self.slots_seen += ids.numel()
            self.tokens_seen += int(mask.sum())
        return (loss, {"scores": logits}) if return_outputs else loss

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
