"""Bottleneck adapters: the method, its sizes, its layers and norms, on every kind of model."""

import copy

import peft
import pytest
import torch
from adapter_models import KINDS, NORMED, PAIRS, adapted, adapters, batch, build, logits, wake
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from recipelib.adapters.bottleneck import SUBLAYERS, BottleneckConfig, layer_number, norm_names

# The method --------------------------------------------------------------------------------------


def test_every_known_kind_is_tried():
    assert set(KINDS) == set(SUBLAYERS) - {"gemma3"}  # whose text model is gemma3_text


@pytest.mark.parametrize(("kind", "adapter_input"), PAIRS)
def test_every_kind_of_model(kind, adapter_input, tmp_path):
    model = build(kind)
    base = logits(model)
    model = adapted(
        model=model, adapter_input=adapter_input, init_weights="identity", bottleneck_size=4
    )
    assert len(adapters(model)) == KINDS[kind][2]
    assert (logits(model) - base).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(kind), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)  # convolutions
    model.train()
    model(**batch(model)).logits.sum().backward()
    for name, one in model.named_parameters():
        assert (one.grad is not None) == ("bottleneck_" in name)
    model.eval()
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert not any(one._forward_pre_hooks for one in plain.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_h_and_x_are_what_the_model_adds(kind):
    """Their sum is given to a norm, or is what a layer puts out."""
    model = get_peft_model(build(kind), BottleneckConfig(adapter_input="input"))
    seen, sums = [], []

    def keep(module, args, kwargs, output):
        for some in (args, tuple(kwargs.values()), output):
            seen.extend(one for one in as_list(some) if isinstance(one, torch.Tensor))

    def as_list(some):
        return some if isinstance(some, tuple) else [some]

    for one in model.modules():
        one.register_forward_hook(keep, with_kwargs=True)
    side_by_side, last = kind in ("gpt_neox", "gptj"), {}
    for name, layer in adapters(model).items():

        def added(adapter, hidden, residual, name=name):
            block = model.get_submodule(name[: name.index(f"{layer_number(name)}.") + 1])
            if kind in NORMED:
                hidden = getattr(
                    block, f"post_{'attention' if 'attn' in name else 'feedforward'}_layernorm"
                )(hidden)
            if side_by_side and "mlp" in name:
                hidden = hidden + last["attention"]
            last["attention"] = hidden
            if not side_by_side or "mlp" in name:
                sums.append(hidden + residual)
            return 0

        layer._added = added
    logits(model)
    assert len(sums) == KINDS[kind][2] // (2 if side_by_side else 1)
    for one in sums:
        alike = (other.reshape(one.shape) for other in seen if other.numel() == one.numel())
        assert any(torch.allclose(other, one, atol=1e-6) for other in alike)


@pytest.mark.parametrize("kind", NORMED)
def test_no_h_and_x_are_read_where_h_is_normed_before_it_is_added(kind):
    with pytest.raises(ValueError, match=f"'residual': {kind} norms h before it is added"):
        get_peft_model(build(kind), BottleneckConfig(adapter_input="residual"))


def test_where_x_does_not_come_by_it_is_said():
    model = adapted(model=build("distilbert", chunk_size_feed_forward=1), adapter_input="residual")
    with pytest.raises(RuntimeError, match="chunk_size_feed_forward"):
        logits(model)


def test_gemma_3_with_eyes_is_known_by_its_text_layers():
    config = BottleneckConfig()
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    prepared = tuner._prepare_adapter_config(None, config, {"model_type": "gemma3"})
    assert prepared.target_modules == {"self_attn.o_proj", "mlp.down_proj"}


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "gpt2"])
def test_placements(kind):
    count = {
        place: len(adapters(adapted(kind, placement=place)))
        for place in ("both", "attention", "ffn")
    }
    assert count["ffn"] == (4 if kind == "t5" else 2)
    assert count["attention"] == (6 if kind == "t5" else 2)
    assert count["both"] == count["ffn"] + count["attention"]


