"""A task's score for a model, a template and rows: by the likelihood of the label words, by
generating, or by the answers' loss.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from recipelib.encoding.examples import beginning
from recipelib.encoding.prompt_encoder import (
    IGNORED,
    Counts,
    Demonstration,
    DoesNotFit,
    EncodedPrompt,
    PromptEncoder,
)
from recipelib.evaluation.metrics import answer_key, load_metric, score_rows
from recipelib.inference.generation import Written, generate
from recipelib.inference.journal import Journal
from recipelib.inference.scoring import log_likelihoods
from recipelib.prompts.template import PromptTemplate, Question
from recipelib.prompts.verbalizer import label_scores
from recipelib.runtime.errors import UserError


@dataclass
class TaskScore:
    """How well a model does a task.

    Attributes:
        metric, score, stderr: the template's metric, its value and its standard error over the
            rows.
        details: further figures of the metric, such as `exact_match` beside SQuAD's F1.
        records: one dict per row, for a loss one per answer, for predictions.jsonl.
        rows, left_out: rows scored, and rows whose prompt did not fit.
        seconds: how long it took.
        unreadable: rows in whose generated text no answer was found; they count as wrong.
    """

    metric: str
    score: float
    stderr: float
    details: dict[str, float] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    rows: int = 0
    left_out: int = 0
    seconds: float = 0.0
    unreadable: int = 0

    def __str__(self) -> str:
        without = f", {self.unreadable} without an answer" if self.unreadable else ""
        return f"{self.metric} {self.score:.3f} ± {self.stderr:.3f} ({self.rows} rows{without})"


@dataclass
class Asked:
    """A row's questions with their prompts, all of which have the same demonstrations."""

    row: int
    questions: list[Question]
    prompts: list[EncodedPrompt]
    demonstrations: Sequence[Demonstration] = ()
    dropped: int = 0  # demonstrations for which there was no room


def evaluate_task(
    model,
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    *,
    max_new_tokens: int = 256,
    batch_tokens: int = 4096,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    answers: bool = True,
    description: str = "scoring",
) -> TaskScore:
    """Ask the model about every row and compare with the gold answers.

    Args:
        rows: as `data.load_rows` gives them.
        max_new_tokens: the longest answer where the task is scored by generating.
        batch_tokens: tokens in one forward pass, padding included.
        samples, temperature, seed: where the task is scored by generating, so many answers are
            drawn and the majority counts (self-consistency, see `vote`); at temperature 0 the
            likeliest tokens are taken.
        answers: False for rows without answers: the records then hold predictions only.
    Raises:
        UserError: conversations that are to be scored otherwise than by their loss, or answered;
            no row fits.
    """
    template = encoder.template
    if template.messages and not (template.metric == "loss" and answers):
        raise UserError(
            f"{template.path}: messages: conversations are scored by their loss (metric: loss) and "
            "cannot be answered; use a template with a prompt for that"
        )
    start = time.perf_counter()
    model.eval()
    if template.metric == "loss" and answers:
        result = score_loss(
            model, encoder, rows, batch_tokens=batch_tokens, description=description
        )
    elif template.label and not template.rationale:
        result = _by_likelihood(model, encoder, rows, batch_tokens, answers, description)
    else:
        draw = {"samples": samples, "temperature": temperature, "seed": seed}
        result = _by_generating(
            model, encoder, rows, max_new_tokens, batch_tokens, answers, description, draw
        )
    result.seconds = time.perf_counter() - start
    if rows and answers and not result.rows:
        raise UserError(
            f"--max_length {encoder.max_length}: no evaluation row of {template.name} fits with "
            "room for its answer; raise it, or lower --max_new_tokens"
        )
    return result


def mean_score(scores: Mapping[str, TaskScore]) -> TaskScore:
    """The mean over tasks, with the records of all: of those scored by their loss only where there
    are no others. A single task keeps its own metric.
    """
    records = [{"task": name, **one} for name, task in scores.items() for one in task.records]
    tasks = list(scores.values())
    if len(tasks) == 1:
        return replace(tasks[0], records=records)
    meant = [task for task in tasks if task.metric != "loss"] or tasks
    return TaskScore(
        metric="loss" if meant[0].metric == "loss" else "mean",
        score=sum(task.score for task in meant) / len(meant),
        stderr=math.sqrt(sum(task.stderr**2 for task in meant)) / len(meant),
        records=records,
        rows=sum(task.rows for task in tasks),
        left_out=sum(task.left_out for task in tasks),
        seconds=sum(task.seconds for task in tasks),
        unreadable=sum(task.unreadable for task in tasks),
    )


