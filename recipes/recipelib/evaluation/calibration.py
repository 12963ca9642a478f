"""Scores of candidates from one set of likelihoods: plain, per length, and calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from recipelib.prompts import label_scores


class Word(NamedTuple):
    """An answer that stands for a label: its log-likelihood (nats), and its length."""

    log_likelihood: float
    tokens: int
    bytes: int


Words = Mapping[str, Sequence[Word]]


def candidate_scores(
    words: Words, content_free: Sequence[Words] = (), alone: Words | None = None
) -> dict[str, dict[str, float]]:
    """Each kind's score of each label; the largest wins.

    - sum: the log-probability that any of a label's words is the answer.
    - mean, bytes: of a label's words the best log-likelihood per token, and per UTF-8 byte.
    - pmi: domain-conditional pointwise mutual information (Holtzman et al. 2021,
      arXiv:2104.08315): `sum` less that of a prompt without content and without demonstrations.
    - calibrated: contextual calibration (Zhao et al. 2021, arXiv:2102.09690): the probabilities of
      the labels, which sum to one, over their mean for prompts without content under the same
      demonstrations; log of it, normalized.

    What is impossible (-inf) stays so in every kind; `calibrated` gives all labels the same where
    none is possible.

    Args:
        words: label -> its words' likelihoods behind the prompt.
        content_free: the same behind each prompt without content; empty leaves `calibrated` out.
        alone: the same without demonstrations; None leaves `pmi` out.
    """
    sums = _sums(words)
    scores = {
        "sum": sums,
        "mean": {
            label: max(one.log_likelihood / one.tokens for one in some)
            for label, some in words.items()
        },
        "bytes": {
            label: max(one.log_likelihood / one.bytes for one in some)
            for label, some in words.items()
        },
    }
    if alone is not None:
        prior = _sums(alone)
        scores["pmi"] = {label: _less(value, prior[label]) for label, value in sums.items()}
    if content_free:
        free = [_normalized(_sums(one)) for one in content_free]
        # Their sum instead of their mean: what comes of it is normalized.
        prior = label_scores({label: [one[label] for one in free] for label in words})
        scores["calibrated"] = _normalized(
            {label: _less(value, prior[label]) for label, value in sums.items()}
        )
    return scores


def pair_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What a candidate is worth that was asked with yes or no: by how much yes leads, by kind."""
    return {kind: _less(values["yes"], values["no"]) for kind, values in scores.items()}


def probabilities(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as probabilities of the labels: their softmax."""
    return {label: math.exp(value) for label, value in _normalized(scores).items()}


def _sums(words: Words) -> dict[str, float]:
    return label_scores(
        {label: [one.log_likelihood for one in some] for label, some in words.items()}
    )


def _less(value: float, other: float) -> float:
    return value if value == -math.inf else value - other  # -inf less -inf would be no number


def _normalized(scores: Mapping[str, float]) -> dict[str, float]:
    """Log-probabilities that sum to one; where the best are infinite, those share it evenly."""
    best = max(scores.values())
    if math.isinf(best):
        scores = {label: 0.0 if one == best else -math.inf for label, one in scores.items()}
    total = label_scores({"all": list(scores.values())})["all"]
    return {label: value - total for label, value in scores.items()}
