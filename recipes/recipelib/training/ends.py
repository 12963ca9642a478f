"""Where trained answers end: kept in the generation config of what is saved, so that whatever
generates with it stops there, and not at the base model's eos token only.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from recipelib.encoding import IGNORED
from recipelib.models import bare_model

_LOOKED_AT = 1000  # examples, spread over all


def trained_ends(examples: Dataset) -> list[int]:
    """The tokens that training examples' answers end with, the most frequent first: the end of a
    turn in a chat, the eos token otherwise.
    """
    count = Counter()
    places = np.linspace(0, len(examples) - 1, min(len(examples), _LOOKED_AT), dtype=int)
    for labels in examples.select(places).with_format("numpy")["labels"][:]:
        last = (labels != IGNORED) & (np.append(labels[1:], IGNORED) == IGNORED)
        count.update(labels[last].tolist())
    return [token for token, _ in count.most_common()]


def end_at(model, ends: Sequence[int]) -> None:
    """Let generation with a causal model end at these tokens, besides those at which it ends
    already.
    """
    bare = bare_model(model)
    if not bare.can_generate():
        return
    config = bare.generation_config
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = [token for token in dict.fromkeys([*ends, *own]) if token is not None]
    config.eos_token_id = ids if len(ids) > 1 else ids[0] if ids else None
    # Published ones have sampling fields without do_sample. As it was loaded transformers saves
    # such a config, but not once it is changed: so this one is loaded again.
    with tempfile.TemporaryDirectory() as folder:
        config.to_json_file(f"{folder}/generation_config.json")
        vars(config).update(vars(type(config).from_pretrained(folder)))
