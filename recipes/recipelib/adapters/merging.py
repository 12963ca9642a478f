"""A LoRA adapter added into the weights of its base model."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import GenerationConfig

from recipelib.adapters.bottleneck import NO_MERGING
from recipelib.adapters.saved import load_tuned, resolve_adapter
from recipelib.models import bare_model, load_tokenizer
from recipelib.runtime import UserError, clear_model, kept_templates, read_metrics, write_json


def merge_adapter(adapter: str, output: str, base: str | None = None, dtype: str = "auto") -> Path:
    """Write the base model with a LoRA adapter added in, its tokenizer, where it ends answers, and
    how it is asked.

    Args:
        adapter: the folder of a run, or a hub id.
        output: the folder to write to.
        base: the base model, if it has moved since the adapter was trained.
        dtype: of the merged weights; "auto" for the base model's.
    Returns:
        The folder written to.
    Raises:
        UserError: no adapter there, one that cannot be merged, or no folder to write to.
    """
    folder = resolve_adapter(adapter)
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type == "BOTTLENECK":
        raise UserError(f"{adapter}: {NO_MERGING}")
    if config.is_prompt_learning:
        raise UserError(f"{adapter}: a soft prompt is no weight of the model; keep it loaded")
    name = base or config.base_model_name_or_path
    if Path(output).is_file():
        raise UserError(f"--output {output}: is a file; name a folder")
    if Path(output).resolve() in (folder.resolve(), Path(name).resolve()):
        raise UserError(f"--output {output}: holds what is merged; name another folder")
    run = Path(output, "metrics.json").exists() and "merged_from" not in read_metrics(output)
    if run or Path(output, "adapter_config.json").exists():
        raise UserError(f"--output {output}: holds a run or an adapter; name another folder")
    run = read_metrics(folder)
    adapted = load_tuned(folder, run, base, dtype=dtype)
    ties = _untie(bare_model(adapted))
    try:
        with warnings.catch_warnings():  # of layers that share weights: here they do not
            warnings.simplefilter("ignore", UserWarning)
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{adapter}: cannot be merged: {' '.join(str(error).split())}") from None
    if ties:
        _tie_or_part(merged, ties, adapter)
    if (folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder) if own else name)
    clear_model(output)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    _hand_on(folder, run, Path(output))
    return Path(output)


def _hand_on(folder: Path, run: dict, output: Path) -> None:
    """Keep with the merged model what a run says of how it is asked: its templates and figures."""
    for left in ("template.yaml", "metrics.json"):
        (output / left).unlink(missing_ok=True)
    shutil.rmtree(output / "templates", ignore_errors=True)
    if not run.get("trainable_parameters"):
        return
    for path in kept_templates(folder).values():
        place = output / path.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    write_json(output / "metrics.json", {**run, "quantization": None, "merged_from": str(folder)})


def _untie(model) -> list[tuple[Any, bool]]:
    """Give the head a weight of its own where it shares the embeddings': what is added to one of
    them would be added to both.

    Args:
        model: in which an adapter may stand around both.
    Returns:
        Where they were shared the configs that say so, and what each says.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = {id(weight) for weight in embeddings.parameters()}
    if head is None or shared.isdisjoint(id(weight) for weight in head.parameters()):
        return []
    own: dict[int, torch.nn.Parameter] = {}
    for module in head.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if id(weight) in shared:
                own.setdefault(id(weight), torch.nn.Parameter(weight.detach().clone()))
                setattr(module, name, own[id(weight)])
    configs = (model.config, model.config.get_text_config())
    return [(config, config.tie_word_embeddings) for config in configs]


def _tie_or_part(model, ties: list[tuple[Any, bool]], adapter: str) -> None:
    """Let head and embeddings share one weight again where they are still equal; otherwise say in
    the configs that they are two.

    Args:
        ties: what `_untie` has returned.
    Raises:
        UserError: what they share is more than the weight.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
        for config, tied in ties:
            config.tie_word_embeddings = tied
        return
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    model.all_tied_weights_keys.pop(name, None)
    if model.all_tied_weights_keys:
        raise UserError(
            f"{adapter}: cannot be merged: it adapts {name}, which the model shares with its "
            "embeddings; keep the adapter loaded"
        )
    for config, _ in ties:
        config.tie_word_embeddings = False
