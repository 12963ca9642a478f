"""Computes a language model's logits at a few positions only: the logits of all positions would be
a large part of what a training step computes, and most of what it keeps in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from recipelib.runtime import UserError


def bare_model(model):
    """The transformers model, taken out of PEFT's wrapper if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_masked_model(model) -> bool:
    """Whether a model is a masked language model."""
    return type(bare_model(model)).__name__.endswith("ForMaskedLM")


# Global and not in the hook's closure: for tensors there, torch.compile would compile again at
# every new length.
_asked: dict = {}


def _pick(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (states,) = args
    _asked["times"] += 1
    return (states[_asked["rows"], _asked["columns"]][None],)


@contextmanager
def logits_at(model, places: torch.Tensor, width: int) -> Iterator[None]:
    """Let the last layer of the model's head see only the states at some places, during one forward
    pass: its logits are then [1, places, vocabulary].

    Args:
        model: a causal or a masked language model, or PEFT's wrapper around one.
        places: [places, 2] sequence and column of each state.
        width: the length of the sequences, without the soft prompt in front.
    Raises:
        UserError: the model has no such last layer, or does not call it exactly once.
    """
    bare = bare_model(model)
    head = bare.get_output_embeddings()
    # Columns count from the end: a soft prompt makes the sequences longer, a prefix does not.
    _asked.update(rows=places[:, 0], columns=places[:, 1] - width, times=0)
    hook = head.register_forward_pre_hook(_pick) if head is not None else None
    try:
        yield
        times = _asked["times"]
    finally:
        _asked.clear()
        if hook is not None:
            hook.remove()
    if times != 1:
        raise UserError(
            f"--model_name_or_path: {type(bare).__name__} has no last layer that can be asked at "
            "single positions; take another model"
        )
