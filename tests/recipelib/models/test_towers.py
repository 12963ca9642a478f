"""What text does not reach is left alone, and so is what an adapter would do nothing beside."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import LLAMA_LIKE, tiny
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from recipelib.models import decoder_layers, find_layers, load_pretrained, tower_names, without_lora


def gemma3():
    """With as many layers for images as for text, which come first."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    text = {**LLAMA_LIKE, "vocab_size": 300, "sliding_window": 64, "layer_types": layers}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 14}
    vision |= {"num_attention_heads": 2, "image_size": 28}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 297, "boi_token_index": 296}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, **tokens, eoi_token_index=295)
    )


def gradients_of_text(model) -> set[str]:
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    return {name for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_towers_are_exactly_what_no_text_passes_through():
    model = gemma3().train()
    towers = tower_names(model)
    assert towers == ["model.vision_tower", "model.multi_modal_projector"]
    reached = gradients_of_text(model)
    for name, _ in model.named_parameters():
        assert (name in reached) != name.startswith(tuple(towers)), name


def test_a_tower_is_frozen_when_the_model_is_loaded(tmp_path):
    gemma3().save_pretrained(tmp_path)
    model = load_pretrained(str(tmp_path))
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all(name.startswith(tuple(tower_names(model))) for name in frozen)


def test_layers_are_those_that_text_passes_through():
    model = gemma3()
    own = list(model.model.language_model.layers)
    assert list(find_layers(model).layers) == own
    assert decoder_layers(model) == own


def test_lora_adapts_no_tower_also_if_its_layers_have_the_names_that_are_asked_for():
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        model = gemma3()
        options = {"target_modules": targets, "exclude_modules": without_lora(model)}
        adapted = get_peft_model(model, LoraConfig(**options))
        names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
        assert names
        assert all(".language_model." in name for name in names)


def test_every_lora_matrix_beside_a_mamba_layer_is_trained():
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = tiny("mamba", **fields).train()
    lora = LoraConfig(target_modules="all-linear", exclude_modules=without_lora(model))
    adapted = get_peft_model(model, lora)
    ids = torch.arange(1, 9)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: w.grad for name, w in adapted.named_parameters() if w.requires_grad}
    assert trained
    assert all(grad is not None for grad in trained.values())


def test_a_router_that_puts_out_more_than_a_product_has_no_adapter():
    fields = {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 32}
    names = without_lora(tiny("llama4_text", **LLAMA_LIKE, **fields))
    assert names
    assert all(name.endswith(".router") for name in names)
