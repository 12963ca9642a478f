"""Attention over a tree of tokens on a CPU: the same as with one mask over everything."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS
from torch.nn.functional import scaled_dot_product_attention

import recipelib.inference.shared_cache as shared_cache
from recipelib.inference.lockstep import Lockstep
from recipelib.inference.shared_cache import _PART, KeptBeginning, TreeAttention
from recipelib.inference.token_tree import Tree


@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, _PART - 1, _PART, _PART + 1, 2 * _PART + 3]),
    st.integers(0, 40),
    st.integers(0, 20),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_attention_equals_that_under_one_mask(seed, size, opened, others, heads, scaling, share):
    draw = torch.Generator().manual_seed(seed)
    before = opened + others
    visible = torch.rand(size, before + size, generator=draw) < share
    visible[:, :opened] = True
    visible[:, before:] = visible[:, before:].tril() | torch.eye(size, dtype=torch.bool)
    query = 3 * torch.randn(1, heads[0], size, 8, generator=draw)
    key, value = torch.randn(2, 1, heads[1], before + size, 8, generator=draw)
    attention = TreeAttention(visible, torch.float32)
    found, weights = attention(None, query, key, value, attention.mask, scaling=scaling)
    expected = scaled_dot_product_attention(
        query, key, value, visible[None, None], scale=scaling, enable_gqa=True
    )
    assert weights is None
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_another_mask_or_other_sizes_of_values_are_left_to_transformers(monkeypatch):
    visible = torch.ones(3, 3, dtype=torch.bool).tril()
    attention = TreeAttention(visible, torch.float32)
    query, key, value = torch.randn(3, 1, 2, 3, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 1

    def plain(mask, value):
        expected = scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        torch.testing.assert_close(attention(module, query, key, value, mask)[0], expected)

    biased = torch.zeros(1, 1, 3, 3).masked_fill(~visible, float("-inf")) + torch.randn(3)
    plain(biased, value)
    plain(attention.mask, torch.randn(1, 2, 3, 5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_every_layer_takes_it(name, monkeypatch):
    taken = []

    def refuse(*args, **options):
        raise AssertionError("one mask over everything")

    monkeypatch.setattr(shared_cache, "sdpa_attention_forward", refuse)
    call = TreeAttention.__call__

    def count(self, *args, **options):
        taken.append(self)
        return call(self, *args, **options)

    monkeypatch.setattr(TreeAttention, "__call__", count)
    model = MODELS[name]
    kept = KeptBeginning(Lockstep(model), budget=4)
    kept.hold(range(6))
    tree = Tree()
    tree.add([1, 2])
    kept.over(tree, tree.add([1, 3]))
    assert len(taken) == 3 * model.config.num_hidden_layers


@torch.no_grad()
def test_half_precision_stays_close():
    visible = torch.ones(70, 90, dtype=torch.bool).tril(20)
    query, key, value = torch.randn(3, 1, 2, 90, 16, generator=torch.Generator().manual_seed(0))
    query = query[:, :, :70]
    expected = scaled_dot_product_attention(query, key, value, visible).transpose(1, 2)
    for dtype in (torch.bfloat16, torch.float16):
        attention = TreeAttention(visible, dtype)
        found, _ = attention(None, *(one.to(dtype) for one in (query, key, value)), attention.mask)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
