"""A trained adapter that is trained further: the same method and its own settings, on the same task
or another. What does not fit is found on a model of shapes, before any weight is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from recipelib.adapters.saved import (
    BASE,
    SOFT_VERBALIZER,
    load_soft_verbalizer,
    resolve_adapter,
    with_adapter,
)
from recipelib.models import Nature, hub_errors_in_one_line, nature_of_model, resolve_model
from recipelib.prompts import PromptTemplate
from recipelib.runtime import UserError, is_whole, kept_templates, read_metrics, say

_RECIPES = {
    "LORA": "lora_sft.py",
    "BOTTLENECK": "adapter_sft.py",
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), "prompt_tuning.py"),
}
_TUNES = {"PROMPT_TUNING": "soft_prompt", "P_TUNING": "soft_prompt", "PREFIX_TUNING": "prefix"}
# What says where a new adapter starts.
_STARTS = ("pissa", "init_weights", "adapterhub", "init", "prompt_encoder")
# What may change on the way: it does not decide the adapter's function.
_DROPOUT = {"lora_dropout": "lora_dropout", "adapter_dropout": "dropout"}
# LoRA's ways to start that PEFT finds again: they leave W as it is, or take the same from it.
_KNOWN_STARTS = ("gaussian", "orthogonal", "eva", "pissa", "olora")


# The folders of a run that another one with the same --output_dir replaces.
_REPLACED = "(checkpoint-|draw_)[0-9]+$|dropped$"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter that training begins with.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        config: PEFT's, as it is trained from here on.
    """

    name: str
    folder: Path
    config: PeftConfig

    @property
    def has_labels(self) -> bool:
        """Whether label embeddings were trained with it."""
        return (self.folder / SOFT_VERBALIZER).is_file()

    @property
    def trains_layers(self) -> bool:
        """Whether layers of the model itself are trained with it, for which 16 bits are too few."""
        return bool(getattr(self.config, "modules_to_save", None))

    @property
    def facts(self) -> dict[str, str]:
        """What a run's metrics.json keeps of it."""
        return {"adapter": self.name}

    def on(self, model):
        """The model with the adapter on it, to be trained, and with its label embeddings.

        Raises:
            UserError: as `with_adapter`.
        """
        config = copy.deepcopy(self.config)  # which PEFT writes to
        model = with_adapter(model, self.folder, trained_as=config)
        if self.has_labels:
            load_soft_verbalizer(self.folder, model)
        return model

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse a task with other labels than those that the label embeddings are of.

        Raises:
            UserError: there are label embeddings, and they are of others.
        """
        if not self.has_labels:
            return
        kept = kept_templates(self.folder).get("template")
        own = [*(PromptTemplate.load(str(kept)).verbalizer or ())] if kept else []
        count = len(load_file(self.folder / SOFT_VERBALIZER)["weight"])
        if [*labels] != own if own else len(labels) != count:
            raise UserError(
                f"--adapter {self.name}: was trained with --soft_verbalizer, whose embeddings are "
                f"of {', '.join(own) or f'{count} labels'}, and this task has {', '.join(labels)}; "
                "train a new prompt"
            )


def open_adapter(args, training, *methods: str) -> TrainedAdapter | None:
    """The adapter that `args.adapter` names, checked; None where nothing is named. Its settings go
    into `args`, and so does the model that it was trained on, unless another is named.

    Args:
        args: a recipe's arguments.
        training: the trainer's.
        methods: PEFT's names of what the recipe trains.
    Raises:
        UserError: no adapter there, another method's, one that does not fit the model or that PEFT
            cannot train, a folder that this run would overwrite, or options that say otherwise
            than the adapter.
    """
    if not args.adapter:
        return None
    folder, name = _folder_of(args, training), args.adapter
    where = f"--adapter {name}"
    config = _config_of(folder, where, methods)
    _choose_base(args, config, folder)
    adapter = TrainedAdapter(name, folder, config)
    nature = nature_of_model(args, training)
    if config.peft_type == "P_TUNING" and args.tune == "p_tuning":
        args.tune = "soft_prompt"
    for option, own in _settings(adapter, nature.config.get_text_config()).items():
        _take(args, option, own, where)
    for option in _STARTS:
        if option in args.named and getattr(args, option):
            raise UserError(f"--{option}: training starts from --adapter; leave one of them out")
    for option, field in _DROPOUT.items():
        if option in args.named:
            setattr(config, field, getattr(args, option))
    _say_what_differs(args, folder, config)
    adapter = replace(adapter, config=_trainable(config, args.revision))
    _check_fit(adapter, nature, args.model_name_or_path, training.trust_remote_code)
    args.adapter = str(folder)  # whose tokenizer is taken
    return adapter


def _check_fit(adapter: TrainedAdapter, nature: Nature, model: str, trusted: bool) -> None:
    """Put the adapter on a model of shapes, which takes a moment whatever the model's size."""
    config, kind = copy.deepcopy(adapter.config), AutoModelForCausalLM
    if config.peft_type == "LORA":
        config.init_lora_weights = True  # other ways compute with the weights
    if nature.masked:
        kind = AutoModelForMaskedLM
    with torch.device("meta"):
        with hub_errors_in_one_line(nature.name, model, None):
            shapes = kind.from_config(copy.deepcopy(nature.config), trust_remote_code=trusted)
        with_adapter(shapes, adapter.folder, trained_as=config)


