"""Label words that cannot be told apart; their scores -> the labels' scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from recipelib.prompts.values import plain

if TYPE_CHECKING:
    import torch


COMBINE = ("logsumexp", "mean", "max")


def same_word(words: Iterable[str]) -> tuple[str, str] | None:
    """Two of these words that are the same where answers are read; None if there are none."""
    seen: dict[str, str] = {}
    for word in words:
        other = seen.setdefault(plain(word), word)
        if other is not word:
            return other, word
    return None


def label_scores(words: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The log-probability that any of a label's words is the answer: log-sum-exp over its words.

    Args:
        words: label -> log-probabilities (nats) of its words.
    """
    scores = {}
    for label, values in words.items():
        best = max(values)
        # Where all words are impossible, -inf - -inf would be NaN.
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

    First the words' probabilities are normalized to sum to one over all words. If `content_free` is
    given, they are divided by the probabilities that the words have in a text without content
    (contextual calibration, Zhao et al. 2021, arXiv:2102.09690; word by word, as OpenPrompt's
    ManualVerbalizer) and normalized again. Then "logsumexp" adds up the probabilities of a label's
    words, "mean" takes their geometric mean (OpenPrompt), "max" the likeliest word.

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
        scores = [group.logsumexp(-1) for group in groups]
    elif combine == "mean":
        scores = [group.mean(-1) for group in groups]
    else:
        scores = [group.amax(-1) for group in groups]
    return torch.stack(scores, -1)
