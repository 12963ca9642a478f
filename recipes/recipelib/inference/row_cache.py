"""Keys and values of answers written side by side on a CPU: what all rows see is held once, what
single rows see stands in a batch.

In one line of tokens (see `shared_cache.py`) each step would compute the scores of every row with
every other row's tokens, only for the mask to rule them out: their number grows with the square of
the number of rows. In a batch it does not, and the two parts are joined as in `TreeAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache, DynamicLayer

from recipelib.inference.lockstep import Lockstep
from recipelib.inference.shared_cache import SharedCache, run_with_attention, same_as_whole
from recipelib.inference.token_tree import Tree

_CHECKED: WeakKeyDictionary = WeakKeyDictionary()
_ROOM = 64  # tokens that a layer makes room for at a time


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more: appending a token or dropping a row copies little.

    `held` are the two with their room, `keys` and `values` the parts of them in use.
    """

    held = ()

    def update(self, key_states, value_states, *args, **kwargs):
        """Called by transformers: adds keys and values, [rows, heads, tokens, size of a head]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.held = key_states[:, :, :0], value_states[:, :, :0]
        there = self.get_seq_length()
        end = there + key_states.shape[2]
        if end > self.held[0].shape[2]:
            room = end - there + _ROOM
            self.held = tuple(
                torch.cat([old[:, :, :there], old.new_zeros(*old.shape[:2], room, old.shape[3])], 2)
                for old in self.held
            )
        for tensor, states in zip(self.held, (key_states, value_states), strict=True):
            tensor[:, :, there:end] = states
        self.keys, self.values = (tensor[:, :, :end] for tensor in self.held)
        return self.keys, self.values

    def move(self, rows: Sequence[int], places: Sequence[int], count: int) -> None:
        """Put `rows` into `places`, and keep the first `count` rows."""
        if self.is_initialized:
            for tensor in self.held:
                tensor[places] = tensor[rows]
            self.held = tuple(tensor[:count] for tensor in self.held)
            self.keys, self.values = self.keys[:count], self.values[:count]


class RowCache:
    """The rows of a `SharedCache`, each with the tokens that not all rows see."""

    def __init__(self, cache: SharedCache, visible: torch.Tensor):
        """`visible`: [rows, length of the KV cache] booleans, what each row sees."""
        hidden = (~visible.all(0)).nonzero()
        shared = int(hidden[0]) if len(hidden) else visible.shape[1]  # first tokens all see
        own = visible[:, shared:]
        width = int(own.sum(1).max())
        # For each row the columns that it sees, in their order, filled up with others.
        columns = (~own).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self._run = cache.run
        self._sees = own.gather(1, columns)
        self._shared = {}  # number of a layer -> keys and values
        self._cache = Cache(layer_class_to_replicate=RoomyLayer)
        for place, (keys, values) in cache.layers():
            self._shared[place] = keys[:, :, :shared], values[:, :, :shared]
            in_rows = (tensor[0][:, columns + shared].transpose(0, 1) for tensor in (keys, values))
            self._cache.update(*in_rows, place)

    def feed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Add one token to each row.

        Returns:
            [rows, vocabulary] logits of the token that follows.
        Raises:
            OutOfMemory: the rows can no longer be used.
        """
        self._sees = torch.cat([self._sees, self._sees.new_ones(len(tokens), 1)], 1)
        mask = self._sees[:, None, None]
        return run_with_attention(
            self._run,
            partial(self._attend, self._bias()),
            input_ids=torch.tensor(tokens)[:, None],
            position_ids=torch.tensor(positions)[:, None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def select(self, rows: Sequence[int]) -> list[int]:
        """Keep these rows only, in the order that is returned: the last of them fill the gaps."""
        count = len(rows)
        moved = [row for row in rows if row >= count]
        order = list(range(count))
        for gap, row in zip(sorted(set(order) - set(rows)), moved, strict=True):
            order[gap] = row
        self._sees = self._sees[order]
        gaps = [place for place, row in enumerate(order) if place != row]
        for layer in self._cache.layers:
            layer.move(moved, gaps, count)
        return order

    def _bias(self) -> torch.Tensor:
        dtype = self._run.model.dtype
        bias = torch.zeros(self._sees.shape, dtype=dtype).masked_fill_(~self._sees, float("-inf"))
        return bias[:, None, None]

    def _attend(self, bias, module, query, key, value, mask, scaling=None, **options):
        """Called by transformers as attention, with [rows, heads, 1, size of a head] queries."""
        attend = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, scale=scaling)
        rows, heads, _, width = query.shape
        sharing = heads // key.shape[1]  # heads that share keys become further queries
        query = query.reshape(rows, -1, sharing, width)
        bias = bias.to(query.dtype).expand(-1, -1, sharing, -1)
        attended, normalizers = attend(query, key, value, attn_mask=bias)
        normalizers = normalizers.reshape(*attended.shape[:3], 1)
        shared_keys, shared_values = self._shared[module.layer_idx]
        if shared_keys.shape[2]:
            line = query.transpose(0, 1).reshape(1, -1, rows * sharing, width)
            shared, shared_normalizers = attend(line, shared_keys, shared_values)
            shared, shared_normalizers = (
                tensor.reshape(-1, rows, sharing, size).transpose(0, 1)
                for tensor, size in ((shared, width), (shared_normalizers, 1))
            )
            weight = torch.sigmoid(normalizers - shared_normalizers).to(attended.dtype)
            attended = torch.lerp(shared, attended, weight)
        return attended.reshape(rows, 1, heads, width), None


def rows_fit(run: Lockstep) -> bool:
    """Whether a model for which `can_share` holds also writes in rows what it writes after whole
    texts: some models change the result of attention, or its inputs.
    """
    if run.model not in _CHECKED:
        _CHECKED[run.model] = _try_rows(run)
    return _CHECKED[run.model]


def _try_rows(run: Lockstep) -> bool:
    config = run.model.config.get_text_config(decoder=True)
    beginning, first, second, after = (
        [(7 * place + 3) % config.vocab_size for place in places]
        for places in (range(4), range(4, 7), range(9, 11), range(12, 14))
    )
    tree, cache = Tree(), SharedCache(run)
    tree.add(beginning)
    ends = [tree.add(beginning + ending)[-1] for ending in (first, second)]
    sees = tree.visible(0)
    cache.feed(tree.ids, tree.depths, sees, ends)
    steps = RowCache(cache, sees[ends])
    logits = steps.feed(after, [tree.depths[end] + 1 for end in ends])
    texts = [[*beginning, *first, after[0]], [*beginning, *second, after[1]]]
    return same_as_whole(run, texts, logits)
