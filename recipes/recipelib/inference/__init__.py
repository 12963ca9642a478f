"""Likelihood and generation over a shared tree of tokens; nobody outside knows its KV caches."""

from recipelib.inference.classifying import class_scores
from recipelib.inference.cloze_scoring import score_examples, word_scores
from recipelib.inference.cut_model import CutModel, whole_model
from recipelib.inference.embeddings import embedding_similarity
from recipelib.inference.generation import Written, generate
from recipelib.inference.journal import Journal
from recipelib.inference.lockstep import (
    Lockstep,
    OutOfMemory,
    from_main_process,
    gather_results,
    process_group,
)
from recipelib.inference.scoring import (
    CPU_PASS_TOKENS,
    join_scores,
    log_likelihoods,
    masked_log_likelihoods,
    plan_padded,
    run_passes,
    split_requests,
)
from recipelib.inference.token_tree import Pass

__all__ = [
    "CPU_PASS_TOKENS",
    "CutModel",
    "Journal",
    "Lockstep",
    "OutOfMemory",
    "Pass",
    "Written",
    "class_scores",
    "embedding_similarity",
    "from_main_process",
    "gather_results",
    "generate",
    "join_scores",
    "log_likelihoods",
    "masked_log_likelihoods",
    "plan_padded",
    "process_group",
    "run_passes",
    "score_examples",
    "split_requests",
    "whole_model",
    "word_scores",
]
