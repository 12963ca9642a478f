"""Label words for a task that has none, found with a few labeled rows (LM-BFF, Gao et al. 2021,
arXiv:2012.15723, section 4.1).

For each class the words that its rows make likely in the blank are candidates. Among them one word
per class is sought that together tell the rows apart, class by class in turn until none gains: the
paper tries all combinations, which only few classes allow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipelib.encoding import (
    Asked,
    CausalAsker,
    ClozeRows,
    Example,
    MaskedAsker,
    collate,
    word_encoder,
)
from recipelib.inference import Lockstep, gather_results, process_group
from recipelib.models import logits_at
from recipelib.prompts import Question
from recipelib.runtime import UserError, progress_bar

CANDIDATES = 100  # words per class that are tried
SHOWN = 8  # words per class that are shown
MOST_ROWS = 1000  # of training and of evaluation; each costs the whole vocabulary in memory
ROWS_AT_ONCE = 8
_ROUNDS = 10


@dataclass
class LabelWords:
    """What the search came to.

    Attributes:
        words: label -> its word.
        train, evaluation: the accuracy with these words on the rows.
        others: label -> the best words in its place, each with both accuracies.
    """

    words: dict[str, str]
    train: float
    evaluation: float
    others: dict[str, list[tuple[str, float, float]]]


def search_label_words(
    model,
    asker: CausalAsker | MaskedAsker,
    train: ClozeRows,
    evaluation: ClozeRows,
    seed: int = 42,
    *,
    batch_tokens: int = 4096,
) -> LabelWords:
    """A word for each class that tells the training rows apart; the evaluation rows are only
    scored.

    Args:
        train, evaluation: as `encode_cloze_rows` gives them; of many rows MOST_ROWS are drawn.
        seed: of the draw.
        batch_tokens: tokens in one forward pass, padding included; at most ROWS_AT_ONCE rows.
    Raises:
        UserError: pairs that are asked once per word have no words of their own; a class without
            rows, or for which no word was found.
    """
    if train.asked[0].questions[0].asked is not None and isinstance(asker, CausalAsker):
        raise UserError(
            f"{asker.encoder.template.path}: label words: a pair that is asked once per "
            "label has no words of its own; pass --cloze true"
        )
    classes = list(asker.encoder.template.verbalizer)
    draw = random.Random(seed)
    some, held_out = (
        draw.sample(rows.asked, min(MOST_ROWS, len(rows.asked))) for rows in (train, evaluation)
    )
    likely, gold = _at_cloze(model, asker, some, batch_tokens, "reading training rows")
    words = _candidates(asker, train.asked[0].questions[0], likely, gold, len(classes))
    tokens = [[token for _, token in some] for some in words]
    chosen = _choose(likely, gold, tokens)
    held, held_gold = _at_cloze(model, asker, held_out, batch_tokens, "reading evaluation rows")

    def accuracies(picked: Sequence[int]) -> tuple[float, float]:
        ids = [some[at] for some, at in zip(tokens, picked, strict=True)]
        return tuple(
            (rows[:, ids].argmax(-1) == labels).float().mean().item()
            for rows, labels in ((likely, gold), (held, held_gold))
        )

    others = {}
    for number, label in enumerate(classes):
        tried = []
        for at, (word, _) in enumerate(words[number]):
            picked = [at if place == number else one for place, one in enumerate(chosen)]
            tried.append((word, *accuracies(picked)))
        others[label] = sorted(tried, key=lambda one: -one[1])[:SHOWN]
    best = {label: words[number][chosen[number]][0] for number, label in enumerate(classes)}
    return LabelWords(best, *accuracies(chosen), others)


@torch.no_grad()
def _at_cloze(
    model,
    asker: CausalAsker | MaskedAsker,
    asked: Sequence[Asked],
    batch_tokens: int,
    description: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, vocabulary] log-probabilities of the first token in the blank, and [rows] labels."""
    run, classes = Lockstep(model), list(asker.encoder.template.verbalizer)
    model.eval()
    rank, world = process_group()
    examples: dict[int, Example] = {}
    for number in range(rank, len(asked), world):
        one = asked[number]
        if isinstance(asker, CausalAsker):
            ids = one.prompts[0].ids
            place = len(ids) - 1
        else:
            ids, (place,), _ = asker.encoder.cloze(one.questions[0], 1)
        # Any token, for all of them are read.
        reads = {"lengths": [len(ids)], "reads": [[0, place, 0, 0, 1]]}
        examples[number] = {"input_ids": ids, **reads, "word_labels": [0], "labels": 0}
    own = sorted(examples, key=lambda number: examples[number]["lengths"])
    longest = max((len(example["input_ids"]) for example in examples.values()), default=1)
    at_once = max(1, min(ROWS_AT_ONCE, batch_tokens // longest))
    found: dict[int, torch.Tensor] = {}
    with run, progress_bar(description, len(own)) as bar:
        for start in range(0, len(own), at_once):
            some = own[start : start + at_once]
            batch = collate([examples[number] for number in some])
            ids, mask, places = (
                batch[name].to(run.device) for name in ("input_ids", "attention_mask", "places")
            )
            with logits_at(model, places, ids.shape[1]):
                logits = run(input_ids=ids, attention_mask=mask, use_cache=False).logits
            likely = logits[0].float().log_softmax(-1).cpu()
            # Copies, since a row that is sent to others would take its neighbors along.
            found |= {number: row.clone() for number, row in zip(some, likely, strict=True)}
            bar.update(len(some))
    found = gather_results(found)
    labels = [classes.index(one.questions[0].label) for one in asked]
    return torch.stack([found[number] for number in range(len(asked))]), torch.tensor(labels)


def _candidates(
    asker: CausalAsker | MaskedAsker,
    question: Question,
    likely: torch.Tensor,
    gold: torch.Tensor,
    classes: int,
) -> list[list[tuple[str, int]]]:
    """For each class the whole words that its rows make likeliest, with their tokens."""
    text, template = asker.encoder.text, asker.encoder.template
    encode, found = word_encoder(asker, question), []
    for label in range(classes):
        rows, name = likely[gold == label], list(template.verbalizer)[label]
        if not len(rows):
            raise UserError(f"label words: no training row has the label {name!r}")
        some: dict[str, tuple[str, int]] = {}
        for token in rows.mean(0).argsort(descending=True).tolist():
            word = text.tokenizer.decode([token]).strip()
            # A word that stands in the template as it does in the text, in one letter case.
            if word.isalpha() and len(word) > 1 and encode(word) == [token]:
                some.setdefault(word.casefold(), (word, token))
            if len(some) == CANDIDATES:
                break
        if len(some) < classes:  # each class takes another
            raise UserError(
                f"label words: {len(some)} words of one token can stand in the blank for "
                f"{name!r}; put a space in front of it in {template.path.name}"
            )
        found.append(list(some.values()))
    return found


def _choose(likely: torch.Tensor, gold: torch.Tensor, tokens: list[list[int]]) -> list[int]:
    """For each class the place of its word, so that together they tell the rows apart best; of
    equals the words that make the right class likelier.
    """
    # Start at the word that most sets a class apart from the others.
    chosen, taken = [], set()
    for label, some in enumerate(tokens):
        apart = likely[gold == label][:, some].mean(0) - likely[gold != label][:, some].mean(0)
        order = apart.argsort(descending=True).tolist()
        chosen.append(next(at for at in order if some[at] not in taken))
        taken.add(some[chosen[-1]])
    for _ in range(_ROUNDS):
        before = list(chosen)
        for label, some in enumerate(tokens):
            picked = [words[at] for words, at in zip(tokens, chosen, strict=True)]
            scores = likely[:, picked][:, None].repeat(1, len(some), 1)  # [rows, words, labels]
            scores[:, :, label] = likely[:, some]
            right = (scores.argmax(-1) == gold[:, None]).float().mean(0)
            sure = scores.log_softmax(-1)[torch.arange(len(gold)), :, gold].mean(0)
            others = {token for place, token in enumerate(picked) if place != label}
            chosen[label] = max(
                (at for at in range(len(some)) if some[at] not in others),
                key=lambda at, right=right, sure=sure: (right[at].item(), sure[at].item()),
            )
        if chosen == before:
            break
    return chosen
