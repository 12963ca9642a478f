"""Likelihood and generation over a shared tree of tokens; nobody outside knows its KV caches."""

from recipelib.inference.cloze_scoring import score_examples, word_scores
from recipelib.inference.embeddings import embedding_similarity
from recipelib.inference.generation import Written, generate
from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import Lockstep, gather_results, process_group
from recipelib.inference.scoring import log_likelihoods, masked_log_likelihoods

__all__ = [
    "Journal",
    "Lockstep",
    "Written",
    "embedding_similarity",
    "gather_results",
    "generate",
    "log_likelihoods",
    "masked_log_likelihoods",
    "process_group",
    "score_examples",
    "word_scores",
]
