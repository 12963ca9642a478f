"""The bottleneck tuner as a citizen of PEFT, on tiny models of every kind it knows."""

import copy

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from common.bottleneck import (
    SUBLAYERS,
    BottleneckConfig,
    BottleneckLayer,
    layer_number,
    norm_names,
)

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
BERT = {key: LLAMA[key] for key in list(LLAMA)[:4]} | {"max_position_embeddings": 40}
# Of each kind: the config's arguments, the class, and how many sublayers it has in both layers.
KINDS = {
    "bert": (BERT, AutoModelForMaskedLM, 4),
    "roberta": (BERT, AutoModelForMaskedLM, 4),
    "xlm-roberta": (BERT, AutoModelForMaskedLM, 4),
    "camembert": (BERT, AutoModelForMaskedLM, 4),
    "electra": (BERT | {"embedding_size": 16}, AutoModelForMaskedLM, 4),
    "distilbert": (
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        AutoModelForMaskedLM,
        4,
    ),
    "t5": (
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        AutoModelForSeq2SeqLM,
        10,
    ),
    "mt5": (
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        AutoModelForSeq2SeqLM,
        10,
    ),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, AutoModelForCausalLM, 4),
    "gpt_neox": (
        {key: LLAMA[key] for key in list(LLAMA)[:4]},
        AutoModelForCausalLM,
        4,
    ),
    "opt": (
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
        },
        AutoModelForCausalLM,
        4,
    ),
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "phi3",
            "smollm3",
            "gemma2",
            "gemma3_text",
        ),
        (LLAMA, AutoModelForCausalLM, 4),
    ),
}
INPUTS = ("output", "residual", "input")


def build(kind: str, cls=None, **more):
    """A tiny model of a kind, in evaluation mode."""
    shape, own, _ = KINDS[kind]
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        **shape,
        vocab_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"decoder_start_token_id": 0} if own is AutoModelForSeq2SeqLM else {}),
        **more,
    )
    return (cls or own).from_config(config).eval()


def batch(model) -> dict:
    """Two rows that a model can compute."""
    torch.manual_seed(2)
    rows = {"input_ids": torch.randint(3, 48, (2, 7))}
    if model.config.is_encoder_decoder:
        rows["decoder_input_ids"] = torch.randint(3, 48, (2, 5))
    return rows


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def adapters(model) -> dict[str, BottleneckLayer]:
    return {name: one for name, one in model.named_modules() if isinstance(one, BottleneckLayer)}


def adapted(kind: str = "llama", adapter_name: str = "default", model=None, **config):
    """A tiny model with adapters that do something."""
    model = get_peft_model(
        model or build(kind),
        BottleneckConfig(**{"bottleneck_size": 4, "train_norms": False} | config),
        adapter_name=adapter_name,
    )
    wake(model)
    return model


