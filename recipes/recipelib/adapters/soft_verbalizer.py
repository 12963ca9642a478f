"""A trained embedding per label in place of the head's last layer (WARP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from recipelib.models import bare_model


class SoftVerbalizer(torch.nn.Module):
    """A trained embedding for each label in place of the head's last layer (Hambardzumyan et al.
    2021, WARP, arXiv:2101.00121). It starts at the mean of the label's words.

    The model that it is put `into` has one "token" for each label: see `soft_requests`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """For [labels, size] embeddings and [labels] biases."""
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.bias = None if bias is None else torch.nn.Parameter(bias)

    @classmethod
    def at_words(cls, model, words: Mapping[str, Sequence[Sequence[int]]]) -> SoftVerbalizer:
        """The one that training starts from.

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
        """Take the place of the last layer of a model's head, as its `soft_verbalizer`."""
        bare = bare_model(model)
        bare.soft_verbalizer = self.to(bare.device)
        bare.get_output_embeddings().forward = self.forward

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., size] states -> [..., labels] logits."""
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias)


def _means(rows: torch.Tensor, words: Mapping[str, Sequence[Sequence[int]]]) -> torch.Tensor:
    return torch.stack(
        [torch.stack([rows[list(ids)].mean(0) for ids in some]).mean(0) for some in words.values()]
    ).float()
