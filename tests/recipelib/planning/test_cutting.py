"""A pipeline's stages cost as much alike as contiguous layers allow."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recipelib.planning import cut_layers, layer_costs
from recipelib.runtime import UserError


def llama(**changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def size(module) -> int:
    return sum(one.numel() for one in module.parameters())


costs = st.integers(0, 9)


@given(st.lists(costs, min_size=1, max_size=7), costs, costs, st.data())
def test_no_other_cut_has_a_cheaper_stage_that_costs_the_most(layers, first, last, data):
    stages = data.draw(st.integers(1, len(layers)))

    def stage_costs(ranges):
        each = [sum(layers[number] for number in one) for one in ranges]
        each[0] += first
        each[-1] += last
        return sorted(each, reverse=True)

    def ranges(inner):
        ends = [0, *inner, len(layers)]
        return [range(*pair) for pair in pairwise(ends)]

    found = cut_layers(layers, first, last, stages)
    every = [ranges(inner) for inner in combinations(range(1, len(layers)), stages - 1)]
    assert found in every  # contiguous, all layers, none without a layer
    assert found == min(every, key=lambda one: (stage_costs(one), [part.start for part in one]))


def test_equal_layers_are_cut_into_equal_stages_and_what_is_over_goes_to_the_late_ones():
    lengths = [len(one) for one in cut_layers([0.1] * 32, 0.0, 0.0, 4)]
    assert lengths == [8, 8, 8, 8]
    assert [len(one) for one in cut_layers([0.1] * 7, 0.0, 0.0, 3)] == [2, 2, 3]


def test_the_ends_bear_fewer_layers():
    assert cut_layers([1] * 8, 2, 0, 2) == [range(0, 3), range(3, 8)]
    assert cut_layers([1] * 8, 0, 2, 2) == [range(0, 5), range(5, 8)]
    assert [len(one) for one in cut_layers([1] * 8, 2, 2, 3)] == [2, 4, 2]


@pytest.mark.parametrize("stages", [0, 4])
def test_a_number_of_stages_that_the_layers_do_not_allow_is_refused(stages):
    with pytest.raises(UserError, match=f"{stages} pipeline stages: the model has 3 layers"):
        cut_layers([1, 1, 1], 0, 0, stages)


def test_eighty_layers_are_cut_in_a_moment():
    lengths = [len(one) for one in cut_layers([1.0] * 80, 0.6, 1.2, 16)]
    assert sum(lengths) == 80
    assert max(lengths) == 6


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_layer_costs_half_by_its_compute_and_half_by_its_parameters(fraction):
    model = llama()
    layer, table = size(model.model.layers[0]), 300 * 32
    parameters, compute = size(model), 5 * layer + fraction * table
    layers, first, last = layer_costs(model, fraction)
    assert layers == pytest.approx([(layer / parameters + layer / compute) / 2] * 5)
    assert first == pytest.approx(table / parameters / 2)
    assert last == pytest.approx(((table + 32) / parameters + fraction * table / compute) / 2)
    assert sum(layers) + first + last == pytest.approx(1)


def test_a_tied_head_is_held_at_both_ends():
    layers, first, last = layer_costs(llama(tie_word_embeddings=True), 0.0)
    assert sum(layers) + first + last == pytest.approx(1)
    assert last == pytest.approx(first + first / 300)  # the norm, as wide as a word


def test_learned_positions_stand_in_front_of_the_layers():
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, **sizes))
    _, first, last = layer_costs(model, 0.0)
    assert first / last == pytest.approx((300 + 64) / (300 + 2))
