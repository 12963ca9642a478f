"""Texts as vectors: the mean of a model's last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from recipelib.encoding import PromptEncoder, TextEncoder
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.scoring import CPU_PASS_TOKENS, padded, plan_padded, run_passes
from recipelib.inference.token_tree import Pass


@torch.no_grad()  # not inference_mode: what FSDP gathers meanwhile is used again
def embed_texts(
    model,
    encoder: TextEncoder,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_tokens: int = 4096,
    description: str | None = None,
) -> np.ndarray:
    """[n, hidden size] float32 vectors of length 1, of the first `max_length` tokens of each text.

    Args:
        batch_tokens: tokens in one forward pass at most, padding included.
        description: of the progress bar; None for no bar.
    Raises:
        UserError: a single text does not fit into memory.
    """
    prompts = [encoder.text_prompt(text)[:max_length] for text in texts]
    # An empty text of a tokenizer without a frame still needs a token.
    prompts = [prompt or [encoder.tokenizer.pad_token_id] for prompt in prompts]
    model.eval()
    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def compute(some: Sequence[list[int]], one: Pass) -> np.ndarray:
        ids, mask = padded(some, run.device)
        states = run(
            input_ids=ids,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=1,
            output_hidden_states=[-1],  # the others would be kept for nothing
        ).hidden_states[-1]
        # The last columns: a soft prompt stands in front.
        sums = (states[:, -ids.shape[1] :].float() * mask[:, :, None]).sum(1)
        return torch.nn.functional.normalize(sums, dim=-1).cpu().numpy()

    def plan(some: Sequence[list[int]], budget: int) -> list[Pass]:
        return plan_padded(list(map(len, some)), budget)

    found = run_passes(run, prompts, plan, compute, batch_tokens, description, None)
    return np.array([found[index] for index in range(len(prompts))])


def embedding_similarity(
    model, encoder: PromptEncoder
) -> Callable[[Sequence[str], Sequence[str]], Callable[[Sequence[str]], np.ndarray]]:
    """From the texts of a pool and queries a function that gives the cosine of some queries with
    all of the pool: [queries, pool].
    """

    def similarity_of(pool: Sequence[str], queries: Sequence[str]):
        texts = [*pool, *queries]
        vectors = embed_texts(model, encoder.text, texts, max_length=encoder.max_length)
        known = dict(zip(texts, vectors, strict=True))
        stored = vectors[: len(pool)].T
        return lambda some: [known[text] @ stored for text in some]

    return similarity_of
