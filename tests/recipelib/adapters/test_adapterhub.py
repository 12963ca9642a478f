"""Bottleneck adapters equal those of AdapterHub's adapters 1.3.0, and its folders are read.

The figures are golden: tests/golden/adapterhub.py made them in an environment of its own.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from recipelib.adapters.adapterhub import load_adapterhub
from recipelib.adapters.bottleneck import BottleneckConfig
from recipelib.runtime.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "adapterhub"
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL)),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "t5": lambda: T5Model(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
}
# The same adapters as one configures them here.
KINDS = {
    "double_seq_bn": {"reduction_factor": 4, "act": "swish"},
    "seq_bn": {
        "reduction_factor": 4,
        "placement": "ffn",
        "adapter_input": "residual",
        "act": "relu",
    },
    "par_bn": {
        "reduction_factor": 2,
        "placement": "ffn",
        "adapter_input": "input",
        "act": "relu",
        "scaling": 4.0,
        "init_weights": "identity",
    },
}


def golden(kind: str):
    """The tensors of a model, and it itself with its weights."""
    tensors = load_file(GOLDEN / f"{kind}.safetensors")
    model = MODELS[kind]().eval()
    weights = {
        key.removeprefix("model."): one for key, one in tensors.items() if key.startswith("model.")
    }
    model.load_state_dict(weights)
    return tensors, model


def theirs(key: str) -> str:
    """The name that AdapterHub has for a parameter of ours, less the adapter's."""
    key = key.removeprefix("base_model.model.")
    for ours, name in {
        ".self_attn.o_proj": ".attention_adapters",
        ".mlp.down_proj": ".output_adapters",
        ".SelfAttention.o.bottleneck": ".bottleneck",
        ".DenseReluDense.wo.bottleneck": ".bottleneck",
        ".dense.bottleneck": ".bottleneck",
        "bottleneck_down.default": "adapters.NAME.adapter_down.0",
        "bottleneck_up.default": "adapters.NAME.adapter_up",
    }.items():
        key = key.replace(ours, name)
    return key


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", MODELS)
def test_output_and_gradients_equal_adapterhub(kind, name):
    tensors, model = golden(kind)
    rows = {one: tensors[one] for one in ("input_ids", "attention_mask")}
    rows |= {"decoder_input_ids": tensors["input_ids"]} if kind == "t5" else {}
    untouched = model(**rows)
    model = load_adapterhub(model, GOLDEN / f"{kind}_{name}")
    output = model(**rows).last_hidden_state
    real = tensors["attention_mask"].bool()
    torch.testing.assert_close(output[real], tensors[f"{name}.output"][real], atol=1e-5, rtol=1e-5)
    assert (output - untouched.last_hidden_state).abs().max() > 0.01
    (output * tensors["weight"]).sum().backward()
    trained = {key: one for key, one in model.named_parameters() if one.requires_grad}
    expected = {
        key.removeprefix(f"{name}.gradient."): one
        for key, one in tensors.items()
        if key.startswith(f"{name}.gradient.")
    }
    assert {theirs(key).replace("NAME", name) for key in trained} == expected.keys()
    near = 1e-4 if kind == "t5" else 1e-5  # its attention is not scaled, so rounding shows more
    for key, one in trained.items():
        other = expected[theirs(key).replace("NAME", name)]
        torch.testing.assert_close(one.grad, other, atol=near, rtol=near)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_named_configurations_are_ours_in_other_words(kind, name):
    _, model = golden(kind)
    loaded = load_adapterhub(model, GOLDEN / f"{kind}_{name}")
    _, model = golden(kind)
    config = BottleneckConfig(**KINDS[name], train_norms=False)
    if (kind, name) == ("t5", "double_seq_bn"):
        config.exclude_modules = ["EncDecAttention.o"]  # of which theirs is a setting of its own
    model = get_peft_model(model, config)
    shapes = [
        {key: one.shape for key, one in some.named_parameters() if one.requires_grad}
        for some in (loaded, model)
    ]
    assert shapes[0] == shapes[1]
    found = loaded.peft_config["default"]
    for attribute in ("placement", "adapter_input", "act", "scaling", "target_modules"):
        assert getattr(found, attribute) == getattr(config, attribute)


