"""What a model is and what it can take, read from its config before any weight is loaded."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from recipelib.models.bundled import BUNDLED_NAME
from recipelib.models.sources import hub_errors_in_one_line, resolve_model
from recipelib.runtime import UserError, say

# The model types whose first position is the one behind that of padding (fairseq's way): of a table
# of 514 positions 512 are for tokens.
_BEHIND_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}

# Causal in name only: they see what follows a token while they predict it.
_SEE_AHEAD = {"bert-generation", "cpmant", "xlm", "xlnet"}
# What no recipe can use, and why.
_UNUSABLE = {
    "blt": "reads bytes in patches of its own making",
    "perceiver": "reads a fixed number of bytes",
    "reformer": "trains on texts of one fixed length",
    "xmod": "has to be told the language of each text",
}


@dataclass(frozen=True)
class Nature:
    """What a model is and what it can take.

    Attributes:
        name: of the model, as the user gave it.
        model_type: transformers' name of the architecture.
        masked: whether it is a masked language model, else a causal one.
        classifies: whether it has a classification head instead of a vocabulary.
        positions: how many tokens it was made for; `sys.maxsize` where there is no such number.
        vocabulary: how many tokens its embedding table holds.
        config: transformers' own.
    """

    name: str
    model_type: str
    masked: bool
    classifies: bool
    positions: int
    vocabulary: int
    config: Any

    @property
    def forward_arguments(self) -> set[str]:
        """What the model below the head can be given, as far as transformers knows the model."""
        from transformers.models.auto import modeling_auto as auto

        for known in (auto.MODEL_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING):
            if type(self.config) in known:
                kinds = known[type(self.config)]
                kind = kinds[-1] if isinstance(kinds, tuple) else kinds  # Funnel has two
                return {*inspect.signature(kind.forward).parameters}
        return {"inputs_embeds", "past_key_values"}

    def fitting(self, max_length: int, tokenizer, virtual_tokens: int = 0) -> int:
        """How many tokens a text may have: `max_length`, or fewer, and that is said, where the
        model or its tokenizer was made for fewer.

        Args:
            virtual_tokens: of a soft prompt, which takes positions too.
        Raises:
            UserError: nothing is left beside the soft prompt.
        """
        most = min(self.positions, tokenizer.model_max_length)
        if max_length > most:
            say(f"--max_length {max_length}: {self.name} was made for {most}; so much is read")
        fits = min(max_length, most)
        if virtual_tokens >= fits:
            raise UserError(f"--virtual_tokens {virtual_tokens}: {fits} tokens fit; ask for fewer")
        return fits - virtual_tokens

    def check_tokens(self, tokenizer, chat: bool) -> None:
        """Check that the embedding table has a row for every token that can come up. A pad token
        that has none is exchanged for the eos token: nobody reads it.

        Args:
            chat: whether texts go through the chat template.
        Raises:
            UserError: a token without an embedding; on a GPU it would end in an assertion.
        """
        added = tokenizer.added_tokens_decoder
        beyond = {index: str(token) for index, token in added.items() if index >= self.vocabulary}
        if tokenizer.pad_token_id in beyond:
            say(f"{self.name}: has no embedding for {tokenizer.pad_token}; its eos token pads")
            tokenizer.pad_token = tokenizer.eos_token
        written = {*tokenizer("a")["input_ids"], tokenizer.eos_token_id, tokenizer.mask_token_id}
        template = str(tokenizer.chat_template) if chat else ""
        used = [i for i, token in beyond.items() if i in written or token in template]
        if tokenizer.vocab_size > self.vocabulary:
            used = [self.vocabulary]
        if used:
            token = tokenizer.convert_ids_to_tokens(min(used))
            raise UserError(
                f"{self.name}: the tokenizer's {token} is number {min(used)}, and the model's "
                f"embedding table ends at {self.vocabulary - 1}; pass the tokenizer that belongs "
                "to the model, or grow the table once (resize_token_embeddings), save both and "
                "train all parameters"
            )


def nature_of(
    model_name_or_path: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Nature:
    """What a model is and what it can take, from its config.

    Raises:
        UserError: as `resolve_model`, or an error of the hub.
    """
    source = resolve_model(model_name_or_path, weights=False)
    name = model_name_or_path or BUNDLED_NAME
    with hub_errors_in_one_line(name, source, revision):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    # Of some, such as BART, transformers would load only the decoder.
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{name}: is an encoder-decoder model, which is not trained here; take a decoder"
        )
    masked, reason = is_masked(config), _UNUSABLE.get(config.model_type)
    decoder = getattr(config, "is_decoder", False)
    if config.model_type in _SEE_AHEAD and not (masked or decoder):
        reason = "sees what follows a token while it predicts it"
    if reason:
        raise UserError(f"{name} ({config.model_type}): {reason}; take another model")
    text = config.get_text_config()
    return Nature(
        name=name,
        model_type=config.model_type,
        masked=masked,
        classifies="ForSequenceClassification" in f"{config.architectures}",
        positions=_positions(text),
        vocabulary=getattr(text, "vocab_size", None) or sys.maxsize,
        config=config,
    )


def nature_of_model(args, training) -> Nature:
    """What the model of a recipe's arguments is, see `nature_of`."""
    return nature_of(
        args.model_name_or_path,
        revision=args.revision,
        trust_remote_code=training.trust_remote_code,
    )


def _positions(config: Any) -> int:
    # MPT's biases are computed for max_seq_len tokens, and for no more.
    most = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None)) or 0
    if config.model_type in _BEHIND_PADDING:
        most -= config.pad_token_id + 1
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope.get("factor"), int | float):  # made longer, as by YaRN
        stretched = rope["factor"] * rope.get("original_max_position_embeddings", most)
        most = max(most, int(stretched))
    return most if most > 0 else sys.maxsize


def is_masked(config: Any) -> bool:
    """Whether a model of this config sees what follows a token, too."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if "ForMaskedLM" in f"{config.architectures}":
        return True
    own = getattr(config, "auto_map", None) or {}  # of a model that brings its code
    kind = config.model_type
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in own
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own
    # BERT and its like are both, and causal only where their config makes them decoders.
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return masked and not (causal and decoder)
