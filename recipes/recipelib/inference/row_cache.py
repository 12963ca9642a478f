"""Keys and values of answers that are written side by side on a CPU: what all see is held once, and
what each row sees for itself stands in a batch.

In one line of tokens (see `shared_cache.py`) each step would compute the scores of every row with
every other row's tokens, only for the mask to rule them out: their number grows with the square of
the rows. In a batch it does not, and the two parts are joined as in `TreeAttention`.
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
_ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more: to append a token or to drop a row copies little."""

    held = ()

    def update(self, key_states, value_states, *args, **kwargs):
        """As transformers calls it: more of both, [rows, heads, tokens, size of a head]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.held = key_states[:, :, :0], value_states[:, :, :0]
        there = self.get_seq_length()
        end = there + key_states.shape[2]
        if end > self.held[0].shape[2]:
            room = end - there + _ROOM
            self.held = tuple(
                torch.cat([one[:, :, :there], one.new_zeros(*one.shape[:2], room, one.shape[3])], 2)
                for one in self.held
            )
        for one, more in zip(self.held, (key_states, value_states), strict=True):
            one[:, :, there:end] = more
        self.keys, self.values = (one[:, :, :end] for one in self.held)
        return self.keys, self.values

    def move(self, rows: Sequence[int], places: Sequence[int], count: int) -> None:
        """Put some rows into the places of others, and keep the first `count`."""
        if self.is_initialized:
            for one in self.held:
                one[places] = one[rows]
            self.held = tuple(one[:count] for one in self.held)
            self.keys, self.values = self.keys[:count], self.values[:count]


class RowCache:
    """The rows of a `SharedCache`, each with the tokens that it alone sees or shares with some."""

    def __init__(self, cache: SharedCache, visible: torch.Tensor):
        """For [rows, length of the cache] booleans: what each row sees."""
        hidden = (~visible.all(0)).nonzero()
        shared = int(hidden[0]) if len(hidden) else visible.shape[1]  # so many first tokens
        own = visible[:, shared:]
        width = int(own.sum(1).max())
        # The columns that a row sees, in their order, and what fills it up.
        columns = (~own).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        self._run = cache.run
        self._sees = own.gather(1, columns)
        self._shared = {}  # layer: keys and values
        self._cache = Cache(layer_class_to_replicate=RoomyLayer)
        for place, (keys, values) in cache.layers():
            self._shared[place] = keys[:, :, :shared], values[:, :, :shared]
            own = (one[0][:, columns + shared].transpose(0, 1) for one in (keys, values))
            self._cache.update(*own, place)

    def feed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Add one token to each row.

        Returns:
            [rows, vocabulary] logits of the token that follows.
        Raises:
            OutOfMemory: rows are no longer of use.
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
        """Keep these rows only, in the order that is returned: the last ones fill the gaps."""
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
        """As transformers calls attention: [rows, heads, 1, size of a head] queries."""
        attend = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, scale=scaling)
        rows, heads, _, width = query.shape
        sharing = heads // key.shape[1]  # heads that share keys stand as further queries
        query = query.reshape(rows, -1, sharing, width)
        bias = bias.to(query.dtype).expand(-1, -1, sharing, -1)
        found, normalizers = attend(query, key, value, attn_mask=bias)
        normalizers = normalizers.reshape(*found.shape[:3], 1)
        shared_keys, shared_values = self._shared[module.layer_idx]
        if shared_keys.shape[2]:
            line = query.transpose(0, 1).reshape(1, -1, rows * sharing, width)
            shared, shared_normalizers = attend(line, shared_keys, shared_values)
            shared, shared_normalizers = (
                one.reshape(-1, rows, sharing, size).transpose(0, 1)
                for one, size in ((shared, width), (shared_normalizers, 1))
            )
            weight = torch.sigmoid(normalizers - shared_normalizers).to(found.dtype)
            found = torch.lerp(shared, found, weight)
        return found.reshape(rows, 1, heads, width), None


def rows_fit(run: Lockstep) -> bool:
    """Whether a model that can share writes in rows as it does after whole texts; some change what
    attention gives back, or what it is given.
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
    ends = [tree.add(beginning + some)[-1] for some in (first, second)]
    sees = tree.visible(0)
    cache.feed(tree.ids, tree.depths, sees, ends)
    steps = RowCache(cache, sees[ends])
    found = steps.feed(after, [tree.depths[end] + 1 for end in ends])
    pairs = zip((first, second), after, strict=True)
    return same_as_whole(run, [[*beginning, *some, token] for some, token in pairs], found)
