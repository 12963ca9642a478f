"""Labels chosen by likelihood: of what follows a prompt (`score_labels`), or of what fills a cloze
(`score_cloze`).

Three things differ between the two: which requests are made of a row (by an asker, or prepared
cloze rows), how likely their words are (`inference`), and how words make a label's score
(`calibration`, `combine_words`). Then `_choose` takes the likeliest label.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from recipelib.encoding import (
    Asked,
    CausalAsker,
    ClozeRows,
    Demonstrate,
    MaskedAsker,
    example_of,
    record_of,
    requests_without_content,
    with_bar,
)
from recipelib.evaluation.calibration import Word, candidate_scores, pair_scores
from recipelib.evaluation.metrics import score_rows
from recipelib.evaluation.scores import (
    FewShotScore,
    TaskScore,
    blocks,
    score_records,
    spool_prompts,
)
from recipelib.inference import Journal, log_likelihoods, masked_log_likelihoods, score_examples
from recipelib.models import bare_model
from recipelib.prompts import Demonstration, PromptTemplate, Question, combine_words
from recipelib.runtime import Spool, UserError


class _Requests:
    """Requests, each kept once."""

    def __init__(self):
        self.items: list = []
        self._places: dict[bytes, int] = {}

    def add(self, request) -> int:
        """Keep a request, and give its place among those kept."""
        key = hashlib.blake2b(repr(request).encode(), digest_size=16).digest()
        if key not in self._places:
            self._places[key] = len(self.items)
            self.items.append(request)
        return self._places[key]


def _value(template: PromptTemplate, said: Sequence[str], golds: Sequence[str]) -> float:
    """The template's metric without its uncertainty."""
    classes = list(template.verbalizer) or None
    return score_rows(template.metric, said, golds, classes, uncertainty=False).score


def _choose(scores: Mapping[str, float]) -> str:
    """The label with the largest score; of a tie the first."""
    return max(scores, key=scores.__getitem__)


def score_labels(
    model,
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Mapping],
    draws: Sequence[Demonstrate | None],
    *,
    score: str = "sum",
    all_scores: bool = True,
    answers: bool = True,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> FewShotScore:
    """Choose among the label words by their likelihood, scored in every way that `calibration.py`
    knows, all from the same forward passes.

    Args:
        draws: the demonstrations of each draw.
        score: the kind of score that decides.
        all_scores: False to leave out what needs further forward passes, over inputs without
            content.
        answers: False for rows without answers.
    Raises:
        UserError: `score` needs inputs without content, and the template names none.
    """
    encoder, template, start = asker.encoder, asker.encoder.template, time.perf_counter()
    if score in ("pmi", "calibrated") and not template.content_free:
        raise UserError(
            f"--score {score}: needs content_free in {template.path.name}, such as ['', 'N/A']"
        )
    masked, spool = isinstance(asker, MaskedAsker), Spool()
    options = {"batch_tokens": batch_tokens, "journal": journal}
    model.eval()
    records: list[list[dict]] = [[] for _ in draws]
    cut: list[list[Asked]] = [[] for _ in draws]
    for first, part, bar in blocks(rows, len(draws), description):
        encoding = bar and f"{bar}: prompts"
        asked = [asker.ask(with_bar(part, encoding), answers, draw, first) for draw in draws]
        scored = _score_asked(
            model,
            asker,
            [row for draw in asked for row in draw],
            template.content_free if all_scores else [],
            masked_log_likelihoods if masked else log_likelihoods,
            description=bar,
            **options,
        )
        for number, draw in enumerate(asked):
            for row in draw:
                kinds = next(scored)
                chosen = {kind: _choose(values) for kind, values in kinds.items()}
                record = record_of(encoder, row, row.questions[0].label, chosen[score], None)
                record |= {"predictions": chosen, "scores": kinds}
                records[number].append({"draw": number, **record})
                cut[number].append(row.without_text())
            if len(part) < len(rows):
                spool_prompts(records[number][len(records[number]) - len(draw) :], spool)
    scores, by_score = [], {}
    for draw in records:
        scores.append(score_records(template, draw, len(rows), answers))
        if answers and draw:
            golds = [record["answer"] for record in draw]
            for kind in draw[0]["scores"]:
                said = [record["predictions"][kind] for record in draw]
                by_score.setdefault(kind, []).append(_value(template, said, golds))
    return FewShotScore(scores, by_score, cut, time.perf_counter() - start)