def wake(model, seed: int = 3) -> None:
    """Make the trained parameters large enough to see."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.copy_(torch.randn_like(one) * 0.3)


# The method --------------------------------------------------------------------------------------


def test_every_known_kind_is_tried():
    assert set(KINDS) == set(SUBLAYERS) - {"gemma3"}  # whose text model is gemma3_text


@pytest.mark.parametrize("adapter_input", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
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
    assert torch.equal(logits(again), logits(model))
    model.train()
    model(**batch(model)).logits.sum().backward()
    for name, one in model.named_parameters():
        assert (one.grad is not None) == ("bottleneck_" in name)
    model.eval()
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert not any(one._forward_pre_hooks for one in plain.modules())


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


@pytest.mark.parametrize("adapter_input", INPUTS[1:])
@pytest.mark.parametrize("kind", KINDS)
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


# PEFT's own ways ---------------------------------------------------------------------------------


def test_only_the_adapter_is_saved_and_every_loader_gives_the_same(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(model=base, task_type="CAUSAL_LM").eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    count = 4 * (16 * 4 + 4 + 4 * 16 + 16)
    assert count * 4 < size < count * 4 + 3000
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, BottleneckConfig)
    assert config.target_modules == {"self_attn.o_proj", "mlp.down_proj"}

    def plain():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    assert torch.equal(logits(PeftModel.from_pretrained(plain(), tmp_path / "adapter")), expected)
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), expected)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # transformers' own way
    assert torch.equal(logits(loaded), expected)
    loaded = plain()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(plain()))


@pytest.mark.parametrize("adapter_input", INPUTS)
def test_several_adapters(tmp_path, adapter_input):
    base = logits(build("llama"))
    model = adapted("llama", "first", adapter_input=adapter_input)
    first = logits(model)
    model.add_adapter("second", BottleneckConfig(bottleneck_size=2, placement="ffn"))
    assert torch.equal(logits(model), first)
    assert not any(one.requires_grad for name, one in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    wake(model, seed=4)
    second = logits(model)
    assert not torch.equal(second, first)
    assert not torch.equal(second, base)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained
    assert all(".second." in name for name in trained)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    other = adapted("llama", "other")
    other.load_adapter(str(tmp_path / "second"), adapter_name="second")
    other.set_adapter("second")
    assert torch.equal(logits(other), second)
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not any("first" in name for name in model.state_dict())
    model.delete_adapter("second")  # PEFT's wrapper wants one that is active, so the model is asked
    assert torch.equal(logits(model.base_model.model), base)


def test_two_at_once_are_applied_in_their_order():
    model = adapted("llama", "first")
    model.add_adapter("second", BottleneckConfig(bottleneck_size=2))
    model.set_adapter("second")
    wake(model, seed=4)
    layer = adapters(model)["base_model.model.model.layers.1.mlp.down_proj"]
    x = torch.randn(2, 3, 24)
    model.base_model.set_adapter(["first", "second"])
    both = layer(x)
    h = layer.base_layer(x)
    for name in ("first", "second"):
        h = h + layer._added(name, h, None)
    torch.testing.assert_close(both, h)


def test_a_head_of_its_own_is_trained_and_saved(tmp_path):
    model = build("bert", AutoModelForSequenceClassification)
    model = get_peft_model(model, BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=4))
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {"base_model.model.classifier.modules_to_save.default.weight"} <= trained
    wake(model)
    model.save_pretrained(tmp_path)
    plain = build("bert", AutoModelForSequenceClassification)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path)), logits(model))


def test_trainable_parameters_are_printed(capsys):
    adapted().print_trainable_parameters()
    assert "trainable params: 592 " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_input", INPUTS)
def test_half_precision_bases(dtype, adapter_input, tmp_path):
    model = adapted(model=build("llama").to(dtype), adapter_input=adapter_input)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert trained
    assert all(one.dtype == torch.float32 for one in trained)
    found = model(**batch(model)).logits
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert all(one.grad.dtype == torch.float32 for one in trained)
    model = get_peft_model(
        build("llama").to(dtype), BottleneckConfig(), autocast_adapter_dtype=False
    )
    assert {one.dtype for one in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("adapter_input", INPUTS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_activation_checkpointing_changes_nothing(kind, adapter_input):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(kind, adapter_input=adapter_input)
        model.train()
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model(**batch(model)).logits.pow(2).mean().backward()
        gradients.append(
            {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name])


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = adapted("bert", adapter_input="residual")
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    before = logits(model)
    wake(other, seed=9)
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


def test_text_is_written_with_the_cache():
    model = adapted(adapter_input="residual", task_type="CAUSAL_LM")
    rows = batch(model)
    written = [
        model.generate(**rows, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*written)
    with model.disable_adapter():
        plain = model.generate(**rows, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert not torch.equal(plain, written[0])


# What will not do --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_adapter_is_not_merged_and_the_model_is_whole_afterwards(kind):
    model = adapted(kind, train_norms=True)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="not linear in h"):
            merge()
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(kind)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"placement": "everywhere"}, "placement='everywhere': is one of both, ffn, attention"),
        ({"adapter_input": "x"}, "is one of output, residual, input"),
        ({"init_weights": "zero"}, "is one of near_identity, identity"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, "say one of them"),
        ({"bottleneck_size": -1}, "above 0"),
        ({"bottleneck_size": 0}, "above 0"),
        ({"act": "gelo"}, "act='gelo'"),
        ({"act": "prelu"}, "act='prelu': no activation of ACT2FN, or one that is trained"),
        ({"scaling": "channel"}, "is a number or 'learned'"),
        ({"target_modules": ".*o_proj", "layers_to_transform": [1]}, "as a list"),
    ],
)
def test_configurations_that_will_not_do(config, said):
    with pytest.raises(ValueError, match=said):
        BottleneckConfig(**config)


def unknown():
    """A model of a kind that the tuner does not know."""
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("granite", **{k: LLAMA[k] for k in list(LLAMA)[:5]}, vocab_size=48)
    )


def test_models_that_are_not_known_say_what_to_pass():
    with pytest.raises(ValueError, match=r"model type 'granite'.*target_modules.*'o_proj'"):
        get_peft_model(unknown(), BottleneckConfig())
    names = ["o_proj", "down_proj"]
    model = get_peft_model(unknown(), BottleneckConfig(target_modules=names))
    assert len(adapters(model)) == 4
    with pytest.raises(ValueError, match="adapter_input='input'"):
        get_peft_model(unknown(), BottleneckConfig(target_modules=names, adapter_input="input"))


def test_modules_that_end_no_sublayer():
    config = {"target_modules": ["gate_proj"], "adapter_input": "residual"}
    with pytest.raises(ValueError, match="gate_proj ends no sublayer"):
        get_peft_model(build("llama"), BottleneckConfig(**config))
    with pytest.raises(ValueError, match="exclude_modules: pass a list"):
        get_peft_model(build("bert"), BottleneckConfig(placement="ffn", exclude_modules=".*0.*"))
    with pytest.raises(ValueError, match="is no linear layer"):
        get_peft_model(build("llama"), BottleneckConfig(target_modules=["input_layernorm"]))
    with pytest.raises(ValueError, match="not with post-norm OPT"):
        get_peft_model(
            build("opt", do_layer_norm_before=False), BottleneckConfig(adapter_input="input")
        )


def test_the_file_can_be_imported_twice():
    import importlib
    import sys

    module = sys.modules["common.bottleneck"]
    again = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(again)
    assert again.BOTTLENECK is module.BOTTLENECK
    assert list(peft.PeftType).count("BOTTLENECK") == 1
