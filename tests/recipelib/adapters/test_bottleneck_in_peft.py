"""Bottleneck adapters as a citizen of PEFT, and what is refused."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from adapter_models import INPUTS, LLAMA, adapted, adapters, batch, build, logits, wake
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
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
@pytest.mark.parametrize(("kind", "reentrant"), [("llama", False), ("bert", True)])
def test_activation_checkpointing_changes_nothing(kind, reentrant, adapter_input):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(kind, adapter_input=adapter_input)
        model.train()
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
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


# x belongs to the call ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "adapter_input"), [("bert", "residual"), ("llama", "input")])
def test_threads_that_share_a_model_read_their_own_x(kind, adapter_input):
    """Each thread stops between the sublayer's input and its end until the other one is there."""
    model = adapted(kind, adapter_input=adapter_input)
    rows = [torch.randint(3, 48, (1, 7)) for _ in range(2)]
    expected = [model(input_ids=one).logits for one in rows]
    meeting = threading.Barrier(2, timeout=20)
    for layer in adapters(model).values():
        layer.base_layer.register_forward_pre_hook(lambda module, args: (meeting.wait(), None)[1])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda one: model(input_ids=one).logits, rows))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("broken", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_forward_that_breaks_off_leaves_nothing(kind, broken):
    model = adapted(kind, adapter_input="residual").train()
    expected = logits(model.eval())
    alive = []

    def fail(module, args):
        alive.append(weakref.ref(args[0]))
        raise broken

    layer = list(adapters(model).values())[-1]
    hook = layer.base_layer.register_forward_pre_hook(fail)
    with pytest.raises(broken):
        model(**batch(model))
    hook.remove()
    gc.collect()
    assert alive[0]() is None, "tensors of the call are still held"
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("broken", [False, True])
def test_compiled_models_read_the_same_x(backend, broken):
    """In one graph, or in two with a break between the sublayer's input and its end."""
    model = adapted(adapter_input="residual").train()
    model(**batch(model)).logits.sum().backward()
    expected = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    if broken:
        for layer in adapters(model).values():
            layer.base_layer.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=not broken)
    compiled(**batch(model)).logits.sum().backward()
    found = [one.grad for one in model.parameters() if one.grad is not None]
    torch.testing.assert_close(found, expected)


# Rows of their own, and averages ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "opt", "t5"])
def test_rows_of_a_batch_have_adapters_of_their_own(kind):
    model = adapted(kind, "first", adapter_input="residual")
    model.add_adapter("second", BottleneckConfig(bottleneck_size=2, train_norms=False))
    model.set_adapter("second")
    wake(model, seed=4)
    rows = {name: torch.cat([one, one[:1]]) for name, one in batch(model).items()}
    expected = []
    for number, name in enumerate(("second", "__base__", "first")):
        row = {key: one[number : number + 1] for key, one in rows.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(**row).logits)
        else:
            model.set_adapter(name)
            expected.append(model(**row).logits)
    found = model(**rows, adapter_names=["second", "__base__", "first"]).logits
    torch.testing.assert_close(found, torch.cat(expected))
    torch.testing.assert_close(model(**rows).logits[2:], expected[2])  # the active one again
    with pytest.raises(ValueError, match="no adapter is called 'third'"):
        model(**rows, adapter_names=["first", "second", "third"])
    with pytest.raises(ValueError, match="2 names for a batch of 3 rows"):
        model(**rows, adapter_names=["first", "second"])
    with pytest.raises(ValueError, match="not in training mode"):
        model.train()(**rows, adapter_names=["first", "second", "first"])
    model.eval().add_adapter("third", BottleneckConfig(train_norms=True))
    with pytest.raises(ValueError, match="not beside norms"):
        model(**rows, adapter_names=["first", "second", "first"])


