"""A task's score for a model, a template and rows: by the likelihood of the label words, by
generating, or by the answers' loss.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from recipelib.encoding import CausalAsker, PromptEncoder
from recipelib.evaluation.answers import score_answers
from recipelib.evaluation.labels import score_labels
from recipelib.evaluation.losses import score_loss
from recipelib.evaluation.scores import TaskScore
from recipelib.inference import whole_model
from recipelib.runtime import UserError


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
        max_new_tokens: of an answer, where the task is scored by generating.
        batch_tokens: tokens in one forward pass, padding included.
        samples, temperature, seed: where the task is scored by generating, `samples` answers are
            drawn and the majority counts (self-consistency, see `vote`); at temperature 0 the
            likeliest tokens are taken.
        answers: False for rows without answers: the records then hold predictions only. Of a
            conversation the next turn is written.
    Raises:
        UserError: conversations that should be scored by anything but their loss; no row fits.
    """
    template = encoder.template
    if template.conversation and answers and template.metric != "loss":
        raise UserError(
            f"{template.path}: {template.conversation}: conversations are scored by their loss; "
            "write metric: loss, or use a template with a prompt"
        )
    start = time.perf_counter()
    budget = {"batch_tokens": batch_tokens, "description": description}
    if template.metric == "loss" and answers:
        result = score_loss(model, encoder, rows, **budget)
    elif template.label and not template.rationale:
        asker = CausalAsker(encoder)
        (result,) = score_labels(
            model, asker, rows, [None], all_scores=False, answers=answers, **budget
        ).draws
        for record in result.records:
            del record["predictions"]
            # By how much yes leads is no log-likelihood of a class.
            key = "scores" if template.asks_each_word else "log_likelihoods"
            record[key] = record.pop("scores")["sum"]
    else:
        with whole_model(model) as whole:
            (result,) = score_answers(
                whole,
                encoder,
                rows,
                [None],
                max_new_tokens=max_new_tokens,
                samples=samples,
                temperature=temperature,
                seed=seed,
                answers=answers,
                **budget,
            ).draws
    for record in result.records:
        record.pop("draw", None)
    result.seconds = time.perf_counter() - start
    if rows and answers and not result.rows:
        raise UserError(
            f"--max_length {encoder.max_length}: no evaluation row of {template.name} fits with "
            "room for its answer; raise it, or lower --max_new_tokens"
        )
    return result
