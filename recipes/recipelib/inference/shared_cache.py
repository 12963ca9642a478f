"""Forward passes over a tree of tokens, whose beginning is kept as keys and values.

The tokens of a pass stand in one row, each with its own position, under a mask by which each sees
the kept tokens and its own path: nothing is padded, and the kept keys and values are not repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipelib.inference.lockstep import Lockstep, OutOfMemory
from recipelib.inference.token_tree import Tree, common_length

_CHECKED: WeakKeyDictionary = WeakKeyDictionary()
# How much log-probabilities may differ, relative to how much they vary; the coarse one is for 16
# bits.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_TOLERANCE = 0.1
_PART = 64  # queries in a block


class TreeAttention:
    """transformers' sdpa for one mask on a CPU, without the work that the mask rules out.

    Columns that all tokens see need no mask. Of the other columns a block of neighboring queries
    needs few, since in the order of a tree no token sees a later one and each text stands together.
    The two results are joined by the logarithms of their normalizers (Dao et al. 2022,
    FlashAttention, section 3.1). Heads that share keys and values become further queries, so that
    keys and values are not repeated.
    """

    def __init__(self, visible: torch.Tensor, dtype: torch.dtype):
        """`visible`: [n, length] booleans, what each token sees, itself included."""
        self.called, self._other = 0, False
        before = visible.shape[1] - len(visible)
        hidden = (~visible[:, :before].all(0)).nonzero()
        self.open = int(hidden[0]) if len(hidden) else before  # how many first columns all see
        self.mask = visible[None, None]
        self.blocks = []  # queries, columns, and what is added to their scores
        for start in range(0, len(visible), _PART):
            sees = visible[start : start + _PART, self.open :]
            low, high = (int(column) for column in sees.any(0).nonzero()[[0, -1]])
            bias = torch.zeros(len(sees), high + 1 - low, dtype=dtype)
            bias.masked_fill_(~sees[:, low : high + 1], float("-inf"))
            queries = slice(start, start + len(sees))
            self.blocks.append((queries, slice(self.open + low, self.open + high + 1), bias))

    @property
    def plain(self) -> bool:
        """Whether this computed all attention; models with attention of their own never ask it."""
        return self.called > 0 and not self._other

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **options):
        """Called by transformers as attention, with [batch, heads, n, size of a head] queries."""
        plain = attention_mask is self.mask and query.shape[-1] == value.shape[-1]
        self.called += 1
        if not plain or options.get("dropout") or options.get("position_bias") is not None:
            self._other = True
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **options
            )
        attend = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, scale=scaling)
        _, heads, size, width = query.shape
        groups = heads // key.shape[1]

        def attend_block(queries, columns, bias=None):
            """[1, heads, queries, width] values, and [1, heads, queries, 1] normalizers."""
            asking = query[:, :, queries]
            if bias is not None:
                bias = bias.to(query.dtype).repeat(groups, 1)[None, None]
            attended, normalizers = attend(
                asking.reshape(1, key.shape[1], -1, width),
                key[:, :, columns],
                value[:, :, columns],
                attn_mask=bias,
            )
            return attended.reshape(asking.shape), normalizers.reshape(*asking.shape[:3], 1)

        results = [attend_block(*block) for block in self.blocks]
        attended, normalizers = (torch.cat(tensors, 2) for tensors in zip(*results, strict=True))
        if self.open:
            open_attended, open_normalizers = attend_block(slice(size), slice(self.open))
            weight = torch.sigmoid(normalizers - open_normalizers).to(attended.dtype)
            attended = torch.lerp(open_attended, attended, weight)
        return attended.transpose(1, 2).contiguous(), None


class SharedCache:
    """The keys and values of tokens, which a model's forward passes see through a mask.

    Attributes:
        length: how many tokens are in it.
        plain: whether `TreeAttention` computed all attention so far.
    """

    def __init__(self, run: Lockstep):
        self.run = run
        self.length = 0
        self.plain = True
        config = run.model.config
        self._cache = DynamicCache(config=config)
        # sdpa takes booleans; eager attention adds its mask to the scores.
        self._additive = config._attn_implementation == "eager"

    def feed(
        self, ids: Sequence[int], positions: Sequence[int], visible: torch.Tensor, read: list[int]
    ) -> torch.Tensor:
        """Compute tokens and add them.

        Args:
            ids, positions: [n] tokens, and where each stands in its own text.
            visible: [n, length + n] booleans: what each token sees, itself included.
            read: the k of the n places whose logits are wanted.

        Returns:
            [k, vocabulary] logits of the token that follows each of these places.
        Raises:
            OutOfMemory: nothing was added.
        """
        device = self.run.device
        dtype = self.run.model.dtype
        mask = visible[None, None].to(device)
        attention = None
        if self._additive:
            lowest = torch.finfo(dtype).min
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, lowest)
        elif device.type == "cpu":
            attention = TreeAttention(visible, dtype)
            mask = attention.mask
        try:
            logits = run_with_attention(
                self.run,
                attention,
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=torch.tensor(read, device=device),
            ).logits
        except OutOfMemory:
            self._crop(self.length)
            raise
        self.length += len(ids)
        self.plain = self.plain and attention is not None and attention.plain
        if logits.shape[1] != len(read):  # a model that does not know logits_to_keep
            logits = logits[:, read]
        return logits[0]

    def layers(self) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        """Each layer that has keys and values: its number and them, [1, heads, length, size]."""
        for place, layer in enumerate(self._cache.layers):
            if layer.is_initialized and layer.keys is not None:
                yield place, (layer.keys, layer.values)

    def forget(self, count: int) -> None:
        """Drop the tokens that were added last."""
        self.length -= count
        self._crop(self.length)

    def select(self, places: torch.Tensor) -> None:
        """Keep the tokens at these places only."""
        for layer in self._cache.layers:
            if layer.is_initialized and layer.keys is not None:
                layer.keys = layer.keys.index_select(-2, places.to(layer.keys.device))
                layer.values = layer.values.index_select(-2, places.to(layer.keys.device))
        self.length = len(places)

    def _crop(self, length: int) -> None:
        for layer in self._cache.layers:
            layer.crop(length - layer.get_seq_length())


def run_with_attention(run: Lockstep, attention: Callable | None, **inputs):
    """A forward pass in which a function of ours, if any, computes attention in place of sdpa."""
    if attention is None:
        return run(**inputs)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        return run(**inputs)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


class KeptBeginning:
    """A `SharedCache` that holds the beginning of a text; for the next text only what differs is
    computed.
    """

    def __init__(self, run: Lockstep, budget: int):
        self.cache = SharedCache(run)
        self.ids: list[int] = []
        self.budget = budget  # tokens in one forward pass

    def hold(self, ids: Sequence[int]) -> None:
        """Make `ids` the beginning."""
        ids = list(ids)
        same = common_length(self.ids, ids)
        self.cache.forget(len(self.ids) - same)
        self.ids = ids[:same]
        while len(self.ids) < len(ids):
            there = len(self.ids)
            chunk = ids[there : there + self.budget]
            size = len(chunk)
            sees = torch.ones(size, there + size, dtype=torch.bool).tril(there)
            try:
                self.cache.feed(chunk, range(there, there + size), sees, [size - 1])
            except OutOfMemory:
                if self.budget == 1:
                    raise
                self.budget //= 2
                continue
            self.ids += chunk

    def over(self, tree: Tree, read: list[int]) -> torch.Tensor:
        """[k, vocabulary] logits after the k tokens `read` of a tree that follows the beginning."""
        there = len(self.ids)
        positions = [there + depth for depth in tree.depths]
        logits = self.cache.feed(tree.ids, positions, tree.visible(there), read)
        self.cache.forget(len(tree.ids))
        return logits


def can_share(run: Lockstep) -> bool:
    """Whether a model computes the same for a tree of tokens as for whole texts.

    Found out by computing both for a few tokens: nothing says whether a model heeds the mask and
    the positions it is given. Models with sliding windows or recurrent layers do not: their KV
    cache is no list of tokens.
    """
    if run.model not in _CHECKED:
        _CHECKED[run.model] = _try_sharing(run)
    return _CHECKED[run.model]


def forward_parameters(model) -> set[str]:
    """The parameters of a model's forward pass, under an adapter if there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def _try_sharing(run: Lockstep) -> bool:
    model = run.model
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    if not {"position_ids", "past_key_values", "attention_mask"} <= forward_parameters(model):
        return False
    if is_prompted(model) or _turns_with_length(config):
        return False
    # Not by `is_croppable`, which sliding windows claim to be.
    layers = DynamicCache(config=config).layers
    if any(type(layer) not in (DynamicLayer, DummyLayer) for layer in layers):
        return False
    vocabulary = config.get_text_config(decoder=True).vocab_size
    beginning, *ends = (
        [(7 * place + 3) % vocabulary for place in places]
        for places in (range(4), range(4, 7), range(9, 11))
    )
    tree = Tree()
    read = [tree.add(end)[-1] for end in ends]
    kept = KeptBeginning(run, budget=4)
    try:
        kept.hold(beginning)
        logits = kept.over(tree, read)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False  # a mask of this shape is refused
    return same_as_whole(run, [beginning + end for end in ends], logits)


def same_as_whole(run: Lockstep, texts: Sequence[Sequence[int]], logits: torch.Tensor) -> bool:
    """Whether [texts, vocabulary] logits are those after whole texts."""
    for text, row in zip(texts, logits, strict=True):
        ids = torch.tensor([text], device=run.device)
        whole = run(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        whole = whole[0, -1].float().log_softmax(-1)
        spread = whole.std() + torch.finfo(torch.float32).eps
        tolerance = _TOLERANCE.get(run.model.dtype, _COARSE_TOLERANCE)
        if not (whole - row.float().log_softmax(-1)).abs().max() <= tolerance * spread:
            return False
    return True


def is_prompted(model) -> bool:
    """Whether PEFT puts a soft prompt or a prefix in front of what a model reads."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _turns_with_length(config) -> bool:
    """Whether rotary positions depend on the length of the whole pass (longrope, dynamic NTK): kept
    keys would then not be those of a longer text.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type") in ("longrope", "dynamic") for kind in kinds)