def test_beams_have_the_adapters_of_their_rows():
    model = adapted("llama", "first", task_type="CAUSAL_LM")
    model.add_adapter("second", BottleneckConfig(bottleneck_size=2, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    wake(model, seed=4)
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    rows = batch(model)["input_ids"]
    found = model.generate(input_ids=rows, adapter_names=["second", "first"], **options)
    assert torch.equal(found[:1], model.generate(input_ids=rows[:1], **options))
    model.set_adapter("first")
    assert torch.equal(found[1:], model.generate(input_ids=rows[1:], **options))


def test_adapters_are_averaged_with_their_norms_and_heads(tmp_path):
    model = build("bert", AutoModelForSequenceClassification)
    config = {"task_type": "SEQ_CLS", "bottleneck_size": 4, "scaling": "learned"}
    model = get_peft_model(model, BottleneckConfig(**config), "first")
    wake(model)
    model.add_adapter("other", BottleneckConfig(**config))
    model.set_adapter("other")
    wake(model, seed=4)
    model.add_weighted_adapter(["first", "other"], [0.25, 0.75], "both")
    parts = [parameters_of(model, name) for name in ("first", "other", "both")]
    assert any("LayerNorm" in name for name in parts[0])
    assert any("classifier" in name for name in parts[0])
    assert parts[0].keys() == parts[1].keys() == parts[2].keys()
    for name, one in parts[2].items():
        torch.testing.assert_close(one, 0.25 * parts[0][name] + 0.75 * parts[1][name])
    model.set_adapter("both")
    model.save_pretrained(tmp_path)
    plain = build("bert", AutoModelForSequenceClassification)
    again = PeftModel.from_pretrained(plain, tmp_path / "both")
    assert torch.equal(logits(again), logits(model))
    model.add_adapter("wide", BottleneckConfig(**config | {"bottleneck_size": 5}))
    for arguments, said in (
        ((["other", "wide"], [1, 1], "x"), "configured differently"),
        ((["other", "new"], [1, 1], "x"), "must exist"),
        ((["other"], [1], "both"), "'both' not"),
        ((["other"], [1, 2], "x"), "a weight for each"),
        ((["other"], [1], "x", "svd"), "takes 'linear'"),
    ):
        with pytest.raises(ValueError, match=said):
            model.add_weighted_adapter(*arguments)


def parameters_of(model, adapter_name: str) -> dict[str, torch.Tensor]:
    """What an adapter trains, as it would be saved."""
    return peft.get_peft_model_state_dict(model, adapter_name=adapter_name)


# Beside LoRA --------------------------------------------------------------------------------------


def test_names_widths_and_tokens_as_with_lora(tmp_path, recwarn):
    names = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(build("gpt2"), BottleneckConfig(**names), adapter_name="en")
    model.add_adapter("neck", BottleneckConfig(**names))
    assert model.peft_config["en"].target_modules == model.peft_config["neck"].target_modules
    for layer in adapters(model).values():
        assert (layer.in_features, layer.out_features) == tuple(layer.base_layer.weight.shape)
        assert layer.bottleneck_down.keys() == {"en", "neck"}
    for name in ("en", "neck"):  # parts of the prefix of our parameters
        model.set_adapter(name)
        wake(model)
        model.save_pretrained(tmp_path / name, selected_adapters=[name])
        again = PeftModel.from_pretrained(build("gpt2"), tmp_path / name / name, name)
        assert torch.equal(logits(again), logits(model))
    assert not [one for one in recwarn if "prefix" in str(one.message)]
    with pytest.raises(ValueError, match="adapter_name='bottleneck_up': is a part of ours"):
        model.add_adapter("bottleneck_up", BottleneckConfig(**names))
    model = adapted(trainable_token_indices=[3, 7])
    wake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))
    assert any("token" in name for name, one in model.named_parameters() if one.requires_grad)


@pytest.mark.parametrize("left_out", [r".*\.0\..*", ["layer.0.output.dense"]])
def test_modules_are_excluded_by_pattern_or_name_whatever_the_placement(left_out):
    model = adapted("bert", placement="ffn", exclude_modules=left_out)
    assert [name.rpartition("layer.")[2] for name in adapters(model)] == ["1.output.dense"]


def test_what_is_saved_says_what_to_import_where_the_method_is_not_known(tmp_path, monkeypatch):
    adapted().save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), BottleneckConfig)
    for kind in [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if "BOTTLENECK" in kind]:
        monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, kind)
    with pytest.raises(KeyError, match="import peft_bottleneck"):
        PeftConfig.from_pretrained(tmp_path)


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
        ({"target_modules": ["fc2"], "layers_pattern": "blocks"}, "needs layers_to_transform"),
        ({"sublayers": [{"end": "o_proj"}]}, "sublayers: .*'end'.*each has output and residual"),
        ({"sublayers": [{"output": "o", "residual": "n"}], "placement": "ffn"}, "names the places"),
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
    with pytest.raises(ValueError, match=r"adapter_input='input'.*or sublayers, which names it"):
        get_peft_model(unknown(), BottleneckConfig(target_modules=names, adapter_input="input"))


@pytest.mark.parametrize("adapter_input", INPUTS)
def test_sublayers_may_be_named_instead(adapter_input, tmp_path):
    """Llama's as a stranger would, and a model that is not of transformers."""
    names = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    sublayers = [{"output": end, "residual": norm} for end, norm in names.items()]
    config = {"adapter_input": adapter_input, "layers_to_transform": [1]}
    model, known = adapted(sublayers=sublayers, **config), adapted(**config)
    assert torch.equal(logits(model), logits(known))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.first = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
            self.last, self.after = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, x):
            return self.after(x + self.last(self.first(self.before(x))))

    plain = torch.nn.Sequential(Block(), Block())
    sublayer = {"output": "last", "residual": "before", "norm": "after"}
    model = get_peft_model(
        plain, BottleneckConfig(sublayers=[sublayer], adapter_input=adapter_input, scaling=0.5)
    )
    wake(model)
    x = torch.randn(2, 3, 8)
    for block in model.base_model.model:
        h = block.last.base_layer(block.first(block.before(x)))
        read = {"output": h, "input": x, "residual": block.after(h + x)}[adapter_input]
        down, up = block.last.bottleneck_down["default"], block.last.bottleneck_up["default"]
        added = 0.5 * up(torch.nn.functional.gelu(down(read)))
        torch.testing.assert_close(block(x), block.after(x + h + added))
        x = block(x)


def test_modules_that_end_no_sublayer():
    config = {"target_modules": ["gate_proj"], "adapter_input": "residual"}
    with pytest.raises(ValueError, match="gate_proj ends no sublayer"):
        get_peft_model(build("llama"), BottleneckConfig(**config))
    with pytest.raises(ValueError, match="MultiheadAttention uses its out_proj without"):
        get_peft_model(
            torch.nn.TransformerEncoderLayer(8, 2), BottleneckConfig(target_modules=["out_proj"])
        )
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
