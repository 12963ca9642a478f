"""How likely each label word is to fill a cloze, with gradients: the scores of prompt tuning.

Only the states at the places that are read (see `encoding/cloze_rows.py`) go through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from recipelib.encoding import Example, collate
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.scoring import CPU_PASS_TOKENS, plan_padded, run_passes
from recipelib.inference.token_tree import Pass
from recipelib.models import logits_at

# The score of a word that a row lacks and another row of the batch has: finite, for infinity has no
# gradient, and impossible.
NO_WORD = -1e9


def word_scores(
    model, batch: Mapping[str, torch.Tensor], run: Callable | None = None
) -> torch.Tensor:
    """The log-likelihood (nats) of each word in the cloze of each row, with gradients.

    Args:
        batch: as `collate` gives it.
        run: called instead of the model, such as a `Lockstep`.

    Returns:
        [rows, words]; `NO_WORD` where a row has fewer words than another.
    """
    with logits_at(model, batch["places"], batch["input_ids"].shape[1]):
        logits = (run or model)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    rows, places, tokens, words, signs = batch["reads"].T
    log_probs = logits[0].float().log_softmax(-1)[places, tokens] * signs
    scores = log_probs.new_zeros(len(batch["labels"]), len(batch["word_labels"]))
    scores = scores.index_put((rows, words), log_probs, accumulate=True)
    lacking = torch.arange(scores.shape[1], device=scores.device) >= batch["words"][:, None]
    return scores.masked_fill(lacking, NO_WORD)


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def score_examples(
    model,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 4096,
    description: str | None = None,
) -> torch.Tensor:
    """The log-likelihood (nats) of each word in the cloze of each row: [rows, words].

    Args:
        batch_tokens, description: as in `scoring.log_likelihoods`.
    Raises:
        UserError: a single row does not fit into memory.
    """
    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def plan(examples: Sequence[Example], budget: int) -> list[Pass]:
        sizes = [max(example["lengths"]) * len(example["lengths"]) for example in examples]
        return plan_padded(sizes, budget)

    def compute(examples: Sequence[Example], pass_: Pass) -> list[list[float]]:
        batch = {name: tensor.to(run.device) for name, tensor in collate(examples).items()}
        return word_scores(model, batch, run).tolist()

    scores = run_passes(run, examples, plan, compute, batch_tokens, description, None)
    widest = max(len(row) for row in scores.values())
    rows = (scores[index] for index in range(len(examples)))
    return torch.tensor([row + [NO_WORD] * (widest - len(row)) for row in rows])
