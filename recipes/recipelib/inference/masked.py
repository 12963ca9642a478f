"""The likelihood of label words in a cloze, for masked language models.

A word of several tokens gets as many masks, which are filled from left to right: the probability of
each token given the text, the tokens before it and the masks behind it (Schick and Schuetze 2021,
arXiv:2009.07118, fill the likeliest first; from left to right is the order of causal models, and
makes the probabilities of all words of a length sum to one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.scoring import CPU_PASS_TOKENS, plan_padded, run_passes
from recipelib.inference.token_tree import Pass


class Cloze(NamedTuple):
    """A text with masks, the places of the masks, and the words that may fill them: the ids of
    each, one per mask.
    """

    ids: list[int]
    masks: list[int]
    words: list[list[int]]


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def masked_log_likelihoods(
    model,
    clozes: Sequence[Cloze],
    *,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> list[list[float]]:
    """The log-probability (nats, summed over tokens) of each word of each cloze.

    Args:
        batch_tokens: tokens in one forward pass at most, padding included.
        description, journal: as in `scoring.log_likelihoods`.
    Raises:
        UserError: a single cloze does not fit into memory.
    """
    # What must be computed: each cloze with each distinct beginning of its words filled in.
    steps: list[tuple[list[int], int, list[int]]] = []  # ids, the mask to read, tokens asked
    places: list[list[tuple[int, int]]] = []  # (cloze, word) of each token asked
    for number, cloze in enumerate(clozes):
        filled: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for place, word in enumerate(cloze.words):
            for length, token in enumerate(word):
                filled.setdefault(tuple(word[:length]), []).append((place, token))
        for beginning, asked in filled.items():
            ids = list(cloze.ids)
            for mask, token in zip(cloze.masks, beginning, strict=False):
                ids[mask] = token
            steps.append((ids, cloze.masks[len(beginning)], [token for _, token in asked]))
            places.append([(number, place) for place, _ in asked])

    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def compute(some: Sequence, one: Pass) -> list[list[float]]:
        width = max(len(ids) for ids, _, _ in some)
        ids = torch.zeros(len(some), width, dtype=torch.long)
        mask = torch.zeros(len(some), width, dtype=torch.long)
        for number, (row, _, _) in enumerate(some):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        logits = run(input_ids=ids.to(run.device), attention_mask=mask.to(run.device)).logits
        # The last columns: a soft prompt stands in front.
        read = [logits.shape[1] - width + place for _, place, _ in some]
        log_probs = logits[list(range(len(some))), read].float().log_softmax(-1)
        return [row[tokens].tolist() for row, (_, _, tokens) in zip(log_probs, some, strict=True)]

    def plan(some: Sequence, budget: int) -> list[Pass]:
        return plan_padded([len(ids) for ids, _, _ in some], budget)

    found = run_passes(run, steps, plan, compute, batch_tokens, description, journal)
    sums = [[0.0] * len(cloze.words) for cloze in clozes]
    for index, members in enumerate(places):
        for (number, place), value in zip(members, found[index], strict=True):
            sums[number][place] += value
    return sums
