"""Loads tokenizer and model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.models.bundled import BUNDLED_NAME
from recipelib.models.nature import nature_of
from recipelib.models.sources import hub_errors_in_one_line, resolve_model
from recipelib.models.towers import tower_names
from recipelib.runtime import UserError, say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_tokenizer(
    model_name_or_path: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer, with a pad token.

    A folder needs to hold only the tokenizer's files, so the folder of a trained adapter will do.

    Raises:
        UserError: as `resolve_model`; a slow tokenizer, one with neither a pad nor an eos token, or
            an error of the hub.
    """
    if model_name_or_path is not None and _has_tokenizer(Path(model_name_or_path).expanduser()):
        source = str(Path(model_name_or_path).expanduser())
    else:
        source = resolve_model(model_name_or_path)
    name = model_name_or_path or BUNDLED_NAME
    with hub_errors_in_one_line(name, source, revision):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: {type(tokenizer).__name__} is a slow tokenizer and gives no character"
            " offsets, which the recipes need; save a fast one beside the model (tokenizer.json,"
            " for instance with transformers.convert_slow_tokenizer) or pass another model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{name}: the tokenizer has neither a pad nor an eos token; set pad_token in its"
                " tokenizer_config.json"
            )
        # Safe here: labels are set by position and never masked by the pad id, so a supervised
        # end marker stays supervised.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(
    model_name_or_path: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_class: type | None = None,
    headless: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model, loaded from safetensors only. What text never reaches, such as the tower of a
    model that sees images, is frozen.

    Args:
        dtype: "auto": as it was saved.
        model_class: the class whose `from_pretrained` loads it; by default `AutoModelForCausalLM`.
        headless: whether the head's weights may be missing, of a model whose states only are read.
        kwargs: further arguments of `from_pretrained`.
    Raises:
        UserError: as `nature_of`, an error of the hub, or weights that do not load or are missing.
    """
    nature = nature_of(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    source = resolve_model(model_name_or_path)
    with hub_errors_in_one_line(nature.name, source, revision):
        if model_class is None:
            from transformers import AutoModelForCausalLM as model_class

        if nature.classifies and model_class.__name__.endswith("LM"):
            raise UserError(
                f"{nature.name}: has a classification head instead of a vocabulary; it answers "
                "with --predict, and is trained from the model that it came from"
            )
        model, found = model_class.from_pretrained(
            source,
            dtype=dtype,
            revision=revision or "main",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    if (missing := sorted(found["missing_keys"])) and model_class.__name__.endswith("LM"):
        body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        lacks = f"{nature.name}: holds no {(body or missing)[0]}" + ", ..." * (len(missing) > 1)
        if body or not headless:
            raise UserError(
                f"{lacks}, which would start at random; pass a model that was saved whole, with "
                "its language model's head"
            )
        say(f"{lacks}: as a language model it knows nothing, and its untouched score is chance")
    for name in tower_names(model):
        model.get_submodule(name).requires_grad_(False)
    return model


def load_model(
    args,
    training,
    *,
    float32: bool = False,
    masked: bool = False,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model that a recipe's arguments name, in the dtype that its trainer computes in. Then the
    seed is set, so that what is drawn next, such as an adapter's initial weights, depends on
    nothing before.

    Args:
        args: a recipe's `model_name_or_path`, `revision` and `attn_implementation`.
        training: the trainer's arguments.
        float32: load in float32, for weights that are trained themselves; autocast or FSDP then
            compute in lower precision.
        masked: load a masked language model instead of a causal one.
        classes: load it with a classification head for these instead, whose weights are drawn by
            the seed.
        options: further arguments of `load_pretrained`, such as those from `four_bit_loading`.
    Raises:
        UserError: as `load_pretrained`.
    """
    import torch
    from transformers import AutoModelForMaskedLM, set_seed

    kind = AutoModelForMaskedLM if masked else None
    if classes is not None:
        set_seed(training.seed)
        kind, head = classification_head(classes, args.model_name_or_path, args.revision)
        options |= head
    model = load_pretrained(
        args.model_name_or_path,
        dtype=torch.float32 if float32 else training.model_dtype[0],
        revision=args.revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=training.trust_remote_code,
        model_class=kind,
        **options,
    )
    set_seed(training.seed)
    return model


def classification_head(
    classes: Sequence[str], model_name_or_path: str | None, revision: str | None = None
) -> tuple[type, dict[str, Any]]:
    """The class that loads a model with a classification head, and its further options.

    Args:
        classes: in the order of their numbers.
        model_name_or_path: whose pad token tells causal models where a text ends.
    """
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(classes))
    return AutoModelForSequenceClassification, {
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "pad_token_id": load_tokenizer(model_name_or_path, revision=revision).pad_token_id,
    }


def layer_names(model: PreTrainedModel, names: list[str]) -> list[str] | str:
    """The value of PEFT's `target_modules` for names from the command line.

    Raises:
        UserError: as `require_modules`.
    """
    if names == ["all-linear"]:
        return "all-linear"
    require_modules(model, names)
    return names


def require_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Check that each name is the name of a layer with a weight matrix, or the end of one.

    Raises:
        UserError: a name that fits no such layer; the line lists the layers' names.
    """
    layers = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) > 1
    ]
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in layers):
            known = {name.split(".")[-1] for name in layers}
            raise UserError(
                f"--target_modules {wanted}: the model has no such layer; it has "
                f"{', '.join(sorted(known))}"
            )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