def test_what_was_converted_is_peft_s(tmp_path):
    tensors, model = golden("llama")
    model = load_adapterhub(model, GOLDEN / "llama_par_bn")
    expected = model(input_ids=tensors["input_ids"]).last_hidden_state
    model.save_pretrained(tmp_path)
    _, model = golden("llama")
    again = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(again(input_ids=tensors["input_ids"]).last_hidden_state, expected)


def test_a_model_with_a_head_takes_an_adapter_of_one_without(tmp_path):
    tensors, model = golden("llama")
    whole = LlamaForCausalLM(model.config).eval()
    whole.model.load_state_dict(model.state_dict())
    whole = load_adapterhub(whole, GOLDEN / "llama_seq_bn")
    hidden = whole(input_ids=tensors["input_ids"], output_hidden_states=True).hidden_states[-1]
    model = load_adapterhub(model, GOLDEN / "llama_seq_bn")
    torch.testing.assert_close(model(input_ids=tensors["input_ids"])[0], hidden)


def test_a_new_head_is_trained_with_a_converted_adapter_and_kept(tmp_path):
    _, model = golden("bert")
    head = BertForSequenceClassification(model.config).eval()
    adapted = load_adapterhub(head, GOLDEN / "bert_seq_bn", task_type="SEQ_CLS", revision="old")
    trained = {name for name, one in adapted.named_parameters() if one.requires_grad}
    assert any("classifier" in name for name in trained)
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["task_type"], saved["revision"]) == ("SEQ_CLS", "old")
    assert any("classifier" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_learned_scale_is_taken_over(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["config"]["scaling"] = "learned"
    file.write_text(json.dumps(saved))
    weights = load_file(folder / "adapter.safetensors")
    for key in [key for key in weights if key.endswith("adapter_up.weight")]:
        weights[key.replace("adapter_up.weight", "scaling")] = torch.tensor([2.5])
    (folder / "adapter.safetensors").unlink()
    save_file(weights, folder / "adapter.safetensors")
    model = load_adapterhub(golden("bert")[1], folder)
    scales = [one for name, one in model.named_parameters() if "bottleneck_scaling" in name]
    assert [one.item() for one in scales] == [2.5, 2.5]


def test_layers_left_out(tmp_path):
    _, model = golden("bert")
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    weights = load_file(folder / "adapter.safetensors")
    save_file(
        {key: one for key, one in weights.items() if ".layer.1." in key},
        folder / "adapter.safetensors",
    )
    model = load_adapterhub(model, folder)
    assert model.peft_config["default"].layers_to_transform == [1]


@pytest.mark.parametrize(("kind", "name"), [("bert", "seq_bn"), ("t5", "double_seq_bn")])
def test_the_file_that_adapters_writes_by_default(tmp_path, kind, name):
    folder = shutil.copytree(GOLDEN / f"{kind}_{name}", tmp_path / "adapter")
    torch.save(load_file(folder / "adapter.safetensors"), folder / "pytorch_adapter.bin")
    (folder / "adapter.safetensors").unlink()
    found, expected = (
        load_adapterhub(golden(kind)[1], one).state_dict()
        for one in (folder, GOLDEN / f"{kind}_{name}")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_to_a_model_with_an_adapter_another_is_added(tmp_path):
    tensors, model = golden("bert")
    rows = {one: tensors[one] for one in ("input_ids", "attention_mask")}
    real = tensors["attention_mask"].bool()
    model = load_adapterhub(model, GOLDEN / "bert_seq_bn")
    same = load_adapterhub(model, GOLDEN / "bert_double_seq_bn", "second")
    assert same is model
    assert list(model.peft_config) == ["default", "second"]
    model.save_pretrained(tmp_path)
    for name, folder in (("seq_bn", tmp_path), ("double_seq_bn", tmp_path / "second")):
        model.set_adapter("default" if name == "seq_bn" else "second")
        for one in (model, PeftModel.from_pretrained(golden("bert")[1], folder)):
            output = one(**rows).last_hidden_state[real]
            torch.testing.assert_close(output, tensors[f"{name}.output"][real], atol=1e-5, rtol=0)
    before = list(model.state_dict())
    for folder, name, said in (
        ("bert_par_bn", "second", "has an adapter 'second'; pass adapter_name"),
        ("llama_seq_bn", "third", "is of model type 'llama'"),
    ):
        with pytest.raises(UserError, match=said):
            load_adapterhub(model, GOLDEN / folder, name)
    odd = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "odd")
    config = (odd / "adapter_config.json").read_text()
    (odd / "adapter_config.json").write_text(
        config.replace('"mh_adapter": false', '"mh_adapter": true')
    )
    with pytest.raises(UserError, match="layer 0, attention: has an adapter in one of"):
        load_adapterhub(model, odd, "third")
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["default", "second"]
    lora = get_peft_model(golden("bert")[1], LoraConfig(target_modules=["query"]))
    with pytest.raises(UserError, match="adapters of another method"):
        load_adapterhub(lora, GOLDEN / "bert_seq_bn", "second")
    inside = golden("bert")[1]
    inside.add_adapter(BottleneckConfig())
    with pytest.raises(UserError, match="has adapters inside"):
        load_adapterhub(inside, GOLDEN / "bert_seq_bn")


def refused(folder, change: dict | None = None, kind: str = "bert") -> str:
    """What is said of a folder whose configuration was changed."""
    if change:
        file = folder / "adapter_config.json"
        saved = json.loads(file.read_text())
        saved["config"] |= change
        file.write_text(json.dumps(saved))
    _, model = golden(kind)
    names = list(model.state_dict())
    with pytest.raises(UserError) as error:
        load_adapterhub(model, folder)
    assert list(model.state_dict()) == names, "the model is not as it was"
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ln_after": True}, "ln_after=True"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"residual_before_ln": False}, "residual_before_ln=False"),
        ({"scaling": "channel"}, "scaling by channel"),
        ({"reduction_factor": {"0": 2, "default": 4}}, "sizes by layer"),
        ({"architecture": "lora"}, "lora is no bottleneck adapter"),
        ({"mh_adapter": True}, "layer 0, attention"),
        ({"scaling": "learned"}, "scaling: has shape None"),
        ({"non_linearity": "gelo"}, "act='gelo'"),
    ],
)
def test_variants_that_are_not_here(tmp_path, change, said):
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    assert said in refused(folder, change)


