"""Scores and writes with a sharded model, unevenly: a test runs it under `accelerate launch`, or in
one process. Writes what it finds, per process, to a folder.

    in_step.py FOLDER [plain | uneven | little_memory] [llama | mistral]
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from tiny_models import TOKENIZER, tiny, tiny_llama, with_opinions

from recipelib.inference.generation import generate
from recipelib.inference.lockstep import process_group
from recipelib.inference.scoring import log_likelihoods
from recipelib.models.sharding import place_model
from recipelib.runtime.launch import join_on_cpu

LENGTHS = (3, 40, 7, 90, 19, 2, 20, 5, 11)  # an odd number of very different rows
SHARED = [5, 9, 40, 33] * 10
WINDOW = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
}


HOW, KINDS = ("plain", "uneven", "little_memory"), ("llama", "mistral")


def runs(folder: Path) -> dict[str, list[str]]:
    """What is to be launched; results go to `folder`."""
    folder.mkdir()
    return {f"{how}_{kind}": [__file__, str(folder), how, kind] for how in HOW for kind in KINDS}


class Training:
    """What `place_model` wants of a `RecipeConfig`."""

    device = torch.device("cpu")
    mixed_precision = "no"


def with_little_memory(model, tokens: int) -> None:
    """Lets the second process run out of memory in the middle of the model."""
    layer = model.model.layers[0].self_attn
    forward = layer.forward

    def limited(*args, **kwargs):
        hidden_states = kwargs.get("hidden_states", args[0] if args else None)
        rows, length = hidden_states.shape[:2]
        if process_group()[0] == 1 and rows * length > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, **kwargs)

    layer.forward = limited


def main(folder: Path, how: str, kind: str) -> None:
    join_on_cpu(False)
    PartialState()
    model = tiny_llama(len(TOKENIZER)) if kind == "llama" else tiny("mistral", **WINDOW)
    model = with_opinions(model)
    if how == "little_memory":
        with_little_memory(model, 95 if kind == "llama" else 140)
    model = place_model(model, Training)
    budget = 60 if how == "plain" else 200
    asked = [
        ([*SHARED, *range(100 + length, 100 + 2 * length)], [[1], [2, 3], [2, 4, 5]])
        for length in LENGTHS
    ]
    prompts = [prompt for prompt, _ in asked]
    # Some rows stop at once, others never.
    options = {"max_new_tokens": 7, "end_ids": list(range(200)), "batch_tokens": budget}
    written = generate(model, TOKENIZER, prompts, **options)
    sampled = generate(model, TOKENIZER, prompts[:3], samples=2, temperature=1.0, **options)
    found = {
        "scores": log_likelihoods(model, asked, batch_tokens=budget),
        "one": log_likelihoods(model, asked[:1], batch_tokens=budget),
        "texts": [[one.text for one in some] for some in written],
        "samples": [[one.text for one in some] for some in sampled],
    }
    file = folder / f"{kind}-{how}-{process_group()[0]}.json"
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
