"""Models of shapes only, and the configs that they are built from."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import save_tiny_llama
from transformers import BertConfig, LlamaForCausalLM, MambaConfig

from recipelib.models import count_parameters
from recipelib.planning import read_config
from recipelib.planning.skeletons import SHAPES, skeleton
from recipelib.runtime import UserError


@pytest.mark.parametrize(("name", "parameters"), [("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_the_published_shapes_have_as_many_parameters_as_is_published(name, parameters):
    model = skeleton(read_config(name), torch.bfloat16)
    assert count_parameters(model) == (parameters, parameters)
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert {*SHAPES} == {"8B", "70B"}


def test_a_folder_needs_no_weights(tmp_path):
    whole = save_tiny_llama(tmp_path / "whole")
    stored = LlamaForCausalLM.from_pretrained(whole)
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    for folder in (whole, tmp_path):
        model = skeleton(read_config(str(folder)), torch.float32)
        assert model.num_parameters() == stored.num_parameters()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": "nothing_like_it"}, "cannot be loaded"),
        ({"model_type": "t5"}, "a t5 is no causal language model of transformers"),
    ],
)
def test_what_is_no_causal_model_is_one_line(tmp_path, content, said):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as raised:
        read_config(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_config(str(tmp_path / "missing"))


def test_lora_is_what_the_recipes_train(config):
    model = skeleton(config, torch.bfloat16, r=4)
    whole = skeleton(config, torch.bfloat16)
    adapted = get_peft_model(whole, LoraConfig(r=4, target_modules="all-linear"))
    assert count_parameters(model) == count_parameters(adapted)
    kinds = {(one.requires_grad, one.dtype) for one in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_packed_weights_have_four_bits_and_their_scales(config):
    model = skeleton(config, torch.bfloat16, r=4, packed=True)
    plain = skeleton(config, torch.bfloat16, r=4)
    assert count_parameters(model) == count_parameters(plain)

    def size(model):
        return sum(
            one.numel() * one.element_size()
            for name, one in model.named_parameters()
            if "base_layer" in name
        )

    assert size(model) / size(plain) == pytest.approx(4.127 / 16, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BertConfig(), "a bert is no causal language model"),
        (MambaConfig(), "has state-space layers"),
    ],
    ids=["bert", "mamba"],
)
def test_a_model_that_cannot_be_planned_is_one_line(tmp_path, config, says):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        read_config(str(tmp_path))
