"""4-bit weights: what is refused, what is packed and how, and that it can be trained."""

import json
from types import SimpleNamespace

import pytest
import torch
from optional_packages import needs_bitsandbytes
from peft import LoraConfig, get_peft_model
from tiny_llama import save_tiny_llama, tiny_llama
from transformers import LlamaForCausalLM

from recipelib.models import quantization
from recipelib.models.loading import load_pretrained
from recipelib.models.quantization import (
    count_parameters,
    describe_quantization,
    four_bit_config,
    four_bit_loading,
    prepare_four_bit,
)
from recipelib.runtime.errors import UserError

BUNDLED = SimpleNamespace(model_name_or_path=None, revision=None)
IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])


def settings(**changes) -> SimpleNamespace:
    """What the trainer's arguments say on a CPU."""
    defaults = {
        "model_dtype": (torch.float32, "on a CPU"),
        "fp16": False,
        "mixed_precision": "no",
        "device": torch.device("cpu"),
    }
    return SimpleNamespace(**{**defaults, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=64)


@pytest.fixture
def installed(monkeypatch):
    """bitsandbytes is there, or so it seems."""
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# What is refused


def test_a_missing_bitsandbytes_is_one_line_with_the_cure(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        four_bit_loading(BUNDLED, settings())
    assert "bitsandbytes is not installed; pip install -r requirements-gpu.txt" in one_line(error)


@needs_bitsandbytes
def test_a_device_on_which_it_does_not_work_is_one_line_that_names_it(monkeypatch):
    def refuse(tensor, **options):
        raise RuntimeError("no library for CUDA 99\nsee the manual")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", refuse)
    with pytest.raises(
        UserError, match=r"does not work on cpu \(no library for CUDA 99\)"
    ) as error:
        four_bit_loading(BUNDLED, settings())
    one_line(error)


@needs_bitsandbytes
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_the_machine_lacks_is_one_line_that_names_it():
    with pytest.raises(UserError, match="does not work on cuda") as error:
        four_bit_loading(BUNDLED, settings(device=torch.device("cuda")))
    one_line(error)


@pytest.mark.parametrize(
    ("dtype", "mixed_precision", "fsdp", "kept"),
    [
        (torch.bfloat16, "bf16", True, True),
        (torch.float32, "no", True, True),
        (torch.float32, "bf16", True, False),  # from the accelerate config
        (torch.float32, "fp16", True, False),
        (torch.float32, "fp16", False, True),
        (torch.float32, "bf16", False, True),
    ],
)
@needs_bitsandbytes
def test_packed_weights_that_fsdp_would_convert_are_refused(
    dtype, mixed_precision, fsdp, kept, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp).lower())
    training = settings(model_dtype=(dtype, ""), mixed_precision=mixed_precision)
    if kept:
        assert four_bit_loading(BUNDLED, training)["device_map"] == {"": torch.device("cpu")}
        return
    with pytest.raises(UserError, match=f"convert the packed weights to {mixed_precision}") as no:
        four_bit_loading(BUNDLED, training)
    one_line(no)


def loading_of(name: str | None) -> dict:
    args = SimpleNamespace(model_name_or_path=name, revision=None)
    return four_bit_loading(args, settings())


def test_a_model_that_is_quantized_already_is_refused_by_its_config_alone(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()  # never read
    with pytest.raises(UserError, match=f"{tmp_path} is quantized already") as error:
        loading_of(str(tmp_path))
    one_line(error)


@needs_bitsandbytes
@pytest.mark.parametrize("named", ["folder", "the bundled one", "gguf"])
def test_a_model_that_is_not_quantized_yet_is_taken(named, folder):
    names = {"folder": str(folder), "the bundled one": None, "gguf": "prepared/by/us.GGUF"}
    assert loading_of(names[named])["quantization_config"].load_in_4bit


@needs_bitsandbytes
def test_weights_that_do_not_come_back_are_one_line_that_names_the_width(packed, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit

    prepare_four_bit(packed)

    def confuse(weight, state):
        whole = dequantize_4bit(weight, state)
        return whole.roll(1, 0) if whole.shape[1] == 128 else whole

    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", confuse)
    with pytest.raises(UserError, match="unpacks layers of 128 inputs wrongly on cpu") as error:
        prepare_four_bit(packed)
    one_line(error)


# What is packed, and how


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_is_the_papers_and_stores_what_fsdp_can_shard(dtype):
    config = four_bit_config(dtype)
    assert config.quantization_method() == "nf4"
    assert config.bnb_4bit_use_double_quant
    # FSDP gathers a group in one floating dtype.
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == dtype
    assert four_bit_config(dtype, torch.float16).bnb_4bit_compute_dtype == torch.float16


@pytest.fixture
def packed(folder):
    """The tiny model in 4 bits, with a LoRA on each of its layers."""
    model = load_pretrained(
        str(folder), dtype=torch.float32, **four_bit_loading(BUNDLED, settings())
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    return get_peft_model(model, lora)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_take_half_a_byte_per_weight_and_the_rest_keeps_its_dtype(folder, dtype):
    from bitsandbytes.functional import dequantize_4bit

    loading = four_bit_loading(BUNDLED, settings(model_dtype=(dtype, "")))
    model = load_pretrained(str(folder), dtype=dtype, **loading)
    whole = dict(load_pretrained(str(folder), dtype=torch.float32).named_modules())
    layers = {name: one for name, one in model.named_modules() if hasattr(one, "quant_state")}
    assert len(layers) == 14  # seven in each of two blocks, without the head
    for name, layer in layers.items():
        weight, original = layer.weight, whole[name].weight
        assert weight.dtype == dtype
        assert weight.numel() * weight.element_size() == original.numel() / 2
        error = dequantize_4bit(weight.data, weight.quant_state).float() - original
        assert error.norm() < 0.12 * original.norm()
        assert weight.quant_state.nested
    others = [one for one in model.parameters() if type(one).__name__ != "Params4bit"]
    assert {one.dtype for one in others} == {dtype}


@needs_bitsandbytes
def test_parameters_are_counted_as_if_they_were_whole(folder, packed):
    whole = load_pretrained(str(folder))
    base = count_parameters(whole)[1]
    adapter = sum(
        4 * sum(one.weight.shape) for name, one in whole.named_modules() if "proj" in name
    )
    assert count_parameters(packed) == (adapter, base + adapter)
    assert describe_quantization(packed) == "4-bit (nf4, double quantization)"
    assert describe_quantization(whole) is None


# That it can be trained


@needs_bitsandbytes
def test_the_gradient_reaches_every_layer_though_the_model_was_scored_before(packed):
    prepare_four_bit(packed)
    with torch.no_grad():
        before = packed.eval()(input_ids=IDS).logits
    packed.train()(input_ids=IDS, labels=IDS).loss.backward()
    norms = [one.grad.norm() for name, one in packed.named_parameters() if "lora_B" in name]
    assert len(norms) == 14
    assert min(norms) > 0
    with torch.no_grad():  # B is zero still
        assert torch.equal(packed.eval()(input_ids=IDS).logits, before)


@needs_bitsandbytes
def test_an_adapter_that_was_rounded_is_trained_in_float32_and_the_base_stays(packed):
    for weight in packed.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16()  # as TRL does
    packed.get_input_embeddings().bfloat16()
    prepare_four_bit(packed)
    assert {one.dtype for one in packed.parameters() if one.requires_grad} == {torch.float32}
    assert packed.get_input_embeddings().weight.dtype == torch.bfloat16


def test_parameters_that_are_tied_count_once():
    tied = tiny_llama(300)
    config = type(tied.config)(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    separate = LlamaForCausalLM(config)
    assert count_parameters(separate)[1] - count_parameters(tied)[1] == 300 * 32
    assert count_parameters(tied) == (count_parameters(tied)[1],) * 2
    tied.requires_grad_(False)
    tied.model.norm.requires_grad_(True)
    assert count_parameters(tied)[0] == 32
