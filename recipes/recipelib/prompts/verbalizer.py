"""Label words' scores -> a label's score; and what a tokenizer makes of the words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recipelib.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

    from recipelib.encoding.tokens import TextEncoder
    from recipelib.prompts.template import PromptTemplate

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


def check_words(
    template: PromptTemplate,
    text: TextEncoder,
    encoded: Mapping[str, Sequence[Sequence[int]]],
    before: str = "",
) -> list[str]:
    """What a user should know of how a tokenizer encodes the label words, one line each.

    Args:
        encoded: label -> the ids of its words as they stand in the text that is asked.
        before: the character in front of them there.
    Raises:
        UserError: a word that the tokenizer does not know, or words of two labels that it cannot
            tell apart.
    """
    tokenizer, notes = text.tokenizer, []
    # Other scripts may have no spaces between words.
    glued = before.isascii() and bool(before.strip()) and before not in "([{<\"'`/-_"
    seen: dict[tuple[int, ...], tuple[str, str]] = {}
    for label, words in template.verbalizer.items():
        for word, ids in zip(words, map(tuple, encoded[label]), strict=True):
            where = f"{template.path.name}: verbalizer.{label}: {word!r}"
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise UserError(
                    f"{where}: the tokenizer does not know it ({tokenizer.unk_token}); choose "
                    "another word"
                )
            other, its_word = seen.setdefault(ids, (label, word))
            if other != label:
                raise UserError(
                    f"{where}: the tokenizer cannot tell it from {its_word!r} of {other!r}; "
                    "choose another word"
                )
            spaced = tuple(text.encode(f" {word}"))
            if glued and spaced != ids:
                notes.append(
                    f"{where}: stands right behind {before!r}, as another word to the model than "
                    "behind a space; put one in front of it"
                )
            elif len(spaced) < len(ids):
                notes.append(
                    f"{where}: is {_pieces(tokenizer, ids)} where it stands and "
                    f"{_pieces(tokenizer, spaced)} behind a space; put one in front of the word"
                )
            elif len(ids) > 1:
                notes.append(
                    f"{where}: is {len(ids)} tokens, {_pieces(tokenizer, ids)}: each must be "
                    "likely; a word of one token competes on equal terms"
                )
    return notes


def _pieces(tokenizer, ids: Sequence[int]) -> str:
    return "|".join(tokenizer.decode([one]) for one in ids)
