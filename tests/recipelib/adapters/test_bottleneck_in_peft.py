"""Bottleneck adapters as a citizen of PEFT, and what is refused."""

import copy

import peft
import pytest
import torch
from adapter_models import INPUTS, LLAMA, adapted, adapters, batch, build, logits, wake
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from recipelib.adapters.bottleneck import BottleneckConfig, BottleneckLayer

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
    model = adapted(model=build("llama").to(dtype), adapter_input=adapter_input, scaling="learned")
    trained = [one for one in model.parameters() if one.requires_grad]
    assert trained
    assert all(one.dtype == torch.float32 for one in trained)
    found = model(**batch(model)).logits
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert all(one.grad.dtype == torch.float32 for one in trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama").to(dtype), tmp_path)
    assert not any(one.requires_grad for one in loaded.parameters())
    model.add_adapter("second", BottleneckConfig(scaling="learned"))
    assert not any(one.requires_grad for name, one in model.named_parameters() if "second" in name)
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
    layer = next(one for one in model.modules() if isinstance(one, BottleneckLayer))
    with pytest.raises(NotImplementedError, match="not linear in h"):
        layer.merge()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(kind)))


def test_a_batch_of_several_adapters_is_refused():
    model = adapted()
    model.add_adapter("other", BottleneckConfig(bottleneck_size=4))
    rows = batch(model)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(**rows, adapter_names=["default", "other"])
    model(**rows)


@pytest.mark.parametrize(
    "options", [{"scaling": "learned"}, {"adapter_input": "residual"}, {"train_norms": True}]
)
def test_peft_s_policy_for_fsdp1_finds_units_of_one_dtype(options, tmp_path):
    distributed = torch.distributed
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        config = BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=4, **options)
        model = get_peft_model(build("llama").to(torch.bfloat16), config)
        sharded = FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        assert torch.float32 in {one.dtype for one in sharded.parameters()}
    finally:
        distributed.destroy_process_group()


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
        ({"scaling": None}, "scaling=None: is a number or 'learned'"),
        ({"bottleneck_size": 4.0}, "bottleneck_size=4.0: is a whole number"),
        ({"dropout": 1.5}, "dropout=1.5: is 0 or more and below 1"),
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

    module = sys.modules["recipelib.adapters.bottleneck"]
    again = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(again)
    assert again.BOTTLENECK is module.BOTTLENECK
    assert list(peft.PeftType).count("BOTTLENECK") == 1
    # The classes of the first hold, so that either file knows the other's adapters.
    assert again.BottleneckConfig is BottleneckConfig
    assert again.BottleneckLayer is module.BottleneckLayer
    assert again.BottleneckModel is module.BottleneckModel
