"""Training on what the frozen layers have put out once is training with them run in each pass: the
same losses, and the same weights, for every family of models and every way to read an answer.
"""

import copy

import pytest
import torch
from deep_models import CAUSAL, LAYERS, MASKED, deep, freeze, train_above

from recipelib.adapters import adapt_layers
from recipelib.models import find_layers
from recipelib.training.frozen import GradualUnfreezing, rates_by_depth

WAYS = [
    *((family, "words") for family in CAUSAL),
    *((family, "cloze") for family in MASKED),
    *((family, "classes") for family in (*MASKED, "llama")),
]
TOP = range(2, LAYERS)  # of four layers the boundary is in the middle


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def passes_of(model) -> list[int]:
    """Counts in its only item how often the first layer is run."""
    count = [0]

    def add(*_):
        count[0] += 1

    find_layers(model).layers[0].register_forward_pre_hook(add)
    return count


def assert_the_cache_changes_nothing(folder, model, answers, **options) -> None:
    """That training with the cache gives the losses and weights that training without gives, and
    runs the frozen layers as often as the examples need once.
    """
    before, plain = weights(model), copy.deepcopy(model)
    once, each = passes_of(model), passes_of(plain)
    cached = train_above(folder, model, answers, cached=True, **options)
    wanted = train_above(folder, plain, answers, cached=False, **options)
    assert len(cached.losses) == 4
    assert cached.losses == pytest.approx(wanted.losses, abs=1e-5)
    assert max(wanted.losses) - min(wanted.losses) > 1e-3  # other rows, other weights
    found, expected = weights(model), weights(plain)
    changed = {name for name in before if not torch.equal(expected[name], before[name])}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert changed
    assert changed <= trained
    assert max((expected[name] - before[name]).abs().max() for name in changed) > 1e-3
    for name in before:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=name)
    assert each[0] >= 8  # two passes of four micro-batches
    # one for every shard, at most; and two tokens to find the boundary
    assert once[0] <= len(cached.cache.shards) + 1 + 4 * bool(options.get("packing"))


@pytest.mark.parametrize(("family", "answers"), WAYS)
def test_the_upper_layers_learn_from_kept_states_what_they_learn_from_computed_ones(
    family, answers, tmp_path
):
    model = deep(family, answers)
    freeze(model, TOP, head=answers == "classes")
    assert_the_cache_changes_nothing(tmp_path, model, answers)


@pytest.mark.parametrize(
    ("family", "trained"),
    [
        ("llama", {"names": ["layers.3.mlp", "layers.2.self_attn.o_proj"]}),
        ("gpt2", {"names": ["h.3", "h.2.mlp"]}),
        ("llama", {"layers": [1, 2, 3]}),
        ("qwen3", {"head": True}),  # all layers are frozen
        ("llama", {"head": True}),  # untied from the embeddings
        ("bloom", {"head": True}),
    ],
)
def test_whatever_is_trained_begins_above_the_layers_below_it(family, trained, tmp_path):
    model = deep(family)
    freeze(model, **trained)
    assert_the_cache_changes_nothing(tmp_path, model, "words")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_rows_of_a_line_begin_at_their_own_states(family, tmp_path):
    model = deep(family)
    for module in model.modules():  # whose draws depend on how rows are laid out
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    freeze(model, TOP)
    assert_the_cache_changes_nothing(tmp_path, model, "words", packing=True)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize(
    ("family", "answers"), [("llama", "words"), ("bert", "cloze"), ("llama", "classes")]
)
def test_adapters_in_the_upper_layers_learn_the_same(family, answers, method, tmp_path):
    model = adapt_layers(deep(family, answers), method, TOP)
    with torch.no_grad():  # else half of an adapter has no gradient in the first step
        for weight in model.parameters():
            weight += 0.01 * weight.requires_grad
    assert_the_cache_changes_nothing(tmp_path, model, answers, learning_rate=0.5)


def test_rates_that_fall_with_depth_are_the_same(tmp_path):
    model = deep("llama")
    freeze(model, TOP)
    rates = rates_by_depth(model, 0.05, 0.5)
    assert_the_cache_changes_nothing(tmp_path, model, "words", rates=rates)


@pytest.mark.parametrize(("family", "answers"), [("gpt2", "words"), ("bert", "classes")])
def test_layers_that_thaw_one_by_one_learn_the_same(family, answers, tmp_path):
    model = deep(family, answers)
    freeze(model, range(1, LAYERS), head=True)

    def thaw(frozen, training):
        return [GradualUnfreezing(frozen, 1, training)]

    assert_the_cache_changes_nothing(tmp_path, model, answers, callbacks=thaw)


def test_what_is_recomputed_in_the_backward_pass_is_the_same(tmp_path):
    model = deep("llama")
    freeze(model, TOP)
    assert_the_cache_changes_nothing(tmp_path, model, "words", activation_checkpointing=True)