def ask(
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    reserve: Callable[[Question], int],
    answers: bool = True,
    demonstrate: Callable[[int, Mapping], Sequence[Demonstration]] | None = None,
    encode: Callable[..., EncodedPrompt] | None = None,
) -> list[Asked]:
    """The rows whose prompts all fit.

    Args:
        reserve: how many tokens a question's answer needs.
        demonstrate: the demonstrations of a row, from its number and itself.
        encode: how a prompt is encoded; by default `encoder.prompt`.
    """
    asked, encode = [], encode or encoder.prompt
    for number, row in enumerate(rows):
        questions = encoder.template.questions(row, answers=answers)
        shown = demonstrate(number, row) if demonstrate else ()
        try:
            prompts = [encode(one, reserve(one), shown) for one in questions]
            dropped = max(prompt.dropped for prompt in prompts)
            if any(prompt.dropped < dropped for prompt in prompts):
                prompts = [encode(one, reserve(one), shown[dropped:]) for one in questions]
        except DoesNotFit:
            continue
        asked.append(Asked(number, questions, prompts, shown[dropped:], dropped))
    return asked


def record_of(encoder: PromptEncoder, asked: Asked, answer, prediction, score) -> dict:
    """What predictions.jsonl holds of a row."""
    tokenizer = encoder.text.tokenizer
    prompts = [tokenizer.decode(prompt.ids) for prompt in asked.prompts]
    return {
        "row": asked.row,
        "prompt": prompts[0] if len(prompts) == 1 else prompts,
        "answer": answer,
        "prediction": prediction,
        "score": score,
    }


def finish(template: PromptTemplate, records: list[dict], total: int, answers: bool) -> TaskScore:
    """The score of all records, each of which is given its own."""
    rows, left_out = len(records), total - len(records)
    unreadable = sum(record["prediction"] is None for record in records)
    counts = {"records": records, "rows": rows, "left_out": left_out, "unreadable": unreadable}
    if not answers or not records:
        return TaskScore(template.metric, math.nan, math.nan, **counts)
    # A prediction that could not be read (None) is a wrong one, not a missing one.
    predictions = [record["prediction"] or "" for record in records]
    if template.entity_spans:
        predictions = [record["prediction"] for record in records]
    golds = [record["answer"] for record in records]
    score, stderr, each = score_rows(template.metric, predictions, golds)
    for record, value in zip(records, each, strict=True):
        record["score"] = value
    details = load_metric(template.metric).compute(predictions=predictions, references=golds)
    # The first figure is the score itself.
    details = {name: float(value) for name, value in list(details.items())[1:]}
    return TaskScore(template.metric, score, stderr, details, **counts)


def _by_likelihood(model, encoder, rows, batch_tokens, answers, description) -> TaskScore:
    template = encoder.template

    asked = ask(encoder, rows, encoder.longest_candidate, answers)
    requests, labels = [], []
    for one in asked:
        for question, prompt in zip(one.questions, one.prompts, strict=True):
            candidates = encoder.candidates(question, prompt.end)
            requests.append((prompt.ids, [ids for texts in candidates.values() for ids in texts]))
            labels.append([label for label, texts in candidates.items() for _ in texts])
    scored = log_likelihoods(model, requests, batch_tokens=batch_tokens, description=description)
    found = iter(zip(labels, scored, strict=True))
    records = []
    for one in asked:
        scores: dict[str, float] = {}
        for question in one.questions:
            words: dict[str, list[float]] = {}
            for label, value in zip(*next(found), strict=True):
                words.setdefault(label, []).append(value)
            if question.asked is None:
                scores = label_scores(words)
            else:  # a pair per candidate: how much likelier yes is than no
                scores[question.asked] = words["yes"][0] - words["no"][0]
        prediction = max(scores, key=scores.__getitem__)
        record = record_of(encoder, one, one.questions[0].label, prediction, None)
        records.append({**record, "log_likelihoods": scores})
    return finish(template, records, len(rows), answers)


