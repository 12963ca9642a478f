"""Label words' scores -> a label's score; and what a tokenizer makes of the words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


COMBINE = ("logsumexp", "mean", "max")


def label_scores(words: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The log-probability that any of a label's words is the answer: log-sum-exp over its words.

    Args:
        words: label -> log-probabilities (nats) of its words.
    """
    scores = {}
    for label, values in words.items():
        best = max(values)
        # Where all are impossible, -inf less -inf would be no number.
        rest = sum(math.exp(value - best) for value in values) if best > -math.inf else 1.0
        scores[label] = best + math.log(rest)
    return scores


def combine_words(
    words: torch.Tensor,
    labels: torch.Tensor,
    combine: str = "logsumexp",
    content_free: torch.Tensor | None = None,
) -> torch.Tensor:
    """The labels' scores, with gradients, from their words' log-likelihoods.

    The words' probabilities are made to sum to one over all words, and divided by those of a text
    without content where these are given (contextual calibration, Zhao et al. 2021,
    arXiv:2102.09690, word by word as OpenPrompt's ManualVerbalizer). Log-sum-exp adds up the
    probabilities of a label's words, "mean" takes their geometric mean (OpenPrompt), "max" the
    likeliest word.

    Args:
        words: [rows, words] log-likelihoods (nats).
        labels: [words] the label of each word: 0, 1, ...
        content_free: [words] log-likelihoods without content.

    Returns:
        [rows, labels].
    """
    import torch

    words = words.log_softmax(-1)
    if content_free is not None:
        words = (words - content_free.log_softmax(-1)).log_softmax(-1)
    groups = [words[:, labels == label] for label in range(int(labels.max()) + 1)]
    if combine == "logsumexp":
        found = [group.logsumexp(-1) for group in groups]
    elif combine == "mean":
        found = [group.mean(-1) for group in groups]
    else:
        found = [group.amax(-1) for group in groups]
    return torch.stack(found, -1)
