"""Which parameters are trained and which are frozen, for every family of models."""

import copy
import re

import pytest
import torch
from deep_models import FAMILIES, LAYERS, MASKED, deep, freeze
from hypothesis import given
from hypothesis import strategies as st
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModelForCausalLM, AutoModelForMaskedLM

from recipelib.adapters import adapt_layers
from recipelib.models import find_layers, head_modules, layer_map, linear_names, top_layers
from recipelib.runtime import UserError

# The names of what is in front of the layers, of norms behind them, and of the head.
OUTSIDE = {
    "llama": ({"model.embed_tokens.weight"}, {"model.norm.weight"}, set()),
    "qwen3": ({"model.embed_tokens.weight"}, {"model.norm.weight"}, {"lm_head.weight"}),
    "gemma3": ({"model.embed_tokens.weight"}, {"model.norm.weight"}, set()),
    "mistral": ({"model.embed_tokens.weight"}, {"model.norm.weight"}, {"lm_head.weight"}),
    "gpt2": (
        {"transformer.wte.weight", "transformer.wpe.weight"},
        {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        set(),
    ),
    "bloom": (
        {
            "transformer.word_embeddings.weight",
            "transformer.word_embeddings_layernorm.weight",
            "transformer.word_embeddings_layernorm.bias",
        },
        {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        set(),
    ),
    "bert": (
        {
            "bert.embeddings.word_embeddings.weight",
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
            "bert.embeddings.LayerNorm.weight",
            "bert.embeddings.LayerNorm.bias",
        },
        {"cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"},
        {
            "cls.predictions.bias",
            "cls.predictions.transform.dense.weight",
            "cls.predictions.transform.dense.bias",
        },
    ),
    "roberta": (
        {
            "roberta.embeddings.word_embeddings.weight",
            "roberta.embeddings.position_embeddings.weight",
            "roberta.embeddings.token_type_embeddings.weight",
            "roberta.embeddings.LayerNorm.weight",
            "roberta.embeddings.LayerNorm.bias",
        },
        {"lm_head.layer_norm.weight", "lm_head.layer_norm.bias"},
        {"lm_head.bias", "lm_head.dense.weight", "lm_head.dense.bias"},
    ),
}
PLACES = {
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
}
TIED = ["llama", "gemma3", "gpt2", "bloom", "bert", "roberta"]


def trained(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def all_of(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def of_layers(model, family: str, *numbers: int) -> set[str]:
    beginnings = tuple(f"{PLACES.get(family, 'model.layers')}.{number}." for number in numbers)
    return {name for name in all_of(model) if name.startswith(beginnings)}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# Layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_found_by_their_number_from_the_bottom_up(family):
    model = deep(family)
    name, layers = find_layers(model)
    assert name == PLACES.get(family, "model.layers")
    assert len(layers) == LAYERS
    assert find_layers(adapt_layers(model, "lora", [3])).layers is layers


@given(st.integers(0, LAYERS))
def test_so_many_at_the_top_are_trained_or_so_many_at_the_bottom_frozen(count):
    model = deep("gpt2")
    assert [*top_layers(model, count, None)] == [*range(LAYERS)][LAYERS - count :]
    assert [*top_layers(model, None, count)] == [*range(LAYERS)][count:]


@pytest.mark.parametrize(("depth", "count"), [(2, 1), (4, 1), (6, 1), (12, 2), (30, 5)])
def test_without_a_number_a_sixth_is_trained_but_at_least_one(depth, count):
    model = deep("gpt2", n_layer=depth)
    assert [*top_layers(model, None, None)] == [*range(depth - count, depth)]


@pytest.mark.parametrize("option", ["train_layers", "freeze_layers"])
def test_more_layers_than_there_are_is_one_line(option):
    given = {"train_layers": (5, None), "freeze_layers": (None, 5)}[option]
    with pytest.raises(
        UserError, match=f"^--{option} 5: the model has 4 layers; pass at most as many$"
    ):
        top_layers(deep("gpt2"), *given)


def test_a_model_whose_layers_share_their_parameters_is_refused_in_one_line():
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=32,
    )
    line = (
        r"^--model_name_or_path: AlbertForMaskedLM has no list of 4 layers, .*; take another model$"
    )
    with pytest.raises(UserError, match=line):
        top_layers(AlbertForMaskedLM(config), 1, None)


# What is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_a_layer_before_them_behind_them_or_in_the_head(family):
    model = deep(family)
    outside = set().union(*OUTSIDE[family])
    assert all_of(model) == of_layers(model, family, *range(LAYERS)) | outside


@pytest.mark.parametrize("family", FAMILIES)
def test_with_layers_the_norms_behind_them_are_trained_and_nothing_else(family):
    model = freeze(deep(family), [2, 3])
    _, norms, _ = OUTSIDE[family]
    assert trained(model) == of_layers(model, family, 2, 3) | norms


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_all_that_is_in_front_of_the_layers(family):
    model = freeze(deep(family), embeddings=True)
    assert trained(model) == OUTSIDE[family][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_frozen_layers_too(family):
    model = freeze(deep(family), [3], norms=True)
    found = trained(model) - of_layers(model, family, 3)
    assert found >= OUTSIDE[family][1]
    kinds = re.compile(r"norm|\.ln_|LayerNorm", re.IGNORECASE)
    assert found == {
        name for name in all_of(model) - of_layers(model, family, 3) if kinds.search(name)
    }
    assert found & of_layers(model, family, 0)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_a_head_of_its_own_is_trained_alone(family):
    assert trained(freeze(deep(family), head=True)) == {"lm_head.weight"}


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_a_classification_head_is_what_is_behind_the_layers(family):
    model = freeze(deep(family, "classes"), head=True)
    expected = {
        "bert": {"bert.pooler.dense", "classifier"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
        "llama": {"score"},
        "gpt2": {"score"},
    }[family]
    assert {name.rpartition(".")[0] for name in trained(model)} == expected
    assert {*head_modules(model)} == expected


# By name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.3"], r"model\.layers\.3\."),
        (["mlp"], r"\.mlp\."),
        (["layers.1.mlp.up_proj", "norm"], r"layers\.1\.mlp\.up_proj|^model\.norm\."),
        (["layers"], r"model\.layers\."),
        (["q_proj.weight"], r"q_proj"),
    ],
)
def test_a_name_means_whatever_has_it_between_dots(names, expected):
    model = deep("llama")
    freeze(model, names=names)
    assert trained(model) == {name for name in all_of(model) if re.search(expected, name)}


def test_with_names_the_layers_that_are_counted_are_not_trained():
    model = freeze(deep("llama"), [2, 3], names=["layers.1.mlp"])
    assert {name.split(".mlp")[0] for name in trained(model)} == {"model.layers.1"}


def test_bit_fit_trains_all_biases():
    model = freeze(deep("bert"), names=["bias"])
    assert trained(model) == {name for name in all_of(model) if name.endswith(".bias")}


@pytest.mark.parametrize("wrong", ["proj", "layers.4", "Mlp", "3.mlp.", "layers3"])
def test_a_name_that_fits_nothing_is_one_line_with_names_that_do(wrong):
    model = deep("llama")
    with pytest.raises(UserError) as told:
        freeze(model, names=["mlp", wrong])
    line = str(told.value)
    assert line.startswith(f"--train_modules {wrong}: no parameter has it in its name; names are")
    assert "\n" not in line
    named = line.split("such as ")[1].split(", ")
    assert {"layers.3", "mlp", "self_attn", "model.norm.weight"} <= {*named}
    for name in named:
        freeze(copy.deepcopy(model), names=[name])  # each of them fits something


@pytest.mark.parametrize(
    ("asked", "option"),
    [({}, "--train_layers"), ({"names": []}, "--train_layers")],
)
def test_nothing_to_train_is_one_line(asked, option):
    with pytest.raises(UserError, match=f"^{option}: nothing is trained; name more$"):
        freeze(deep("llama"), **asked)


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ({"layers": range(LAYERS), "embeddings": True, "head": True}, "--train_layers"),
        ({"names": ["weight"]}, "--train_modules"),
        ({"names": ["model", "lm_head"]}, "--train_modules"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_everything_is_one_line_too(asked, option, family):
    line = f"^{option}: everything is trained, nothing frozen; name less, or tune the whole model"
    with pytest.raises(UserError, match=line):
        freeze(deep(family), **asked)


# A head that shares the embeddings' weight --------------------------------------------------------


def ids() -> torch.Tensor:
    return torch.randint(10, 190, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def train_a_step(model) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.manual_seed(len(name))
            weight.data += 0.1 * torch.randn_like(weight)


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_that_is_trained_becomes_a_weight_of_its_own_and_that_is_said(
    family, tmp_path, capsys
):
    model = deep(family)
    untouched, embeddings = logits(model), model.get_input_embeddings().weight.detach().clone()
    freeze(model, head=True)
    said = " ".join(capsys.readouterr().out.split())
    head = model.get_output_embeddings().weight
    name = next(name for name, weight in model.named_parameters() if weight is head)
    assert f"{name} was the embeddings' weight" in said
    assert f"a weight of its own, {head.numel():,} parameters more" in said
    assert name in trained(model)
    assert torch.equal(logits(model), untouched)
    model(ids()).logits.sum().backward()
    named = model.named_parameters()
    assert {name for name, weight in named if weight.grad is not None} == trained(model)
    train_a_step(model)
    assert not torch.allclose(logits(model), untouched, atol=0.1)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)

    model.save_pretrained(tmp_path)
    kind = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


def test_by_its_own_name_a_tied_head_is_meant_and_not_the_embeddings(capsys):
    model = freeze(deep("llama"), names=["lm_head"])
    assert trained(model) == {"lm_head.weight"}
    assert "lm_head.weight was the embeddings' weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked", [{"head": True, "embeddings": True}, {"names": ["embed_tokens"]}, {"embeddings": True}]
)
def test_with_the_embeddings_it_stays_tied_to_them(asked, capsys):
    model = freeze(deep("llama"), **asked)
    assert trained(model) == {"model.embed_tokens.weight"}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    assert capsys.readouterr().out == ""


def test_a_tied_head_that_is_frozen_stays_tied(capsys):
    model = freeze(deep("llama"), [3])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert capsys.readouterr().out == ""


# What is shown ----------------------------------------------------------------------------------


def numel(model, names) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_says_from_the_bottom_up_what_is_trained(family):
    model = freeze(deep(family), [2, 3])
    front, norms, head = OUTSIDE[family]
    layer, behind = numel(model, of_layers(model, family, 0)), numel(model, norms | head)
    normed = numel(model, norms)
    assert layer_map(model) == {
        "embeddings": f"frozen, {numel(model, front):,}",
        "layers 0 to 1": f"frozen, {2 * layer:,}",
        "layers 2 to 3": f"trained, {2 * layer:,}",
        "behind the layers": f"{normed:,} of {behind:,} trained"
        if head
        else f"trained, {behind:,}",
    }


def test_the_map_tells_apart_what_is_trained_in_part():
    model = freeze(deep("llama"), names=["layers.1.mlp", "layers.3", "layers.2"])
    shown = layer_map(model)
    layer = numel(model, of_layers(model, "llama", 0))
    mlp = numel(model, [name for name in trained(model) if ".1.mlp." in name])
    assert [*shown] == ["embeddings", "layer 0", "layer 1", "layers 2 to 3", "behind the layers"]
    assert shown["layer 1"] == f"{mlp:,} of {layer:,} trained"
    assert shown["behind the layers"] == "frozen, 32"


def test_the_map_of_adapters_counts_them_in_their_layers():
    base = deep("llama")
    layer = numel(base, of_layers(base, "llama", 0))
    model = adapt_layers(base, "lora", [2, 3])
    added = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    shown = layer_map(model)
    assert shown["layers 0 to 1"] == f"frozen, {2 * layer:,}"
    assert shown["layers 2 to 3"] == f"{added:,} of {2 * layer + added:,} trained"


# Adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(("lora", family) for family in FAMILIES),
        *(("bottleneck", family) for family in ("llama", "qwen3", "gpt2", "bert", "roberta")),
    ],
)
def test_adapters_are_in_the_named_layers_and_they_alone_are_trained(method, family):
    model = adapt_layers(deep(family), method, [2, 3])
    place = re.escape(PLACES.get(family, "model.layers"))
    numbers = {re.search(rf"{place}\.(\d)\.", name)[1] for name in trained(model)}
    assert numbers == {"2", "3"}
    # Houlsby's adapters train the norms of their layers, too, where the paper's models have them.
    added = {"lora": r"\.lora_", "bottleneck": r"\.bottleneck_|LayerNorm"}[method]
    assert all(re.search(added, name) for name in trained(model))


def test_the_linear_layers_are_those_of_the_named_layers_whatever_they_are_called():
    assert linear_names(deep("gpt2"), [1]) == [
        *("transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"),
        *("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
    ]
    names = linear_names(deep("gpt2", n_layer=12), [1])
    assert not any(".h.11." in name or ".h.10." in name for name in names)


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_with_adapters_a_new_classification_head_is_trained_whole(method):
    model = adapt_layers(deep("bert", "classes"), method, [3])
    kept = {name for name in trained(model) if ".encoder.layer.3." not in name}
    assert {name.split(".modules_to_save")[0].split("base_model.model.")[1] for name in kept} == {
        "bert.pooler.dense",
        "classifier",
    }
