"""A tiny model with random weights and its tokenizer, of any type that transformers' auto classes
know: the type's own default config with small numbers in it, and one layer of each kind.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 384
POSITIONS = 512
MOST_PARAMETERS = 5_000_000  # more is no tiny model, and says that a number was missed
MOST_LAYERS = 4
DECODER = " (decoder)"  # of a type that is both: the one that reads from left to right
# Types of other families that are taken for one of these; T5 stands for encoder-decoders.
OTHERS = ["t5"]

# What the numbers of configs become, by their names; those that are not here stay as they are.
WIDTH, HEADS, HEAD, EXPERTS = 32, 4, 8, 4
_NUMBERS = {
    "hidden_size d_model n_embd dim embedding_size emb_dim input_embedding_size lru_width "
    "word_embed_proj_dim output_embedding_size embedding_dim d_latents true_hidden_size "
    "prediction_head_size hidden_size_global out_hidden_size output_dim vision_output_dim "
    "projector_output_dim backbone_hidden_size attention_hidden_size entity_emb_size input_size "
    "output_proj_dims output_channels router_hidden_size index_topk ple_embed_dim": WIDTH,
    "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size": WIDTH,
    "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size d_inner d_ff "
    "hidden_dim dim_ff dff feed_forward_size mlp_dim intermediate_size_mlp "
    "dense_intermediate_size": 2 * WIDTH,
    "kv_lora_rank q_lora_rank o_lora_rank intra_bottleneck_size embedding_rank hc_lowrank "
    "mamba_d_head mamba_head_dim": WIDTH // 2,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
    "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "linear_num_value_heads mamba_n_heads mamba_num_heads swa_num_attention_heads index_n_heads "
    "linear_num_heads": HEADS,
    "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads": HEADS // 2,
    "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim d_head dim_head "
    "linear_value_head_dim attention_head_size swa_head_dim index_head_dim kv_channels d_kv "
    "linear_head_dim rotary_dim mamba_d_state state_size ssm_state_size mamba_dt_rank "
    "time_step_rank hidden_size_per_layer_input laurel_rank gated_norm_rank adapter_rank "
    "d_rel": HEAD,
    "encoder_layers decoder_layers n_layer n_layers num_hidden_layers num_layers depth num_blocks "
    "num_encoder_layers num_decoder_layers num_layers_per_stack conf_num_hidden_layers": 2,
    "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num": EXPERTS,
    "num_experts_per_tok top_k_experts moe_topk moe_k num_experts_per_token": 2,
    "n_group topk_group first_k_dense_replace": 1,
    "vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size "
    "unpadded_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab": VOCABULARY,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length position_embedding_size "
    "max_source_positions max_target_positions original_max_position_embeddings": POSITIONS,
    "sliding_window sliding_window_size window_size local_attention attention_chunk_size "
    "chunk_size mamba_chunk_size attention_window_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
_SMALL = {name: number for names, number in _NUMBERS.items() for name in names.split()}
# Those that get a number where the config has none.
_WHERE_NONE = {
    *("num_key_value_heads", "num_kv_heads", "n_routed_experts", "num_experts_per_tok", "head_dim")
}

# What these rules do not reach, by model type, or by type and sub-config.
_ROPE = dict(rope_type="default", rope_theta=10000.0)
_SLIDING = dict(  # what its sliding layers have of their own
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_head_dim=8,
    swa_q_lora_rank=16,
    swa_kv_lora_rank=16,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
    shared_experts_intermediate_size=32,
)
_SHARED = dict(  # the upper layers read keys and values of those below
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
)
_GEMMA4 = _SHARED | dict(global_head_dim=16)
_DRAFTER = dict(  # all its layers read those of the model that it drafts for
    layer_types=["sliding_attention", "full_attention"],
    num_hidden_layers=2,
    num_kv_shared_layers=2,
    global_head_dim=16,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=0,
)
_INDEXER = dict(
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=32,
    indexer_compress_ratio=4,
)
_SOUND = dict(num_filters=4, hidden_size=32, codebook_dim=32, codebook_size=64)
_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        rope_parameters=dict(full_attention=_ROPE, sliding_attention=_ROPE)
    ),
    "dbrx.attn_config": dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
    "dots1": dict(n_shared_experts=1, moe_intermediate_size=32),
    "dots3_note.audio_config": dict(adapter_input_size=32, adapter_out_dim=32),
    "dots3_note.text_config": _SLIDING,
    "dots3_note.vision_config": dict(adapter_in_dim=32, adapter_out_dim=32),
    "dots3_note_text": _SLIDING,
    "emu3": dict(vocabulary_map={"<image>": 380, "<|extra_200|>": 381}),
    "emu3.vq_config": dict(base_channels=32, codebook_size=64),
    "esm": dict(vocab_size=VOCABULARY),
    "esmc": dict(num_key_value_heads=HEADS),
    "falcon_h1": dict(mamba_d_ssm=64),
    "flint": dict(mlp_only_layers=[]),
    "gemma3n_text": _SHARED | dict(activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0]),
    "gemma4.text_config": _GEMMA4,
    "gemma4_assistant.text_config": _DRAFTER,
    "gemma4_text": _GEMMA4,
    "gemma4_unified.text_config": dict(global_head_dim=16),
    "gemma4_unified.vision_config": dict(mm_embed_dim=32, mm_posemb_size=32),
    "gemma4_unified_assistant.text_config": _DRAFTER,
    "gemma4_unified_text": dict(global_head_dim=16),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hrm_text": dict(num_hidden_layers=1, num_layers_per_stack=None),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(head_dim=16, n_groups=1),
    "musicgen.audio_encoder": _SOUND,
    "musicgen_melody.audio_encoder": _SOUND,
    "nemotron_h": dict(n_groups=1),
    "neomme": dict(head_dim=16),
    "qwen4_exp.text_config": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        attn_layers=["local", "lsh"], axial_pos_shape=[16, 32], axial_pos_embds_dim=[8, 24]
    ),
    "roc_bert": dict(
        pronunciation_vocab_size=VOCABULARY,
        pronunciation_embed_dim=32,
        shape_vocab_size=VOCABULARY,
        shape_embed_dim=16,
    ),
    "xlstm": dict(hidden_size=64, embedding_dim=64, num_heads=2, qk_dim_factor=1.0),
    "zamba": dict(
        layers_block_type=["linear_attention", "hybrid"] * 2,
        num_hidden_layers=4,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zaya": dict(num_experts_per_tok=1),
}
# What default configs leave out: towers, or what makes them valid.
_TOWERS = dict(vision_config={}, audio_config={})
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4": _TOWERS,
    "gemma4_unified": _TOWERS,
    "gemma4_assistant": dict(
        text_config=dict(
            model_type="gemma4_text",
            num_kv_shared_layers=30,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=0,
        )
    ),
}
# Lists that are as long as there are layers by chance only: they name layers.
_INDICES = {"moe_layers", "full_attn_idxs", "cross_attention_layers", "mlp_only_layers"}


def types() -> list[str]:
    """The names of all architectures: model types, and the decoders of those that are both."""
    from transformers.models.auto import modeling_auto as auto

    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both = [name + DECODER for name in causal if name in masked]
    return sorted({*causal, *masked, *both, *OTHERS})


def build(name: str, folder: Path) -> str:
    """Save a tiny model and its tokenizer as `from_pretrained` takes them.

    Args:
        name: one of `types()`.
    Returns:
        The model's class and how many parameters it has, in words.
    Raises:
        Exception: whatever stands in the way.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name.removesuffix(DECODER)]
    given = {"is_decoder": True} if name.endswith(DECODER) else {}
    config = kind(**(small_fields(kind, tiny_tokenizer()) | given))
    model_class = class_for(name, config)
    with torch.device("meta"):
        count = parameters(model_class._from_config(config))
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer(ends=model_class.__name__.endswith("ForMaskedLM")).save_pretrained(folder)
    return f"{model_class.__name__}, {count:,} parameters"