def _by_generating(
    model, encoder, rows, max_new_tokens, batch_tokens, answers, description, draw
) -> TaskScore:
    template = encoder.template
    asked = ask(encoder, rows, lambda question: max_new_tokens, answers)
    prompts = [prompt for one in asked for prompt in one.prompts]
    texts = iter(
        generate(
            model,
            encoder.text.tokenizer,
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens,
            end_ids={prompt.end[-1] for prompt in prompts},
            stop=template.stop,
            batch_tokens=batch_tokens,
            description=description,
            **draw,
        )
    )
    records = []
    for one in asked:
        said, read = [], []
        for _ in one.questions:
            written = next(texts)
            found = [template.read_answer(each.text) for each in written]
            read.append(vote(found, written, template))
            said.append([each.text for each in written] if len(written) > 1 else written[0].text)
        prediction, answer = predicted(template, one.questions, read)
        record = record_of(encoder, one, answer, prediction, None)
        records.append({**record, "generated": said[0] if len(said) == 1 else said})
    return finish(template, records, len(rows), answers)


def vote(
    answers: Sequence[str | None], written: Sequence[Written], template: PromptTemplate
) -> str | None:
    """The answer that most samples give (self-consistency, Wang et al. 2023, arXiv:2203.11171); of
    equals the one with the likeliest sample. Samples in which none was found, or no class's word
    where there are classes, do not vote.
    """
    keys = [template.read_label(one) for one in answers]
    if not template.label:
        keys = [None if one is None else answer_key(template.metric, one) for one in answers]
    counts = Counter(key for key in keys if key is not None)
    if not counts:
        return None
    best = max(
        (place for place, key in enumerate(keys) if key is not None),
        key=lambda place: (counts[keys[place]], written[place].log_likelihood),
    )
    return answers[best]


def predicted(
    template: PromptTemplate, questions: Sequence[Question], read: Sequence[str | None]
) -> tuple:
    """The prediction for a row and its gold answer, from the answers read to its questions."""
    if template.entity_spans:
        pairs = zip(questions, read, strict=True)
        said = [[one.asked, text] for one, answer in pairs for text in template.read_spans(answer)]
        return said, [[one.asked, text] for one in questions for text in one.references]
    if template.label:
        return template.read_label(read[0]), questions[0].label
    return read[0], list(questions[0].references)


def score_loss(
    model,
    encoder: PromptEncoder,
    rows: Sequence[Mapping],
    *,
    demonstrate: Callable[[int, Mapping], Sequence[Demonstration]] | None = None,
    batch_tokens: int = 4096,
    description: str | None = None,
    journal: Journal | None = None,
) -> TaskScore:
    """Mean negative log-likelihood (nats) per answer token: the training loss, on these rows. Lower
    is better.

    Args:
        demonstrate: the demonstrations of a row, from its number and itself; not for conversations.
    """
    template, requests, kept = encoder.template, [], []
    for number, row in enumerate(rows):
        shown = demonstrate(number, row) if demonstrate else ()
        for question in template.questions(row):
            try:
                if template.messages:
                    examples = encoder.conversation(question, Counts())
                else:
                    examples = [encoder.training_example(question, shown)[:2]]
            except DoesNotFit:
                continue
            except UserError as error:  # the chat template rejects the turns
                raise UserError(
                    f"evaluation row {number + 1}{beginning(question)}: {error}"
                ) from None
            for ids, labels in examples:
                start = 0
                for ignored, run in groupby(labels, lambda label: label == IGNORED):
                    end = start + len(list(run))
                    if not ignored:  # an answer; a conversation has several
                        requests.append((ids[:start], [ids[start:end]]))
                        kept.append(number)
                    start = end
    model.eval()
    scores = log_likelihoods(
        model, requests, batch_tokens=batch_tokens, description=description, journal=journal
    )
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    records = []
    tokenizer = encoder.text.tokenizer
    for number, (prompt, (answer,)), (value,) in zip(kept, requests, scores, strict=True):
        sums[number] -= value
        counts[number] += len(answer)
        records.append(
            {
                "row": number,
                "prompt": tokenizer.decode(prompt),
                "answer": tokenizer.decode(answer),
                "prediction": None,
                "score": -value / len(answer),
            }
        )
    used = counts > 0
    n = int(used.sum())
    if not n:
        return TaskScore("loss", math.nan, math.nan, left_out=len(rows))
    loss = sums.sum() / counts.sum()
    # The standard error of a ratio of two sums over rows (linearized); none from a single row.
    residuals = (sums - loss * counts)[used]
    stderr = math.sqrt(n / (n - 1) * (residuals**2).sum()) / counts.sum() if n > 1 else math.nan
    return TaskScore("loss", float(loss), stderr, {}, records, n, len(rows) - n)
