"""Training to choose: the loss over labels, whatever scores them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from recipelib.encoding import IGNORED
from recipelib.training.trainer import RecipeTrainer


class ChoiceTrainer(RecipeTrainer):
    """A `RecipeTrainer` whose loss is the cross-entropy of the right label among the labels; what
    scores them, a trainer of its own says.
    """

    def __init__(self, model, training, task, **options):
        training.remove_unused_columns = False
        # No loss here balances experts, whose mask would not know of a soft prompt's positions.
        training.router_aux_loss_coef = 0.0
        super().__init__(model, training, task, **options)
        # A step's loss is a mean over its rows, as below. The loss of masked models themselves
        # ignores the number of rows and comes out multiplied by the accumulation steps.
        self._loss_shifts_labels = False
        self.model_accepts_loss_kwargs = True

    @property
    def ends(self) -> list[int]:
        """None: nothing is learned to be written."""
        return []

    def scores(self, model, inputs) -> torch.Tensor:
        """[rows, labels] the score of each label, with gradients."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the labels, summed over the rows and divided by the number of rows in
        the whole step, of all processes and accumulation steps.
        """
        scores = self.scores(model, inputs)
        loss = F.cross_entropy(
            scores,
            inputs["labels"],
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"] != IGNORED).sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the gradients will be averaged
        if model.training:
            self.slots_seen += inputs["input_ids"].numel()
            self.tokens_seen += int(inputs["attention_mask"].sum())
        return (loss, {"scores": scores}) if return_outputs else loss
