"""Rows laid end to end in one line, where they would else be padded side by side.

A step has exactly the rows that it has with padding, and the same loss: positions begin anew with
each row, no row sees another, and a row's first token is nobody's target. So nothing that was tuned
has to be tuned again. TRL's packing fills lines of `max_length` tokens instead: how many rows a
step has, and so what a learning rate means, then depends on how long they are.

TRL's padding-free collator makes the lines. Flash attention's kernels take them as they are; under
eager attention transformers makes a mask that keeps rows apart. sdpa would compute the square of
the whole line under such a mask, most of it in vain; here it is given each row by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate.utils import send_to_device
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipelib.runtime import UserError

# By how much logits may differ, relative to how much they vary: in float32, and in 16 bits.
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.1


def row_lengths(line: Mapping[str, torch.Tensor]) -> list[int]:
    """The tokens of each row in a line that the collator made."""
    return line["cu_seq_lens_q"].diff().tolist()


class RowsApart:
    """A context in which models under sdpa compute each row of a line by itself.

    It has to hold for the backward pass too, which computes layers again under activation
    checkpointing.

    Args:
        lengths: tokens of each row.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)

    def __enter__(self) -> RowsApart:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = self._attend
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = self._mask
        return self

    def __exit__(self, *error) -> None:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def _mask(self, *, local_size=None, use_vmap=False, **options) -> torch.Tensor | None:
        """None where a row by itself is causal; the whole line's mask where a row is longer than a
        sliding window, or a model adds conditions of its own.
        """
        if use_vmap or (local_size is not None and max(self.lengths) > local_size):
            return sdpa_mask(local_size=local_size, use_vmap=use_vmap, **options)
        return None

    def _attend(self, module, query, key, value, attention_mask, **options):
        """As transformers calls attention: [1, heads, tokens, size of a head] queries."""
        places = {sum(self.lengths), query.shape[2], key.shape[2]}
        if attention_mask is not None or len(places) > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        rows = zip(*(one.split(self.lengths, 2) for one in (query, key, value)), strict=True)
        parts = [sdpa_attention_forward(module, *row, None, **options)[0] for row in rows]
        return torch.cat(parts, 1), None


@torch.no_grad()
def rows_stay_apart(model, collate: Callable[[list[dict]], dict], coarse: bool) -> bool:
    """Whether `RowsApart` works for a model; if not, it keeps the rows of a line apart by itself.

    Found out by computing a few tokens in a line and row by row: whether positions and masks are
    heeded is nowhere written. Recurrent layers carry over from one row to the next.

    Args:
        model: whole or sharded; all processes have to ask.
        collate: makes a line of rows.
        coarse: whether it computes in 16 bits.
    Raises:
        UserError: rows see one another in any case.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cure = "leave it out (--train_sampling_strategy batch_rebalance pads little)"
    name = type(base).__name__
    refusal = UserError(f"--packing: in a {name} the rows of a line would see one another; {cure}")
    known = inspect.signature(base.forward).parameters
    takes_more = any(one.kind is one.VAR_KEYWORD for one in known.values())
    if "position_ids" not in known or not takes_more:
        raise refusal
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rows = [
        [(7 * place + 3) % vocabulary for place in places]
        for places in (range(5), range(5, 8), range(8, 14))
    ]
    line = send_to_device(
        collate([{"input_ids": row, "labels": row} for row in rows]),
        next(model.parameters()).device,
    )
    del line["labels"]
    lengths = row_lengths(line)
    was_training = model.training
    model.eval()
    ids = line["input_ids"][:, : sum(map(len, rows))].split([len(row) for row in rows], 1)
    alone = torch.cat(
        [
            model(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False).logits[0]
            for one in ids
        ]
    ).float()
    spread = alone.std(-1) + torch.finfo(torch.float32).eps
    tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE
    result = None
    for apart in [True, False] if base.config._attn_implementation == "sdpa" else [False]:
        try:
            with RowsApart(lengths) if apart else nullcontext():
                found = model(**line, use_cache=False).logits[0, : sum(map(len, rows))].float()
        except ValueError as error:  # transformers', of a package by which rows would stay apart
            raise UserError(f"--packing: {' '.join(str(error).split())}; or {cure}") from None
        same = found.shape == alone.shape
        if same and bool(((found - alone).abs().amax(-1) <= tolerance * spread).all()):
            result = apart
            break
    model.train(was_training)
    if result is None:
        raise refusal
    return result
