"""Where soft prompts and prefixes start, and a soft prompt that is computed once for all rows of a
batch: in a causal model, what stands in front of every text does not depend on the texts.

PEFT puts the prompt in front of each row and computes it once per row; with rows as short as a
sentence the prompt is a third of all tokens. Here its keys and values are computed once, with their
gradients, and every row sees them as its KV cache.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from recipelib.encoding import CausalAsker, MaskedAsker
from recipelib.models import bare_model, is_masked_model, nature_of_model
from recipelib.prompts import Question, RowError
from recipelib.runtime import UserError, fsdp_option, uses_fsdp

PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


def start_ids(
    init: str,
    count: int,
    asker: CausalAsker | MaskedAsker,
    question: Question,
    words: Mapping[str, Sequence[Sequence[int]]],
) -> list[int]:
    """The tokens at whose embeddings a soft prompt of `count` tokens starts; none for random
    numbers.

    Args:
        init: "template" for the template's own text, "words" for the label words in turn,
            "vocabulary" for a draw from the most frequent tokens, or "random".
        question: any question of the task, whose columns are emptied for "template".
        words: label -> the ids of its words.
    Raises:
        UserError: "template", and the template renders nothing without a row's values.
    """
    text, template = asker.encoder.text, asker.encoder.template
    start: list[int] = []
    if init == "template":
        emptied = question.change(**dict.fromkeys(template.content_variables, ""))
        try:
            ids = asker.prompt(emptied, ()).ids
        except RowError as error:
            raise UserError(f"--init template: {error}; pass --init words") from None
        start = [token for token in ids if token not in text.control_ids]
    elif init == "words":
        turns = zip(*words.values(), strict=False)  # first the labels' first words, and so on
        start = [token for turn in turns for ids in turn for token in ids]
    elif init == "vocabulary":  # most vocabularies begin with the most frequent tokens
        common = range(min(5000, len(text.tokenizer)))
        plain = [token for token in common if token not in text.control_ids]
        start = random.choices(plain, k=count)
    return (start * count)[:count]


# Model types before which transformers, or PEFT, cannot put embeddings, or keys and values.
_TAKE_NO_EMBEDDINGS = {"deepseek_v4", "funnel", "ibert", "longformer", "mllama", "moshi"}
_TAKE_NO_PREFIX = {"funnel", "megatron-bert", "mimo_v2_flash", "rembert", "roc_bert"}


def check_prompt(option: str, args, training, *, prefix: bool = False) -> None:
    """Refuse a prompt that the model cannot have in front, before it is loaded, and launches that
    save checkpoints as shards: PEFT cannot read a prompt from them, and it has only a few kilobytes
    anyway.

    Args:
        option: the one that asks for the prompt.
        prefix: whether it consists of keys and values, which stand for tokens before the text, and
            not of embeddings.
    Raises:
        UserError: such a model or launch.
    """
    if fsdp_option("STATE_DICT_TYPE") == "sharded_state_dict":
        raise UserError(
            f"{option}: is saved whole, and this launch saves shards; launch with "
            "accelerate_configs/fsdp2.yaml"
        )
    nature = nature_of_model(args, training)
    config = nature.config.get_text_config()
    takes = nature.forward_arguments
    kind = nature.model_type
    if prefix and not (
        "past_key_values" in takes and kind not in _TAKE_NO_PREFIX and _has_attention(config)
    ):
        reason = "has layers that keep no plain keys and values"
    elif not prefix and ("inputs_embeds" not in takes or kind in _TAKE_NO_EMBEDDINGS):
        reason = "takes no embeddings in place of tokens"
    elif not prefix and getattr(config, "hidden_size_per_layer_input", None):
        reason = "looks tokens up in every layer, and a soft prompt has none"
    else:
        return
    other = "soft_prompt" if prefix else "prefix"
    recipe = "cloze_sft.py" if nature.masked else "lora_sft.py"
    raise UserError(
        f"{option}: {nature.name} ({kind}) {reason}; try prompt_tuning.py --tune {other}, or "
        f"{recipe}"
    )


def _has_attention(config) -> bool:
    """Whether every layer keeps the keys and values of tokens, be it in a window only, and not
    compressed as in DeepSeek's.
    """
    kinds = {*map(type, DynamicCache(config=config).layers)}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not hasattr(
        config, "kv_lora_rank"
    )


def prompt_shape(
    model, virtual_tokens: int, *, revision: str | None = None, prefix: bool = False
) -> dict[str, Any]:
    """What PEFT's configurations of soft prompts have in common.

    PEFT has no task type for masked models: with that of a feature extractor it puts the prompt in
    front and leaves the rest to us. It does not know what every model calls its sizes, nor
    embeddings of another size than the states.

    Args:
        revision: of the base model; PEFT writes it into the configuration.
        prefix: whether it is one of keys and values. Where not all layers' have the same size, PEFT
            has to know them itself.
    """
    shape: dict[str, Any] = {
        "task_type": "FEATURE_EXTRACTION" if is_masked_model(model) else "CAUSAL_LM",
        "num_virtual_tokens": virtual_tokens,
        "revision": revision,
    }
    config = model.config.get_text_config()
    if not prefix:
        return shape | {
            "token_dim": model.get_input_embeddings().weight.shape[1],
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": getattr(config, "num_attention_heads", 1),  # Mamba has none
        }
    states = _cached(model, [0])
    if len({state.shape for state in states}) == 1:
        heads, size = states[0].shape[1:]
        sizes = {"num_layers": len(states) // 2, "num_attention_heads": heads}
        return shape | sizes | {"token_dim": heads * size}
    return shape


@torch.no_grad()
def start_prompt(model: PeftModel, ids: Sequence[int]) -> PeftModel:
    """Start a soft prompt at the embeddings of tokens; without tokens, at random numbers with the
    embeddings' standard deviation.
    """
    embeddings = bare_model(model).get_input_embeddings()
    prompt = model.prompt_encoder["default"].embedding.weight
    if ids:  # called, for Gemma's are scaled then
        prompt.copy_(embeddings(torch.tensor(ids, device=embeddings.weight.device)))
    else:
        prompt.mul_(embeddings.weight.float().std())
    return model


@torch.no_grad()
def start_prefix(model: PeftModel, start: torch.Tensor | None) -> PeftModel:
    """Start a prefix at `keys_and_values`; without them, at small random numbers, since those of
    PEFT's size would drown the text (Li and Liang 2021).
    """
    prefix = model.prompt_encoder["default"].embedding.weight
    prefix.mul_(0.02) if start is None else prefix.copy_(start)
    return model


def keys_and_values(model, ids: list[int]) -> torch.Tensor | None:
    """[tokens, 2 x layers x heads x size] keys and values of a text in a causal model, in the order
    of PEFT's prefixes: a prefix can start as this text (Li and Liang 2021, section 7.4). None
    without a text, for masked models, which have no KV cache, and where layers' sizes differ.
    """
    states = _cached(model, ids)
    if len({state.shape for state in states}) != 1:
        return None
    return torch.stack(states, 1).flatten(1)


@torch.no_grad()
def _cached(model, ids: list[int]) -> list[torch.Tensor]:
    """The keys and values, each [tokens, heads, size], that every layer of a causal model keeps of
    a text; none without a text, and for masked models.
    """
    if not ids or is_masked_model(model):
        return []
    cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    kept = [layer for layer in cache.layers if layer.keys is not None]
    return [states[0].transpose(0, 1) for layer in kept for states in (layer.keys, layer.values)]


def compute_prompt_once(model: PeftModel) -> bool:
    """Make a frozen causal model compute its soft prompt once per batch, not once per row.

    Values stay the same, only the speed changes. Models that keep anything but the keys and values
    of all tokens (sliding windows, recurrent layers) go PEFT's way. So does everything under FSDP:
    its layers cannot be computed twice before the backward pass, because they are sharded again
    after the first part of it.

    Returns:
        Whether the forward pass was replaced.
    """
    bare, config = model.get_base_model(), model.peft_config["default"]
    frozen = not any(parameter.requires_grad for parameter in bare.base_model.parameters())
    takes = inspect.signature(bare.forward).parameters
    if config.peft_type not in PROMPTS or config.task_type != "CAUSAL_LM" or not frozen:
        return False
    if uses_fsdp():
        return False
    if "past_key_values" not in takes or not _keeps_all(DynamicCache(config=bare.config)):
        return False
    if bare.base_model is bare:  # its body does not have the name that transformers expects
        return False
    plain = model.forward

    def forward(input_ids=None, attention_mask=None, **options):
        # Layers recomputed in the backward pass would add to the KV cache again.
        recomputed = model.training and bare.is_activation_checkpointing
        known = options.keys() <= {"use_cache", "logits_to_keep"}
        if input_ids is None or attention_mask is None or not known or recomputed:
            return plain(input_ids=input_ids, attention_mask=attention_mask, **options)
        cache = DynamicCache(config=bare.config)
        prompt = model.get_prompt(batch_size=1).to(bare.get_input_embeddings().weight.dtype)
        # `forward`, not a call: hooks on the body are meant for the rows.
        bare.base_model.forward(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys = layer.keys.expand(len(input_ids), -1, -1, -1)
            layer.values = layer.values.expand(len(input_ids), -1, -1, -1)
        seen = attention_mask.new_ones(len(input_ids), prompt.shape[1])
        return bare(
            input_ids=input_ids,
            attention_mask=torch.cat([seen, attention_mask], 1),
            past_key_values=cache,
            **options,
        )

    model.forward = forward
    return True


def _keeps_all(cache: DynamicCache) -> bool:
    """Whether every layer keeps the keys and values of all tokens, and nothing else."""
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
