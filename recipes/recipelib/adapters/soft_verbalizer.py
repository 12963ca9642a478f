"""A trained embedding for each label in place of the head's last layer (WARP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from recipelib.models import bare_model


class SoftVerbalizer(torch.nn.Module):
    """A trained embedding for each label in place of the head's last layer (Hambardzumyan et al.
    2021, WARP, arXiv:2101.00121). It starts at the mean of the label's words.

    After `into`, a model's vocabulary is the labels, one "token" for each: see `soft_requests`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """For [labels, size] embeddings and [labels] biases."""
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.bias = None if bias is None else torch.nn.Parameter(bias)

    @classmethod
    def at_words(cls, model, words: Mapping[str, Sequence[Sequence[int]]]) -> SoftVerbalizer:
        """The embeddings that training starts from.

        Args:
            words: label -> the ids of its words.
        """
        head = bare_model(model).get_output_embeddings()
        bias = getattr(head, "bias", None)
        return cls(
            _means(head.weight.detach(), words),
            None if bias is None else _means(bias.detach(), words),
        )

    def into(self, model) -> None:
        """Replace the last layer of a model's head; the model gets it as `soft_verbalizer`."""
        bare = bare_model(model)
        bare.soft_verbalizer = self.to(bare.device)
        bare.get_output_embeddings().forward = self.forward

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., size] states -> [..., labels] logits."""
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias)


def _means(rows: torch.Tensor, words: Mapping[str, Sequence[Sequence[int]]]) -> torch.Tensor:
    """[labels, ...] for each label the mean over its words, each the mean of its tokens' rows."""
    return torch.stack(
        [
            torch.stack([rows[list(ids)].mean(0) for ids in label_words]).mean(0)
            for label_words in words.values()
        ]
    ).float()
