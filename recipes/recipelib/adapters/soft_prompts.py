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
from transformers.cache_utils import DynamicLayer

from recipelib.encoding import CausalAsker, MaskedAsker
from recipelib.models import bare_model, is_masked_model
from recipelib.prompts import Question, RowError
from recipelib.runtime import UserError, fsdp_option, uses_fsdp

_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


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
        emptied = question.change(**dict.fromkeys(template.prompt_variables, ""))
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


def refuse_shards(option: str) -> None:
    """Refuse a launch that saves checkpoints as shards: PEFT cannot read a soft prompt from them,
    and it has only a few kilobytes anyway.

    Args:
        option: the one that asks for the prompt.
    Raises:
        UserError: it is such a launch.
    """
    if fsdp_option("STATE_DICT_TYPE") == "sharded_state_dict":
        raise UserError(
            f"{option}: is saved whole, and this launch saves shards; launch with "
            "accelerate_configs/fsdp2.yaml"
        )


def prompt_shape(
    model, virtual_tokens: int, *, revision: str | None = None, sizes: bool = True
) -> dict[str, Any]:
    """What PEFT's configurations of soft prompts have in common.

    PEFT has no task type for masked models: with that of a feature extractor it puts the prompt in
    front and leaves the rest to us.

    Args:
        revision: of the base model; PEFT writes it into the configuration.
        sizes: include the model's sizes. PEFT does not know what every model calls them, nor
            embeddings of another size than the states. Those of a prefix it finds itself.
    """
    shape: dict[str, Any] = {
        "task_type": "FEATURE_EXTRACTION" if is_masked_model(model) else "CAUSAL_LM",
        "num_virtual_tokens": virtual_tokens,
        "revision": revision,
    }
    if sizes:
        shape |= {
            "token_dim": model.get_input_embeddings().weight.shape[1],
            "num_layers": model.config.num_hidden_layers,
            "num_attention_heads": model.config.num_attention_heads,
        }
    return shape


@torch.no_grad()
def start_prompt(model: PeftModel, ids: Sequence[int]) -> PeftModel:
    """Start a soft prompt at the embeddings of tokens; without tokens, at random numbers with the
    embeddings' standard deviation.
    """
    embeddings = bare_model(model).get_input_embeddings().weight
    prompt = model.prompt_encoder["default"].embedding.weight
    if ids:
        prompt.copy_(embeddings[ids])
    else:
        prompt.mul_(embeddings.float().std())
    return model


@torch.no_grad()
def start_prefix(model: PeftModel, start: torch.Tensor | None) -> PeftModel:
    """Start a prefix at `keys_and_values`; without them, at small random numbers, since those of
    PEFT's size would drown the text (Li and Liang 2021).
    """
    prefix = model.prompt_encoder["default"].embedding.weight
    prefix.mul_(0.02) if start is None else prefix.copy_(start)
    return model


def require_cache(model) -> None:
    """Refuse models that take no KV cache: a prefix is given as the keys and values of tokens
    before the text.

    Raises:
        UserError: the model takes none.
    """
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(
            f"--tune prefix: {type(model).__name__} takes no keys and values; --tune soft_prompt "
            "does without"
        )


def keys_and_values(model, ids: list[int]) -> torch.Tensor | None:
    """[tokens, 2 x layers x heads x size] keys and values of a text in a causal model, in the order
    of PEFT's prefixes: a prefix can start as this text (Li and Liang 2021, section 7.4). None
    without a text, and for masked models, which have no KV cache.
    """
    if not ids or is_masked_model(model):
        return None
    with torch.no_grad():
        cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    states = [
        tensor[0].transpose(0, 1) for layer in cache.layers for tensor in (layer.keys, layer.values)
    ]
    return torch.stack(states, 1).flatten(1)


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
    if config.peft_type not in _PROMPTS or config.task_type != "CAUSAL_LM" or not frozen:
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