def _folder_of(args, training) -> Path:
    """The folder of the adapter, whole and out of this run's way."""
    given = Path(args.adapter).expanduser()
    whole, out = given.resolve(), Path(training.output_dir).resolve()
    if whole == out or (whole.parent == out and re.match(_REPLACED, whole.name)):
        raise UserError(
            f"--adapter {args.adapter}: lies in this run's --output_dir {training.output_dir}, "
            "which the run overwrites; name another --output_dir"
        )
    of_run = [*given.glob("checkpoint-*"), *kept_templates(given).values()]
    if of_run and not (given / "metrics.json").exists():
        raise UserError(
            f"--adapter {args.adapter}: is the folder of an unfinished run; finish it with "
            "--resume_from_checkpoint last, or pass one of its checkpoints"
        )
    if re.fullmatch("checkpoint-[0-9]+", given.name) and given.is_dir() and not is_whole(given):
        raise UserError(f"--adapter {args.adapter}: was not written to its end; pass another")
    return resolve_adapter(args.adapter)


def _config_of(folder: Path, where: str, methods: Sequence[str]) -> PeftConfig:
    """PEFT's configuration of an adapter of one of these methods."""
    try:
        config = PeftConfig.from_pretrained(folder)
        method = str(getattr(config.peft_type, "value", config.peft_type))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: adapter_config.json is not PEFT's ({error})") from None
    if method not in methods:
        recipe = _RECIPES.get(method)
        cure = f"{recipe} trains it further" if recipe else "no recipe trains it further"
        raise UserError(f"{where}: its method is {method}; {cure}")
    if config.task_type == "SEQ_CLS":
        raise UserError(f"{where}: was trained with a classification head; train a new one")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _KNOWN_STARTS:
        raise UserError(
            f"{where}: fits a base model that init_lora_weights={start} has changed; save it as "
            "plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    return config


def _choose_base(args, config: PeftConfig, folder: Path) -> None:
    """Fill in the base model, or say that the one that is named is another."""
    own = config.base_model_name_or_path
    if (folder / BASE).is_dir():  # tuned together with a soft prompt
        own = str(folder / BASE)
    named = args.model_name_or_path
    if not named:
        if not own:
            raise UserError(
                f"--adapter {args.adapter}: does not say what model it is for; pass "
                "--model_name_or_path"
            )
        if Path(own).is_absolute() and not Path(own).exists():
            raise UserError(
                f"--adapter {args.adapter}: was trained on {own}, which is not there; pass "
                "--model_name_or_path"
            )
        args.model_name_or_path = own
    elif own and Path(own).expanduser().resolve() != Path(resolve_model(named)).resolve():
        say(f"warning: {args.adapter} was trained on {own}, and continues on {named}")
        return
    args.revision = args.revision or config.revision


def _settings(adapter: TrainedAdapter, model_config) -> dict[str, Any]:
    """The options that say what an adapter is, as this one has them."""
    config = adapter.config
    if config.peft_type == "LORA":
        return {
            "r": config.r,
            "alpha": config.lora_alpha,
            "target_modules": config.target_modules,
            "rslora": config.use_rslora,
            "dora": config.use_dora,
            "lora_dropout": config.lora_dropout,
        }
    if config.peft_type == "BOTTLENECK":
        chosen, layers = config.layers_to_transform, model_config.num_hidden_layers
        top = isinstance(chosen, list) and sorted(chosen) == [*range(min(chosen), layers)]
        return {
            "bottleneck_size": config.bottleneck_size,
            "placement": config.placement,
            "adapter_input": config.adapter_input,
            "act": config.act,
            "scaling": config.scaling,
            "adapter_dropout": config.dropout,
            "train_norms": adapter.trains_layers,
            "target_modules": config.target_modules,
            "top_layers": len(chosen) if top else None,
        }
    return {
        "tune": _TUNES[config.peft_type.value],
        "virtual_tokens": config.num_virtual_tokens,
        "soft_verbalizer": adapter.has_labels,
    }


def _take(args, option: str, own: Any, where: str) -> None:
    """Set an option to the adapter's own value; one that was given must not contradict it."""
    asked = getattr(args, option)
    own = sorted(own) if isinstance(own, set) else own
    same = sorted(asked) == own if isinstance(asked, list) else asked == own
    if option in args.named and not same and option not in _DROPOUT:
        shown = " ".join(asked) if isinstance(asked, list) else str(asked).lower()
        has = "others" if isinstance(own, list) else str(own).lower()
        raise UserError(f"--{option} {shown}: {where} has {has}, which stays; leave it out")
    if option not in args.named and option != "target_modules":
        setattr(args, option, own)


def _say_what_differs(args, folder: Path, config: PeftConfig) -> None:
    """Say what the run's arguments would do otherwise than the one that trained the adapter."""
    run: Mapping[str, Any] = read_metrics(folder)
    if run.get("rendering", args.rendering) != args.rendering:
        say(f"{args.adapter}: was trained with --rendering {run['rendering']}")
    if run.get("quantization") and not getattr(args, "load_in_4bit", False):
        say("warning: the adapter was trained on 4 bits; --load_in_4bit true goes on so")
    if config.peft_type == "P_TUNING":
        say("the network of P-tuning is not kept: what it put out is trained, as a soft prompt")


def _trainable(config: PeftConfig, revision: str | None) -> PeftConfig:
    """The configuration with which an adapter is trained further. Of a prompt the embeddings are
    saved, not what made them: a network, or words.
    """
    own = {"inference_mode": False, "revision": revision}
    if config.peft_type == "PREFIX_TUNING":
        return replace(config, **own, prefix_projection=False)
    if config.is_prompt_learning:
        shape = {name: getattr(config, name) for name in _SHAPE}
        return PromptTuningConfig(prompt_tuning_init="RANDOM", **shape, **own)
    return replace(config, **own, task_type="CAUSAL_LM")


_SHAPE = (
    *("task_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"),
    *("num_transformer_submodules", "base_model_name_or_path"),
)
