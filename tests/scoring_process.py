"""Scores several tasks, in this process or as one of several: run as a script by a test.

    python tests/scoring_process.py FOLDER RANK PROCESSES
"""

import json
import sys
from pathlib import Path

import torch
from template_cases import CASES
from tiny_llama import tiny_llama
from tokenizers_for_tests import tokenizer_for

from common.encoding import PromptEncoder
from common.evaluation import evaluate_task
from common.template import PromptTemplate

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


def score_all() -> dict[str, list[dict]]:
    """The records of an odd number of rows in small batches, and of a single batch."""
    model, found = outspoken_llama(), {}
    for name in RENDERINGS:
        encoder, rows = encoder_for(name), CASES[name].rows
        options = {"max_new_tokens": 6, "batch_tokens": 150}
        found[f"{name}, odd"] = evaluate_task(model, encoder, [*rows, *rows[:2]], **options).records
        found[f"{name}, one"] = evaluate_task(model, encoder, rows[:1], **options).records
    return found


if __name__ == "__main__":
    folder, rank, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder.resolve()}/meeting",
        rank=rank,
        world_size=processes,
    )
    records = score_all()
    (folder / f"{rank}.json").write_text(json.dumps(records))
    torch.distributed.destroy_process_group()