def _score_asked(
    model,
    asker: CausalAsker | MaskedAsker,
    rows: Sequence[Asked],
    content_free: Sequence[str],
    likelihoods_of: Callable[..., list[list[float]]],
    **options: Any,
) -> Iterator[dict[str, dict[str, float]]]:
    """For each row the kinds of score, each label -> score.

    Args:
        content_free: texts without content, in place of what rows bring.
        likelihoods_of: of requests, by the model.
    """
    requests = _Requests()

    def places_of(asked: list[tuple]) -> list[tuple[int, list]]:
        return [(requests.add(request), words) for request, words in asked]

    def without_content(
        question: Question, shown: Sequence[Demonstration], texts: Sequence[str]
    ) -> list[list[tuple[int, list]]]:
        return [places_of(requests_without_content(asker, question, text, shown)) for text in texts]

    # For each question: itself, without content, and without content and demonstrations.
    waiting: list[tuple] = []
    for row in rows:
        for question, prompt in zip(row.questions, row.prompts, strict=True):
            free = without_content(question, row.demonstrations, content_free)
            alone = without_content(question, (), content_free[:1])
            itself = places_of(asker.requests(question, prompt, row.demonstrations))
            waiting.append((itself, free, alone))
    likelihoods = likelihoods_of(model, requests.items, **options)

    def words_of(places: list[tuple[int, list]]) -> dict[str, list[Word]]:
        words: dict[str, list[Word]] = {}
        for place, entries in places:
            for (label, tokens, size), value in zip(entries, likelihoods[place], strict=True):
                words.setdefault(label, []).append(Word(value, tokens, size))
        return words

    def scores_of(row: Asked) -> dict[str, dict[str, float]]:
        """Kind of score -> label -> score."""
        kinds: dict[str, dict[str, float]] = {}
        for question in row.questions:
            itself, free, alone = next(remaining)
            scored = candidate_scores(
                words_of(itself), [words_of(places) for places in free], *map(words_of, alone)
            )
            if question.asked is None or isinstance(asker, MaskedAsker):
                return scored
            # There is a question for each candidate, answered with yes or no.
            for kind, value in pair_scores(scored).items():
                kinds.setdefault(kind, {})[question.asked] = value
        return kinds

    remaining = iter(waiting)
    return map(scores_of, rows)


def score_cloze(
    model,
    asker: CausalAsker | MaskedAsker,
    rows: ClozeRows,
    *,
    combine: str = "logsumexp",
    calibrate: bool = False,
    batch_tokens: int = 4096,
    answers: bool = True,
    description: str | None = "scoring",
) -> TaskScore:
    """Fill the cloze of every row with each label word and compare with the gold labels, as
    training does: behind soft prompts, and with a soft verbalizer.

    Args:
        rows: as `encode_cloze_rows` gives them.
        combine: how words make a label's score, see `verbalizer.combine_words`.
        calibrate: whether the labels' scores are calibrated. Where both can be computed,
            the details hold the metric of the other.
        answers: False for rows without answers: the records then hold predictions only.
    Raises:
        UserError: `calibrate` without inputs free of content.
    """
    encoder, template = asker.encoder, asker.encoder.template
    start = time.perf_counter()
    soft = getattr(bare_model(model), "soft_verbalizer", None) is not None
    question, *pairs = rows.asked[0].questions  # several: candidates asked with yes or no
    free = [] if soft or pairs or template.options else template.content_free
    if calibrate and not free:
        raise UserError(
            f"--calibrate: needs content_free in {template.path.name}, such as ['', 'N/A'], and "
            "label words that are answers and the same for all rows"
        )
    model.eval()
    examples = rows.examples
    words = score_examples(model, examples, batch_tokens=batch_tokens, description=description)
    labels = torch.tensor(max((example["word_labels"] for example in examples), key=len))
    kinds = {"uncalibrated": combine_words(words, labels, combine)}
    if free:
        asked = [requests_without_content(asker, question, text) for text in free]
        emptied = [example_of(requests, list(template.verbalizer), None) for requests in asked]
        # The mean of the probabilities over the texts without content; its scale cancels.
        prior = score_examples(model, emptied, batch_tokens=batch_tokens)
        prior = prior.log_softmax(-1).logsumexp(0)
        kinds["calibrated"] = combine_words(words, labels, combine, prior)
    decisive = "calibrated" if calibrate else "uncalibrated"
    classes = [template.words(row.questions[0]) for row in rows.asked]
    scores = {  # a row may have fewer options than others, whose places stay unread
        kind: [dict(zip(*row, strict=False)) for row in zip(classes, scored.tolist(), strict=True)]
        for kind, scored in kinds.items()
    }
    chosen = {kind: [_choose(values) for values in scored] for kind, scored in scores.items()}
    records = []
    for row, label, values in zip(rows.asked, chosen[decisive], scores[decisive], strict=True):
        record = record_of(encoder, row, row.questions[0].label, label, None)
        records.append({**record, "scores": values})
    if not (soft or pairs):
        by_label = [words[:, labels == label].logsumexp(-1) for label in labels.unique()]
        likelihoods = torch.stack(by_label, -1).tolist()
        for record, row, values in zip(records, classes, likelihoods, strict=True):
            record["log_likelihoods"] = dict(zip(row, values, strict=False))
    result = score_records(template, records, rows.counts.rows, answers)
    if answers:
        golds = [record["answer"] for record in records]
        for kind in chosen.keys() - {decisive}:
            result.details[kind] = _value(template, chosen[kind], golds)
    result.seconds = time.perf_counter() - start
    return result
