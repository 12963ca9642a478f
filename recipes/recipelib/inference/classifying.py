"""The scores of a classification head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recipelib.encoding import pad_texts
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.scoring import CPU_PASS_TOKENS, plan_padded, run_passes
from recipelib.inference.token_tree import Pass


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is trained afterwards
def class_scores(
    model,
    texts: Sequence[Sequence[int]],
    pad: int,
    *,
    batch_tokens: int = 4096,
    description: str | None = None,
) -> torch.Tensor:
    """The log-probability of each class for each text: [texts, classes].

    Args:
        texts: their token ids.
        pad: the id that the model takes for padding.
        batch_tokens, description: as in `scoring.log_likelihoods`.
    Raises:
        UserError: a single text does not fit into memory.
    """
    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def plan(texts: Sequence[Sequence[int]], budget: int) -> list[Pass]:
        return plan_padded([len(text) for text in texts], budget)

    def compute(texts: Sequence[Sequence[int]], pass_: Pass) -> list[list[float]]:
        batch = {name: tensor.to(run.device) for name, tensor in pad_texts(texts, pad).items()}
        return run(**batch).logits.float().log_softmax(-1).tolist()

    scores = run_passes(run, texts, plan, compute, batch_tokens, description, None)
    return torch.tensor([scores[index] for index in range(len(texts))])