def test_capitals_of_an_activation_mean_nothing(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"relu"', '"ReLU"'))
    assert load_adapterhub(golden("bert")[1], folder).peft_config["default"].act == "relu"


def test_layers_that_the_model_does_not_have(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    weights = load_file(folder / "adapter.safetensors")
    for shift, said in ((1, "layer 2, ffn"), (2, "does not fit the model")):
        moved = {
            key.replace(f".layer.{layer}.", f".layer.{layer + shift}."): one
            for layer in (0, 1)
            for key, one in weights.items()
            if f".layer.{layer}." in key
        }
        save_file(moved, folder / "adapter.safetensors")
        assert said in refused(folder)


def test_a_model_of_another_kind(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    said = refused(folder, kind="roberta")
    assert "is of model type 'bert', and the model of 'roberta'" in said
    model = BertModel(BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))
    with pytest.raises(UserError, match="adapters after cross-attention are not converted"):
        load_adapterhub(model, folder)


def test_folders_that_will_not_do(tmp_path):
    assert "no adapter_config.json" in refused(tmp_path)
    folder = shutil.copytree(GOLDEN / "bert_seq_bn", tmp_path / "adapter")
    weights = load_file(folder / "adapter.safetensors")
    (folder / "adapter.safetensors").write_bytes(b"no such thing")
    assert "cannot be read" in refused(folder)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    assert "something else than tensors" in refused(folder)
    for harmful in (weights | {"run": print}, weights | {"list": [1]}, [weights]):
        torch.save(harmful, folder / "pytorch_adapter.bin")
        assert "something else than tensors" in refused(folder)
    # What is not converted is said whatever the weights are called, or if there are none.
    (folder / "pytorch_adapter.bin").unlink()
    assert "neither adapter.safetensors nor pytorch_adapter.bin" in refused(folder)
    assert "phm_layer=True" in refused(folder, {"phm_layer": True})
    assert "cross_adapter=True" in refused(folder, {"phm_layer": False, "cross_adapter": True})
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"non_linearity"', '"activation"'))
    assert "non_linearity: is missing" in refused(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "is not a configuration" in refused(folder)
