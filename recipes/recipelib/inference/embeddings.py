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
    """[n, hidden size] float32 vectors of norm 1, of the first `max_length` tokens of each text.

    Args:
        batch_tokens: tokens in one forward pass at most, padding included.
        description: of the progress bar; None for no bar.
    Raises:
        UserError: a single text does not fit into memory.
    """
    prompts = [encoder.text_prompt(text)[:max_length] for text in texts]
    # An empty text still needs a token, and not every tokenizer frames it in some.
    prompts = [prompt or [encoder.tokenizer.pad_token_id] for prompt in prompts]
    model.eval()
    run = Lockstep(model)
    if run.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_PASS_TOKENS)

    def compute(prompts: Sequence[list[int]], pass_: Pass) -> np.ndarray:
        ids, mask = padded(prompts, run.device)
        states = run(
            input_ids=ids,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=1,
            output_hidden_states=[-1],  # the last layer's only: nobody reads the others
        ).hidden_states[-1]
        # The last columns: a soft prompt stands in front.
        sums = (states[:, -ids.shape[1] :].float() * mask[:, :, None]).sum(1)
        return torch.nn.functional.normalize(sums, dim=-1).cpu().numpy()

    def plan(prompts: Sequence[list[int]], budget: int) -> list[Pass]:
        return plan_padded(list(map(len, prompts)), budget)

    vectors = run_passes(run, prompts, plan, compute, batch_tokens, description, None)
    return np.array([vectors[index] for index in range(len(prompts))])


def embedding_similarity(
    model, encoder: PromptEncoder
) -> Callable[[Sequence[str], Sequence[str]], Callable[[Sequence[str]], np.ndarray]]:
    """A function that takes the texts of a pool and all queries, embeds them once, and returns a
    function of a few of the queries: their cosines with the whole pool, [queries, pool].
    """

    def similarity_of(pool: Sequence[str], queries: Sequence[str]):
        texts = [*pool, *queries]
        vectors = embed_texts(model, encoder.text, texts, max_length=encoder.max_length)
        vector_of = dict(zip(texts, vectors, strict=True))
        pool_vectors = vectors[: len(pool)].T
        return lambda queries: [vector_of[text] @ pool_vectors for text in queries]

    return similarity_of
