"""Label words' scores -> a label's score."""

import math
from collections.abc import Mapping, Sequence


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