def test_a_placement_is_kept(tmp_path):
    model = adapted("bert", placement="ffn", layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert adapters(again).keys() == adapters(model).keys()
    assert torch.equal(logits(again), logits(model))


def test_cross_attention_of_a_bert_decoder_is_attention():
    model = build("bert", AutoModelForCausalLM, is_decoder=True, add_cross_attention=True)
    assert len(adapters(adapted(model=copy.deepcopy(model), placement="attention"))) == 4
    assert len(adapters(adapted(model=model, placement="ffn"))) == 2


def test_it_is_the_formula():
    model = adapted(act="relu", scaling=0.5)
    layer = adapters(model)["base_model.model.model.layers.1.mlp.down_proj"]
    x = torch.randn(2, 3, 24)
    h = layer.base_layer(x)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    expected = h + 0.5 * (torch.relu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    torch.testing.assert_close(layer(x), expected)


def test_initial_weights():
    model = get_peft_model(build("llama"), BottleneckConfig(bottleneck_size=512))
    weights = torch.cat(
        [
            part["default"].weight.flatten()
            for one in adapters(model).values()
            for part in (one.bottleneck_down, one.bottleneck_up)
        ]
    )
    assert weights.abs().max() <= 0.02
    assert 0.0085 < weights.std() < 0.0092  # a normal cut off at two of its deviations has 0.88
    biases = [
        one for name, one in model.named_parameters() if "bottleneck" in name and "bias" in name
    ]
    assert biases
    assert not any(one.any() for one in biases)
    base = logits(build("llama"))
    model = get_peft_model(build("llama"), BottleneckConfig())
    assert 0 < (logits(model) - base).abs().max() < 0.01
    model = get_peft_model(build("llama"), BottleneckConfig(init_weights="identity"))
    assert torch.equal(logits(model), base)


def test_sizes():
    def width(**config):
        layer = next(
            iter(adapters(get_peft_model(build("bert"), BottleneckConfig(**config))).values())
        )
        return layer.bottleneck_down["default"].out_features

    assert width() == 64
    assert width(bottleneck_size=3) == 3
    assert width(reduction_factor=5) == 3
    assert width(reduction_factor=100) == 1


def test_a_learned_scale_is_trained_and_kept(tmp_path):
    model = adapted(scaling="learned")
    scales = [one for name, one in model.named_parameters() if "bottleneck_scaling" in name]
    assert len(scales) == 4
    assert all(one.requires_grad and one.shape == (1,) for one in scales)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    fresh = get_peft_model(build("llama"), BottleneckConfig(scaling="learned"))
    fixed = get_peft_model(build("llama"), BottleneckConfig())
    fixed.load_state_dict(fresh.state_dict(), strict=False)
    assert torch.equal(logits(fresh), logits(fixed))


def test_dropout_only_while_training():
    model = adapted(dropout=0.5)
    still = logits(model)  # the model was in evaluation mode, and so are its adapters
    assert torch.equal(logits(model.eval()), still)
    assert not torch.equal(logits(model.train()), still)


# Counts of the papers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("large", "train_norms", "expected"),
    [(False, False, 2_379_264), (True, False, 6_343_680), (False, True, 2_419_202)],
)
def test_parameter_counts_of_bert(large, train_norms, expected):
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = AutoConfig.for_model(
        "bert", **(shape | {"intermediate_size": 4096} if large else {}), num_labels=2
    )
    with torch.device("meta"):
        cls = AutoModelForSequenceClassification if train_norms else AutoModel
        model = cls.from_config(config)
        task = "SEQ_CLS" if train_norms else None
        model = get_peft_model(
            model, BottleneckConfig(bottleneck_size=64, train_norms=train_norms, task_type=task)
        )
    assert model.get_nb_trainable_parameters()[0] == expected


# Layers and norms --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5", "distilbert"])
def test_chosen_layers(kind):
    for layers in ([1], 1):
        model = adapted(kind, layers_to_transform=layers)
        assert {layer_number(name) for name in adapters(model)} == {1}
        assert len(adapters(model)) == KINDS[kind][2] // 2


def test_layers_of_a_model_without_a_head(tmp_path):
    model = adapted(model=build("llama", AutoModel), layers_to_transform=[0])
    assert {layer_number(name) for name in adapters(model)} == {0}


def test_no_gradient_passes_below_the_lowest_adapter():
    model = adapted(layers_to_transform=[1])
    seen = {}
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(
            lambda module, args, output, number=number: seen.update({number: output.requires_grad})
        )
    model(**batch(model)).logits.sum().backward()
    assert seen == {0: False, 1: True}


def test_which_norms_are_trained(tmp_path):
    def trained(model):
        return {
            name
            for name, one in model.named_parameters()
            if one.requires_grad and "bottleneck" not in name
        }

    config = {"bottleneck_size": 4}
    assert trained(get_peft_model(build("llama"), BottleneckConfig(**config))) == set()
    assert (
        trained(get_peft_model(build("bert", AutoModelForCausalLM), BottleneckConfig(**config)))
        == set()
    )
    model = get_peft_model(build("bert"), BottleneckConfig(**config))
    assert len(trained(model)) == 2 * (1 + 2 * 2 + 1)  # embeddings, layers, the head's
    model = get_peft_model(build("llama"), BottleneckConfig(**config, train_norms=True))
    assert len(trained(model)) == 2 * 2 + 1
    wake(model)
    base = logits(build("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))
    model = get_peft_model(
        build("qwen3"), BottleneckConfig(**config, train_norms=True, layers_to_transform=[1])
    )
    assert {layer_number(name) for name in trained(model)} == {1}
    assert not any("q_norm" in name for name in trained(model))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("cls", [None, AutoModel])
def test_norms_of_queries_and_keys_are_no_layer_norms(kind, cls):
    model = get_peft_model(build(kind, cls), BottleneckConfig(train_norms=True))
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert any("input_layernorm" in name for name in trained)
    assert not any("q_norm" in name or "k_norm" in name for name in trained)


@pytest.mark.parametrize(("kind", "adapter_input"), [one for one in PAIRS if one[1] != "output"])
def test_adapters_read_the_same_where_norms_are_trained(kind, adapter_input):
    plain = adapted(kind, adapter_input=adapter_input)
    config = BottleneckConfig(bottleneck_size=4, adapter_input=adapter_input, train_norms=True)
    model = get_peft_model(build(kind), config)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not any("bottleneck" in name for name in missing + unexpected)
    assert torch.equal(logits(model), logits(plain))
    # One that trains norms beside one that does not.
    plain.add_adapter("second", config)
    before = logits(plain)
    plain.set_adapter("second")
    logits(plain)
    plain.set_adapter("default")
    assert torch.equal(logits(plain), before)


def test_a_classifier_with_pfeiffer_s_adapters_trains_norms(tmp_path):
    model = build("llama", AutoModelForSequenceClassification)
    config = BottleneckConfig(
        task_type="SEQ_CLS", bottleneck_size=4, placement="ffn", adapter_input="residual"
    )
    model = get_peft_model(model, config)
    wake(model)
    model.save_pretrained(tmp_path)
    plain = build("llama", AutoModelForSequenceClassification)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_unload_gives_the_model_back_with_its_norms(kind):
    base = logits(build(kind))
    model = get_peft_model(build(kind), BottleneckConfig(bottleneck_size=4))
    assert model.peft_config["default"].train_norms
    wake(model)
    assert not torch.equal(logits(model), base)
    assert torch.equal(logits(model.unload()), base)


def test_norms_of_layers_in_a_list_of_another_name():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.down = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(Block() for _ in range(3))
    for pattern in ("blocks", None):
        config = BottleneckConfig(
            target_modules=["down"],
            layers_to_transform=[1],
            layers_pattern=pattern,
            train_norms=True,
        )
        wrapper = torch.nn.Module()
        wrapper.body = copy.deepcopy(model)
        trained = {
            name
            for name, one in get_peft_model(wrapper, config).named_parameters()
            if one.requires_grad
        }
        assert {layer_number(name) for name in trained} == {1}
        assert any(".norm." in name for name in trained)
        assert any(".bottleneck_up." in name for name in trained)


def test_norms_of_a_second_adapter():
    model = get_peft_model(build("bert"), BottleneckConfig(bottleneck_size=4))
    model.add_adapter("other", BottleneckConfig(bottleneck_size=4))
    saved = [config.modules_to_save for config in model.peft_config.values()]
    assert saved[0] == saved[1] == norm_names(build("bert"))


def test_a_trained_norm_is_the_one_that_pfeiffer_s_adapter_reads():
    model = get_peft_model(
        build("bert"),
        BottleneckConfig(bottleneck_size=4, placement="ffn", adapter_input="residual"),
    )
    wake(model)
    before = logits(model)
    layer = model.get_base_model().bert.encoder.layer[1].output
    taken = {}
    adapter = layer.dense.bottleneck_down["default"]
    adapter.register_forward_hook(lambda module, args, output: taken.update(read=args[0]))
    layer.LayerNorm.register_forward_hook(
        lambda module, args, output: taken.setdefault("normed", output)
    )
    logits(model)
    assert torch.equal(taken["read"], taken["normed"])
    with torch.no_grad():
        layer.LayerNorm.modules_to_save["default"].weight.mul_(2)
    assert not torch.equal(logits(model), before)
