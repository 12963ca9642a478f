"""Label words for a task that has none, found with a few labeled rows (LM-BFF, Gao et al. 2021,
arXiv:2012.15723, section 4.1).

For each class the words that its rows make likely in the cloze are candidates. Among them one word
per class is sought, so that together they tell the rows apart: class by class in turn, until no
change helps. The paper tries all combinations, which is possible with few classes only.
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
MOST_ROWS = 1000  # of training and of evaluation; each holds the whole vocabulary in memory
ROWS_AT_ONCE = 8
_ROUNDS = 10


@dataclass
class LabelWords:
    """The result of the search.

    Attributes:
        words: label -> its word.
        train, evaluation: the accuracy of these words on the rows.
        others: label -> the best words for it, the chosen one included, each with both accuracies.
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
) -> LabelWords:
    """One word per class, so that they tell the training rows apart; the evaluation rows are only
    scored.

    Args:
        train, evaluation: as `encode_cloze_rows` gives them; of many rows MOST_ROWS are drawn.
        seed: of the draw.
    Raises:
        UserError: pairs that are asked once per word, which have no words of their own; a class
            without rows, or for which no word was found.
    """
    if train.asked[0].questions[0].asked is not None and isinstance(asker, CausalAsker):
        raise UserError(
            f"{asker.encoder.template.path}: a pair that is asked once per label has no words of "
            "its own; pass --cloze true"
        )
    classes = list(asker.encoder.template.verbalizer)
    draw = random.Random(seed)
    asked, held_out = (
        draw.sample(rows.asked, min(MOST_ROWS, len(rows.asked))) for rows in (train, evaluation)
    )
    likely, gold = _at_cloze(model, asker, asked, "reading training rows")
    words = _candidates(asker, train.asked[0].questions[0], likely, gold, len(classes))
    tokens = [[token for _, token in class_words] for class_words in words]
    chosen = _choose(likely, gold, tokens)
    held, held_gold = _at_cloze(model, asker, held_out, "reading evaluation rows")

    def accuracies(picked: Sequence[int]) -> tuple[float, float]:
        ids = [class_tokens[at] for class_tokens, at in zip(tokens, picked, strict=True)]
        return tuple(
            (rows[:, ids].argmax(-1) == labels).float().mean().item()
            for rows, labels in ((likely, gold), (held, held_gold))
        )

    others = {}
    for number, label in enumerate(classes):
        tried = []
        for at, (word, _) in enumerate(words[number]):
            picked = [*chosen[:number], at, *chosen[number + 1 :]]
            tried.append((word, *accuracies(picked)))
        others[label] = sorted(tried, key=lambda entry: -entry[1])[:SHOWN]
    best = {label: words[number][chosen[number]][0] for number, label in enumerate(classes)}
    return LabelWords(best, *accuracies(chosen), others)


@torch.no_grad()
def _at_cloze(
    model, asker: CausalAsker | MaskedAsker, asked: Sequence[Asked], description: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, vocabulary] log-probabilities of the first token in the cloze, and [rows] labels."""
    run, classes = Lockstep(model), list(asker.encoder.template.verbalizer)
    model.eval()
    rank, world = process_group()
    examples: dict[int, Example] = {}
    for number in range(rank, len(asked), world):
        row = asked[number]
        if isinstance(asker, CausalAsker):
            ids = row.prompts[0].ids
            place = len(ids) - 1
        else:
            ids, (place,), _ = asker.encoder.cloze(row.questions[0], 1)
        # Whatever token is named: the log-probabilities of all tokens at this place are used.
        reads = {"lengths": [len(ids)], "reads": [[0, place, 0, 0, 1]]}
        examples[number] = {"input_ids": ids, **reads, "word_labels": [0], "labels": 0}
    own = sorted(examples, key=lambda number: examples[number]["lengths"])
    log_probs: dict[int, torch.Tensor] = {}
    with run, progress_bar(description, len(own)) as bar:
        for start in range(0, len(own), ROWS_AT_ONCE):
            numbers = own[start : start + ROWS_AT_ONCE]
            batch = collate([examples[number] for number in numbers])
            ids, mask, places = (
                batch[name].to(run.device) for name in ("input_ids", "attention_mask", "places")
            )
            with logits_at(model, places, ids.shape[1]):
                logits = run(input_ids=ids, attention_mask=mask, use_cache=False).logits
            likely = logits[0].float().log_softmax(-1).cpu()
            # Copies: a view that is sent to other processes would take its whole batch along.
            log_probs |= {number: row.clone() for number, row in zip(numbers, likely, strict=True)}
            bar.update(len(numbers))
    log_probs = gather_results(log_probs)
    labels = [classes.index(row.questions[0].label) for row in asked]
    return torch.stack([log_probs[number] for number in range(len(asked))]), torch.tensor(labels)


def _candidates(
    asker: CausalAsker | MaskedAsker,
    question: Question,
    likely: torch.Tensor,
    gold: torch.Tensor,
    classes: int,
) -> list[list[tuple[str, int]]]:
    """For each class the whole words that its rows make likeliest, each with its token."""
    text, template = asker.encoder.text, asker.encoder.template
    encode, candidates = word_encoder(asker, question), []
    for label in range(classes):
        rows, name = likely[gold == label], list(template.verbalizer)[label]
        if not len(rows):
            raise UserError(f"{template.path}: no training row has the label {name!r}; add some")
        words: dict[str, tuple[str, int]] = {}
        for token in rows.mean(0).argsort(descending=True).tolist():
            word = text.tokenizer.decode([token]).strip()
            # A word that the template encodes as this token; of its letter cases the likeliest.
            if word.isalpha() and len(word) > 1 and encode(word) == [token]:
                words.setdefault(word.casefold(), (word, token))
            if len(words) == CANDIDATES:
                break
        if len(words) < classes:  # each class takes a different one
            raise UserError(
                f"{template.path}: {len(words)} words of one token can fill the cloze for "
                f"{name!r}; put a space in front of it"
            )
        candidates.append(list(words.values()))
    return candidates


def _choose(likely: torch.Tensor, gold: torch.Tensor, tokens: list[list[int]]) -> list[int]:
    """For each class the place of its word in `tokens`, so that the words together tell the rows
    apart best; of a tie those that make the right class likelier.
    """
    # Start at the word that most sets a class apart from the others.
    chosen, taken = [], set()
    for label, ids in enumerate(tokens):
        apart = likely[gold == label][:, ids].mean(0) - likely[gold != label][:, ids].mean(0)
        order = apart.argsort(descending=True).tolist()
        chosen.append(next(at for at in order if ids[at] not in taken))
        taken.add(ids[chosen[-1]])
    for _ in range(_ROUNDS):
        before = list(chosen)
        for label, ids in enumerate(tokens):
            picked = [words[at] for words, at in zip(tokens, chosen, strict=True)]
            scores = likely[:, picked][:, None].repeat(1, len(ids), 1)  # [rows, words, labels]
            scores[:, :, label] = likely[:, ids]
            right = (scores.argmax(-1) == gold[:, None]).float().mean(0)
            sure = scores.log_softmax(-1)[torch.arange(len(gold)), :, gold].mean(0)
            others = {token for place, token in enumerate(picked) if place != label}
            chosen[label] = max(
                (at for at in range(len(ids)) if ids[at] not in others),
                key=lambda at, right=right, sure=sure: (right[at].item(), sure[at].item()),
            )
        if chosen == before:
            break
    return chosen