def parameters(model) -> int:
    """How many numbers a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def class_for(name: str, config) -> type:
    """The class whose checkpoints the hub has: with towers where there are such, encoder and
    decoder together, masked before causal.
    """
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if name.endswith(DECODER):
        return causal[type(config)]
    families = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        causal,
    )
    return next(family[type(config)] for family in families if type(config) in family)


def tiny_tokenizer(ends: bool = False):
    """A byte-level tokenizer with all special tokens that a model may want, and a chat template.

    Args:
        ends: it puts an end behind a text, as those of masked models do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 24,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "The movie review is: a good film or a bad one. The sentiment of the review is positive"
    backend.train_from_iterator([text, f"{text} negative"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A",
        pair="<s> $A </s> $B </s>" if ends else "<s> $A $B",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    special = {f"{name}_token": token for name, token in names.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", **special
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def forward(folder: Path) -> str:
    """What plain transformers makes of a text: "works", or "works, reads ahead" where a token
    changes what is predicted before it.

    Raises:
        Exception: the model does not load, or asks for more than text.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a good film", "a good bad"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        output = model(**batch)
    logits = output.logits if "logits" in output else output[0]
    if logits.shape[:2] != batch["input_ids"].shape or logits.isnan().any():
        raise ValueError(f"logits of shape {tuple(logits.shape)}")
    ahead = (logits[0, :2] - logits[1, :2]).abs().max() > 1e-6  # both begin alike
    return "works, reads ahead" if ahead and not config.is_encoder_decoder else "works"


# Configs -----------------------------------------------------------------------------------------


def small_fields(kind: type, tokenizer, config=None, place: str = "") -> dict[str, Any]:
    """The fields of a small config.

    Args:
        kind: the config's class.
        config: one with default numbers; else it is made.
        place: the type and the sub-config: `gemma3.text_config`.
    """
    place = place or kind.model_type
    config = kind(**_DEFAULTS.get(place, {})) if config is None else config
    defaults = config.to_dict()
    fields = {}
    for name in {field.name for field in dataclasses.fields(kind)} & _SMALL.keys():
        value = defaults.get(name)
        if type(value) is int or (value is None and name in _WHERE_NONE):
            fields[name] = _SMALL[name]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # which has no groups
        fields["num_key_value_heads"] = HEADS
    fields |= layer_lists(defaults) | special_ids(defaults, tokenizer) | rope_fields(defaults)
    for name in getattr(kind, "sub_configs", {}):
        if inner := getattr(config, name, None):
            fields[name] = small_fields(type(inner), tokenizer, inner, f"{place}.{name}")
            fields[name]["model_type"] = inner.model_type
    return fields | _FIELDS.get(place, {})


def layer_lists(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The lists that say of each layer what it is, cut to one layer of each kind, at least two, and
    how many layers these are; nothing where a config has no such lists.
    """
    depth = defaults.get("num_hidden_layers")
    lists = {
        name: value
        for name, value in defaults.items()
        if isinstance(value, list | tuple) and len(value) == depth and name not in _INDICES
    }
    if not lists:
        return {}
    first: dict[str, int] = {}
    for place, kind in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(str(kind), place)
    places = [*first.values()][:MOST_LAYERS] if len(first) > 1 else [0, 1]
    small = {
        name: [_small(name, value[place]) for place in places] for name, value in lists.items()
    }
    return {**small, "num_hidden_layers": len(places)}


def _small(name: str, value: Any) -> Any:
    return _SMALL.get(name, value) if type(value) is int else value


def special_ids(defaults: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """The tokens' ids: the tokenizer's own, and for those of images and sounds the last ones of the
    vocabulary, which no text has.
    """
    names = ("bos", "eos", "pad", "unk", "mask", "cls", "sep")
    own = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    own["decoder_start_token_id"] = own["bos_token_id"]
    free = iter(range(VOCABULARY - 1, 0, -1))
    return {
        name: own[name] if name in own else next(free)
        for name, value in defaults.items()
        if name in own or (name.endswith(("_token_id", "_token_index")) and type(value) is int)
    }


def rope_fields(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions whose sections are as long as a small head, where there are sections."""

    def small(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: small(inner, key) for key, inner in value.items()}
        return [2, 1, 1] if name == "mrope_section" else value

    given = {name: defaults.get(name) for name in ("rope_parameters", "rope_scaling")}
    return {name: new for name, old in given.items() if (new := small(old)) != old}
