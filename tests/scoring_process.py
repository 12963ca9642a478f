"""Scores several tasks, alone or as one of two processes. A test runs it as a script to be the
second, with a folder.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from template_cases import CASES
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for

from recipelib.encoding.prompt_encoder import PromptEncoder
from recipelib.evaluation.evaluation import evaluate_task
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.shared_cache import can_share
from recipelib.prompts.template import PromptTemplate

TOKENIZER = tokenizer_for("gpt2")
RENDERINGS = {
    "movie_reviews": "text",
    "next_sentence": "chat",
    "squad": "text",
    "alpaca": "chat",
    "conversations": "chat",
}


def outspoken_llama():
    """A tiny Llama whose weights are so large that every token of a prompt shows in its answer."""
    model = tiny_llama(len(TOKENIZER))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 8
    model.generation_config.eos_token_id = None
    return model.eval()


def encoder_for(name: str) -> PromptEncoder:
    """The encoder of a shipped template, with room for the rows in `template_cases`."""
    template = PromptTemplate.load(name)
    return PromptEncoder(template, TOKENIZER, 400, RENDERINGS.get(name, "text"))


def score_all() -> dict[str, dict]:
    """The records of an odd number of rows in small batches, and of a single row; with the number
    of forward passes that this process made.
    """
    model, passes, found = outspoken_llama(), [], {}
    can_share(Lockstep(model))  # what tells that computes, once
    model.register_forward_hook(lambda *_: passes.append(1))
    for name in RENDERINGS:
        rows = CASES[name].rows
        for size, some in {"odd": [*rows, *rows[:2]], "one": rows[:1]}.items():
            passes.clear()
            result = evaluate_task(
                model, encoder_for(name), some, max_new_tokens=6, batch_tokens=150
            )
            found[f"{name}, {size}"] = {"records": result.records, "passes": len(passes)}
    return found


def score_as_one_of_two(folder: Path, rank: int) -> dict[str, dict]:
    """`score_all` by two processes, which meet in a file in `folder`."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder.resolve()}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=3),
    )
    try:
        return score_all()
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    records = score_as_one_of_two(Path(sys.argv[1]), rank=1)
    Path(sys.argv[1], "records.json").write_text(json.dumps(records))
