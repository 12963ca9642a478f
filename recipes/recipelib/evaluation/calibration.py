"""Scores of labels from one set of likelihoods: plain, per length, and calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from recipelib.prompts import label_scores


class Word(NamedTuple):
    """A word that stands for a label: its log-likelihood (nats), and its length."""

    log_likelihood: float
    tokens: int
    bytes: int


Words = Mapping[str, Sequence[Word]]


def candidate_scores(
    words: Words, content_free: Sequence[Words] = (), alone: Words | None = None
) -> dict[str, dict[str, float]]:
    """Kind -> label -> score; the label with the largest score wins.

    - sum: the log-probability that any of a label's words is the answer.
    - mean, bytes: the best log-likelihood per token, or per UTF-8 byte, among a label's words.
    - pmi: domain-conditional pointwise mutual information (Holtzman et al. 2021,
      arXiv:2104.08315): `sum` less that of a prompt without content and without demonstrations.
    - calibrated: contextual calibration (Zhao et al. 2021, arXiv:2102.09690): the probabilities of
      the labels, which sum to one, divided by their mean for prompts without content under the same
      demonstrations; the logarithm of that, normalized.

    What is impossible (-inf) stays so in every kind; where no label is possible, `calibrated` gives
    all the same.

    Args:
        words: label -> its words' likelihoods after the prompt.
        content_free: the same after each prompt without content; empty leaves `calibrated` out.
        alone: the same without demonstrations; None leaves `pmi` out.
    """
    sums = _sums(words)
    scores = {
        "sum": sums,
        "mean": {
            label: max(word.log_likelihood / word.tokens for word in label_words)
            for label, label_words in words.items()
        },
        "bytes": {
            label: max(word.log_likelihood / word.bytes for word in label_words)
            for label, label_words in words.items()
        },
    }
    if alone is not None:
        prior = _sums(alone)
        scores["pmi"] = {label: _less(value, prior[label]) for label, value in sums.items()}
    if content_free:
        free = [_normalized(_sums(empty)) for empty in content_free]
        # The probabilities' sum in place of their mean: the result is normalized.
        prior = label_scores({label: [log_probs[label] for log_probs in free] for label in words})
        scores["calibrated"] = _normalized(
            {label: _less(value, prior[label]) for label, value in sums.items()}
        )
    return scores


def pair_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Kind -> score of a candidate that was asked about with yes or no: by how much yes leads."""
    return {kind: _less(values["yes"], values["no"]) for kind, values in scores.items()}


def probabilities(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as probabilities of the labels: their softmax."""
    return {label: math.exp(value) for label, value in _normalized(scores).items()}


def _sums(words: Words) -> dict[str, float]:
    return label_scores(
        {
            label: [word.log_likelihood for word in label_words]
            for label, label_words in words.items()
        }
    )


def _less(value: float, other: float) -> float:
    return value if value == -math.inf else value - other  # -inf less -inf would be no number


def _normalized(scores: Mapping[str, float]) -> dict[str, float]:
    """Log-probabilities that sum to one; infinite best scores share it evenly."""
    best = max(scores.values())
    if math.isinf(best):
        scores = {label: 0.0 if score == best else -math.inf for label, score in scores.items()}
    total = label_scores({"all": list(scores.values())})["all"]
    return {label: value - total for label, value in scores.items()}
