"""Rows laid end to end in one line, instead of side by side with padding.

A step has exactly the rows that it has with padding, and the same loss: positions restart with each
row, no row sees another, and a row's first token is nobody's target. So nothing that was tuned has
to be tuned again. TRL's packing fills lines of `max_length` tokens instead: how many rows a step
has, and so what a learning rate means, then depends on how long they are.

TRL's padding-free collator makes the lines. Flash attention's kernels take them as they are; under
eager attention transformers makes a mask that keeps rows apart. Under such a mask sdpa would
compute the square of the whole line, most of it in vain; here it is given each row by itself.
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

# How much logits may differ, relative to how much they vary: in float32, and in 16 bits.
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.1


def row_lengths(line: Mapping[str, torch.Tensor]) -> list[int]:
    """The tokens of each row in a line that the collator made."""
    return line["cu_seq_lens_q"].diff().tolist()


class RowsApart:
    """A context in which models under sdpa compute each row of a line by itself.

    It has to last through the backward pass, which recomputes layers under activation
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
        """None where causal attention within each row is enough; the whole line's mask where a row
        is longer than a sliding window, or the model adds conditions of its own.
        """
        if use_vmap or (local_size is not None and max(self.lengths) > local_size):
            return sdpa_mask(local_size=local_size, use_vmap=use_vmap, **options)
        return None

    def _attend(self, module, query, key, value, attention_mask, **options):
        """Called by transformers as attention, with [1, heads, tokens, size of a head] queries."""
        widths = {sum(self.lengths), query.shape[2], key.shape[2]}
        if attention_mask is not None or len(widths) > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        tensors = (tensor.split(self.lengths, 2) for tensor in (query, key, value))
        rows = zip(*tensors, strict=True)
        outputs = [sdpa_attention_forward(module, *row, None, **options)[0] for row in rows]
        return torch.cat(outputs, 1), None


@torch.no_grad()
def rows_stay_apart(model, collate: Callable[[list[dict]], dict], coarse: bool) -> bool:
    """Whether a model needs and supports `RowsApart`; if not, it keeps the rows of a line apart
    itself.

    Found out by computing a few tokens in a line and row by row: nothing says whether a model heeds
    positions and masks. Recurrent layers carry over from one row to the next.

    Args:
        model: whole or sharded; all processes have to call this.
        collate: makes a line of rows.
        coarse: whether the model computes in 16 bits.
    Raises:
        UserError: rows see one another either way.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cure = "leave it out (--train_sampling_strategy batch_rebalance pads little)"
    name = type(base).__name__
    refusal = UserError(f"--packing: in a {name} the rows of a line would see one another; {cure}")
    known = inspect.signature(base.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
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
            model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]
            for row in ids
        ]
    ).float()
    spread = alone.std(-1) + torch.finfo(torch.float32).eps
    tolerance = _COARSE_TOLERANCE if coarse else _TOLERANCE
    result = None
    for apart in [True, False] if base.config._attn_implementation == "sdpa" else [False]:
        try:
            with RowsApart(lengths) if apart else nullcontext():
                packed = model(**line, use_cache=False).logits[0, : sum(map(len, rows))].float()
        except ValueError as error:  # transformers': a package that keeps rows apart is missing
            raise UserError(f"--packing: {' '.join(str(error).split())}; or {cure}") from None
        same = packed.shape == alone.shape
        if same and bool(((packed - alone).abs().amax(-1) <= tolerance * spread).all()):
            result = apart
            break
    model.train(was_training)
    if result is None:
        raise refusal
    return result
