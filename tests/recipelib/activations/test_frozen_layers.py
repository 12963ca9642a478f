"""The boundary below which nothing changes is found for every family of models, whatever is
trained; and the layers below it compute the same in every pass.
"""

import copy

import pytest
import torch
from deep_models import FAMILIES, LAYERS, deep, freeze
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

from recipelib.activations import FrozenLayers, beginning_at
from recipelib.activations.layer_list import ending_at
from recipelib.adapters import adapt_layers
from recipelib.models import find_layers
from recipelib.runtime import UserError

IDS = torch.randint(10, 190, (2, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def states_behind(model, number: int) -> torch.Tensor:
    """What the layers below this number put out, as transformers tells."""
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states[
            number
        ]


# The boundary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", range(LAYERS + 1))
def test_it_is_the_number_of_the_lowest_layer_that_is_trained(family, number):
    model = deep(family)
    model.requires_grad_(False)
    last = [*model.parameters()][-1]
    layers = find_layers(model).layers
    for weight in [*layers[number].parameters()] if number < LAYERS else [last]:
        weight.requires_grad_(True)
    frozen = FrozenLayers.of(model)
    assert frozen.boundary == number
    assert len(frozen.layers) == LAYERS
    assert frozen.width == 32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("also", ["embeddings", "norms"])
def test_where_embeddings_or_the_norms_of_frozen_layers_are_trained_it_is_at_the_bottom(
    family, also
):
    assert FrozenLayers.of(freeze(deep(family), [3], **{also: True})).boundary == 0


@pytest.mark.parametrize(
    ("names", "boundary"),
    [
        (["layers.3", "layers.1.mlp"], 1),
        (["layers.2.self_attn.k_proj"], 2),
        (["up_proj"], 0),
        (["model.norm"], 4),
    ],
)
def test_with_names_it_is_below_the_lowest_of_them(names, boundary):
    assert FrozenLayers.of(freeze(deep("llama"), names=names)).boundary == boundary


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_below_the_lowest_adapter(family):
    assert FrozenLayers.of(adapt_layers(deep(family), "lora", [2, 3])).boundary == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_of_other_adapters_too(family):
    assert FrozenLayers.of(adapt_layers(deep(family), "bottleneck", [3])).boundary == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_leaves_the_model_as_it_was(family):
    model = freeze(deep(family), [2, 3])
    with torch.no_grad():
        before = logits(model.eval())
    names = [name for name, _ in model.named_parameters()]
    keys, places = model.state_dict().keys(), {id(weight) for weight in model.parameters()}
    assert model.train().training
    FrozenLayers.of(model)
    assert model.training
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == keys
    assert {id(weight) for weight in model.parameters()} == places
    with torch.no_grad():
        assert torch.equal(logits(model.eval()), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in find_layers(model).layers)
    assert all(weight.grad is None for weight in model.parameters())
    assert FrozenLayers.of(model).layers is FrozenLayers.of(model).layers  # replaced once


# Dropout ----------------------------------------------------------------------------------------


def outputs_of_layers(model) -> list[torch.Tensor]:
    """What each layer puts out in training."""
    found = []

    def keep(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in find_layers(model).layers]
    with torch.no_grad():
        logits(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_below_it_dropout_is_off_in_training_and_above_it_on(family, capsys):
    model = freeze(deep(family), [2, 3])
    for module in model.modules():  # so much that it shows
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.5
    twin = copy.deepcopy(model)
    frozen = FrozenLayers.of(model)
    assert "dropout is off in the frozen layers" in capsys.readouterr().out
    for _ in range(2):  # however often training is turned on
        model.train()
        outputs = [outputs_of_layers(model) for _ in range(3)]
    for layer in range(LAYERS):
        same = all(torch.equal(outputs[0][layer], other[layer]) for other in outputs[1:])
        assert same == (layer < frozen.boundary), layer
    evaluated = outputs_of_layers(twin.eval())
    torch.testing.assert_close(outputs[0][1], evaluated[1], atol=1e-5, rtol=1e-5)


def test_where_nothing_is_frozen_below_or_nothing_is_dropped_nothing_is_said(capsys):
    model = freeze(deep("bert"), [3], embeddings=True)
    FrozenLayers.of(model)
    assert any(module.training for module in model.train().modules() if type(module) is nn.Dropout)
    FrozenLayers.of(freeze(deep("llama", attention_dropout=0.0), [3]))
    assert capsys.readouterr().out == ""


# What is run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 3, 4])
def test_given_what_the_lower_layers_put_out_the_model_computes_the_same_without_them(
    family, number
):
    model = freeze(deep(family), range(number, LAYERS), head=number == LAYERS).eval()
    frozen, ran = FrozenLayers.of(model), []
    with torch.no_grad():
        wanted = logits(model)
        for place, layer in enumerate(frozen.layers):
            layer.register_forward_pre_hook(lambda *_, place=place: ran.append(place))
        with ending_at(frozen.layers, number) as kept:
            logits(model)
        assert ran == [*range(number)]
        ran.clear()
        (states,) = kept
        with beginning_at(frozen.layers, number, states):
            found = logits(model)
        assert ran == [*range(number, LAYERS)]
        ran.clear()
        again = logits(model)
        assert ran == [*range(LAYERS)]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(again, wanted)
    with torch.no_grad(), beginning_at(frozen.layers, number, states + 1e-2 * torch.randn(32)):
        assert not torch.allclose(logits(model), wanted, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bloom"])
def test_what_is_kept_are_the_states_that_transformers_tells(family):
    plain = deep(family).eval()
    model = freeze(deep(family), [2, 3]).eval()
    frozen = FrozenLayers.of(model)
    with torch.no_grad(), ending_at(frozen.layers, 2) as kept:
        logits(model)
    real = MASK.bool()
    torch.testing.assert_close(kept[0][real], states_behind(plain, 2)[real], atol=1e-5, rtol=1e-5)


def test_after_an_error_all_layers_are_run_again():
    model = freeze(deep("llama"), [2, 3]).eval()
    frozen = FrozenLayers.of(model)
    with torch.no_grad():
        wanted = logits(model)
        with pytest.raises(ZeroDivisionError), ending_at(frozen.layers, 2):
            raise ZeroDivisionError
        with (
            pytest.raises(ZeroDivisionError),
            beginning_at(frozen.layers, 2, torch.zeros(2, 9, 32)),
        ):
            raise ZeroDivisionError
        assert torch.equal(logits(model), wanted)


def test_a_part_of_the_list_is_still_a_part_of_what_is_shown():
    layers = FrozenLayers.of(freeze(deep("gpt2"), [2, 3])).layers
    whole = [*layers]
    assert [*layers[1:3]] == whole[1:3]
    with ending_at(layers, 2):
        assert next(iter(layers)) is layers[0] is whole[0]
        assert len([*layers]) == len(layers[:4]) == 2
        assert len(layers) == LAYERS  # its parameters are all there
        assert len([*layers.parameters()]) == 4 * len([*whole[0].parameters()])
    assert [*layers] == whole


# What is refused --------------------------------------------------------------------------------


def nested():
    """A model whose first layer runs the last one inside."""
    model = freeze(deep("gpt2"), [3])
    first, *_, last = model.transformer.h
    forward = first.forward
    first.forward = lambda *args, **kwargs: forward(last(*args, **kwargs), *args[1:], **kwargs)
    return model


def albert(**fields):
    """Its layers share their parameters: one of them runs several times, or some of them do."""
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}
    return AlbertForMaskedLM(AlbertConfig(**sizes, **fields))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (nested, "the layers of GPT2LMHeadModel do not run one after the other, so none can be"),
        (
            lambda: albert(inner_group_num=4),
            "the layers of AlbertForMaskedLM do not run one after the other, so none can be",
        ),
        (albert, "AlbertForMaskedLM has no list of 4 layers, of which some could be frozen"),
    ],
)
def test_layers_that_do_not_run_one_after_the_other_are_one_line(make, line):
    with pytest.raises(UserError, match=f"^--model_name_or_path: {line}") as told:
        FrozenLayers.of(make())
    assert str(told.value).endswith("take another model")
    assert "\n" not in str(told.value)
