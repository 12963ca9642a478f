"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751) as a PEFT tuner.

    from peft_bottleneck import BottleneckConfig   # importing it adds the method to PEFT
    model = get_peft_model(model, BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=64))

After a sublayer of the transformer, before its output h is added to the residual x, an adapter
adds `scaling * up(act(down(h)))`: down takes the model's width d to a bottleneck of m, up takes it
back. (In Gemma 2 and 3 the norm of h comes between adapter and addition.) The model is frozen.
PEFT's `save_pretrained`, `from_pretrained`, `add_adapter`, `set_adapter`, `delete_adapter`,
`disable_adapter`, `unload`, `add_weighted_adapter` and `adapter_names`, which gives the rows of a
batch different adapters, work as with LoRA; merging does not, for an adapter is not linear. Several
active adapters are applied one after the other, as AdapterHub's Stack. Where a model applies
dropout to h (BERT), it comes after the adapter, on what the adapter adds too; AdapterHub's read h
after the dropout.

This file needs torch, transformers and peft, and nothing else of the collection, so it can be
copied; give the copy another name, for pandas would import a bottleneck.py in place of the package
bottleneck. What it saves can be loaded wherever it was imported before.
"""

from __future__ import annotations

import re
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, register_peft_method
from peft.utils.other import set_additional_trainable_modules
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

INIT_STD = 1e-2  # of the paper (section 3.6); its code has 1e-3
NO_MERGING = (
    "bottleneck adapters cannot be merged: up(act(down(h))) is not linear in h, so no weight could "
    "do the same; keep the adapter loaded, or train LoRA"
)
# What stands as `peft_type` in saved files: where this file was not imported, PEFT's loaders end in
# a KeyError of just this text.
SAVED_TYPE = "BOTTLENECK: import peft_bottleneck (the file peft_bottleneck.py) before loading it"


class Sublayer(NamedTuple):
    """Where a sublayer ends and what its output is added to, as paths inside of its block."""

    output: str  # its last linear layer
    residual: str  # the module that is given x
    argument: int = 0  # as which of its arguments
    norm: str | None = None  # the norm after the addition, in post-norm models


def _pre_norm(attention: dict[str, str], ffn: dict[str, str]) -> dict[str, list[Sublayer]]:
    """Sublayers whose norm is given x: the path of a last linear layer -> that of the norm."""
    sublayers = {"attention": attention, "ffn": ffn}
    return {
        place: [Sublayer(output, norm) for output, norm in norms.items()]
        for place, norms in sublayers.items()
    }


_LLAMA = _pre_norm(
    {"self_attn.o_proj": "input_layernorm"}, {"mlp.down_proj": "post_attention_layernorm"}
)
_GEMMA2 = _LLAMA | {"ffn": [Sublayer("mlp.down_proj", "pre_feedforward_layernorm")]}
_T5 = _pre_norm(
    {"SelfAttention.o": "layer_norm", "EncDecAttention.o": "layer_norm"},
    {"DenseReluDense.wo": "layer_norm"},
)
_OPT = {"self_attn.out_proj": "self_attn_layer_norm"}, {"fc2": "final_layer_norm"}
_BART = {
    "attention": [
        Sublayer(f"{path}.out_proj", path, 0, f"{path}_layer_norm")
        for path in ("self_attn", "encoder_attn")
    ],
    "ffn": [Sublayer("fc2", "fc1", 0, "final_layer_norm")],
}
_BERT = {
    place: [
        Sublayer(f"{path}output.dense", f"{path}output", 1, f"{path}output.LayerNorm")
        for path in paths
    ]
    for place, paths in {"attention": ("attention.", "crossattention."), "ffn": ("",)}.items()
}
# By the `model_type` of transformers' config.
SUBLAYERS: dict[str, dict[str, list[Sublayer]]] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT
    ),
    "distilbert": {
        "attention": [Sublayer("attention.out_lin", "attention", 0, "sa_layer_norm")],
        "ffn": [Sublayer("ffn.lin2", "ffn", 0, "output_layer_norm")],
    },
    **dict.fromkeys(("t5", "mt5"), _T5),
    "gpt2": _pre_norm(
        {"attn.c_proj": "ln_1", "crossattention.c_proj": "ln_cross_attn"}, {"mlp.c_proj": "ln_2"}
    ),
    "gpt_neox": _pre_norm(
        {"attention.dense": "input_layernorm"}, {"mlp.dense_4h_to_h": "post_attention_layernorm"}
    ),
    "gptj": _pre_norm({"attn.out_proj": "ln_1"}, {"mlp.fc_out": "ln_1"}),
    "opt": _pre_norm(*_OPT),
    "bart": _BART,
    "whisper": _pre_norm(_OPT[0] | {"encoder_attn.out_proj": "encoder_attn_layer_norm"}, _OPT[1]),
    "modernbert": _pre_norm({"attn.Wo": "attn_norm"}, {"mlp.Wo": "mlp_norm"}),
    "vit": _pre_norm({"attention.o_proj": "layernorm_before"}, {"mlp.fc2": "layernorm_after"}),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _GEMMA2),
}
# What transformers calls the list of a model's layers; T5's `block`s hold lists of sublayers.
_LAYER_LISTS = ["block", "h", "layers", "layer"]


def _peft_type() -> PeftType:
    """Our method in PEFT's list of methods, which is closed: importing this file adds it."""
    if "BOTTLENECK" not in PeftType.__members__:
        member = str.__new__(PeftType, "BOTTLENECK")
        member._name_ = member._value_ = "BOTTLENECK"
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType.__members__)
        PeftType._member_names_.append("BOTTLENECK")
        for names in (PeftType._member_map_, PeftType._value2member_map_):
            names["BOTTLENECK"] = member
        type.__setattr__(PeftType, "BOTTLENECK", member)
    return PeftType["BOTTLENECK"]


BOTTLENECK = _peft_type()


@dataclass
class BottleneckConfig(PeftConfig):
    """What the adapters are and where they sit; the defaults are the paper's values.

    Pfeiffer et al. 2021 (arXiv:2005.00247): placement="ffn", adapter_input="residual", act="relu".
    He et al. 2022 (arXiv:2110.04366), parallel: placement="ffn", adapter_input="input", act="relu",
    scaling=4.0, init_weights="identity".

    Args:
        bottleneck_size: m, the width of the bottleneck; 64 unless `reduction_factor` is given.
        reduction_factor: sets m to the model's width divided by it, at least 1.
        placement: after the "attention" sublayer (cross-attention too), after the feed-forward
            sublayer ("ffn"), or after "both".
        adapter_input: what an adapter reads. "output": h, what the sublayer puts out; "residual":
            h + x, in post-norm models through the norm that follows; "input": x, beside the
            sublayer (parallel).
        act: the activation, a name of transformers' ACT2FN.
        scaling: factor of what is added, or "learned": one number for each adapter, starting at 1.
        dropout: on what is added.
        init_weights: "near_identity": normal weights with a standard deviation of 0.01, cut off at
            two deviations, and zero biases; "identity": the weights of `up` are zero as well, so
            that the model starts unchanged.
        train_norms: train the model's layer norms too, as the paper does; the default in all but
            causal language models. With `layers_to_transform` only those in these layers. They keep
            the model's dtype, and 16 bits are too few for their small steps.
        target_modules: linear layers to put adapters after, instead of `placement`: for models
            that SUBLAYERS does not list, or to adapt only some sublayers.
        sublayers: the sublayers of a model that SUBLAYERS does not list, each as the fields of a
            `Sublayer`: [{"output": "attn.proj", "residual": "norm1"}, ...]. With them adapters can
            read x; with "output" alone `target_modules` is enough.
        exclude_modules: those of the targets to leave out.
        layers_to_transform: numbers of the layers that get adapters, from 0; all by default.
        layers_pattern: the name of the model's list of layers, where it is unusual.
        modules_to_save: further modules to train and save whole, such as a new head.
        trainable_token_indices: ids of tokens whose embeddings are trained and saved as well.
    """

    bottleneck_size: int | None = None
    reduction_factor: float | None = None
    placement: str = "both"
    adapter_input: str = "output"
    act: str = "gelu"
    scaling: float | str = 1.0
    dropout: float = 0.0
    init_weights: str = "near_identity"
    train_norms: bool | None = None
    target_modules: list[str] | str | None = None
    sublayers: list[dict] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = BOTTLENECK
        choices = {
            "placement": ("both", "ffn", "attention"),
            "adapter_input": ("output", "residual", "input"),
            "init_weights": ("near_identity", "identity"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: is one of {', '.join(allowed)}")
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck_size and reduction_factor: say one of them")
        if self.bottleneck_size is None and self.reduction_factor is None:
            self.bottleneck_size = 64
        if not isinstance(self.bottleneck_size or 1, int):
            raise ValueError(f"bottleneck_size={self.bottleneck_size}: is a whole number")
        if (self.bottleneck_size or self.reduction_factor or 0) <= 0:
            raise ValueError("bottleneck_size, reduction_factor: above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: is 0 or more and below 1")
        if self.act not in ACT2FN or any(True for _ in ACT2FN[self.act].parameters()):
            raise ValueError(f"act={self.act!r}: no activation of ACT2FN, or one that is trained")
        if self.scaling != "learned" and not isinstance(self.scaling, int | float):
            raise ValueError(f"scaling={self.scaling!r}: is a number or 'learned'")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform: needs target_modules as a list, not as a regex")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform, the numbers of the layers")
        if self.sublayers and self.placement != "both":
            raise ValueError("placement: sublayers names the places; leave one of them out")
        try:
            _ = [Sublayer(**sublayer) for sublayer in self.sublayers or ()]
        except TypeError as error:
            known = "each has output and residual, and may have argument and norm"
            raise ValueError(f"sublayers: {error}; {known}") from None
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def to_dict(self) -> dict:
        """What is saved."""
        return super().to_dict() | {"peft_type": SAVED_TYPE}


class LearnedScale(nn.Module):
    """A factor that is trained. It is a module with a `weight` because PEFT's policy for FSDP1
    makes such a module a unit of its own, apart from the model's 16-bit weights.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, added: torch.Tensor) -> torch.Tensor:
        """What an adapter adds, times the factor."""
        return added * self.weight


class _Call(threading.local):
    """What a layer has to know of the call that is going on in a thread: x, and the adapters of the
    batch's rows. Nothing of it belongs to the layer, which threads share.

    x is held weakly. The block that is being called holds it until it has added it, so longer than
    it is needed here, and lets go of it however the call ends: after Ctrl-C no hook would. Where
    activations are recomputed, the block is called again, be it by another thread.
    """

    __slots__ = ()  # with a __dict__ of its own torch.compile would write into that one instead

    def __init__(self):
        self.x: weakref.ref | None = None
        self.rows: list[str] | None = None
        self.beams = 1

    def __reduce__(self):  # for copies of a model
        return (_Call, ())


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A sublayer's last linear layer with the adapters after it. The active ones are applied one
    after the other, in their order; none while `passed_over` is set. Unlike PEFT's
    `disable_adapter` that leaves `requires_grad` alone, which FSDP2 reads only once.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_scaling")
    other_param_names = ("bottleneck_activation", "bottleneck_dropout", "bottleneck_config")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(base_layer)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_scaling = nn.ModuleDict()
        self.bottleneck_activation, self.bottleneck_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self._disable_adapters = self.passed_over = False
        self.merged_adapters = []
        self._call, self._hook = _Call(), None
        # Parent and name: in a tuple, so that the norm is no submodule of this one; by name, since
        # PEFT wraps norms that are trained.
        self._norm: tuple[nn.Module, str] | None = None
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, with new weights."""
        if adapter_name in self.adapter_layer_names:  # PEFT would save others without theirs
            raise ValueError(f"adapter_name={adapter_name!r}: is a part of ours; choose another")
        width = self.out_features
        size = config.bottleneck_size or max(1, int(width // config.reduction_factor))
        down, up = nn.Linear(width, size), nn.Linear(size, width)
        for linear in (down, up) if down.weight.device.type != "meta" else ():
            nn.init.trunc_normal_(linear.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(linear.bias)
        if config.init_weights == "identity":
            nn.init.zeros_(up.weight)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        if config.scaling == "learned":
            self.bottleneck_scaling[adapter_name] = LearnedScale()
        self.bottleneck_activation[adapter_name] = ACT2FN[config.act]
        dropout = nn.Dropout(config.dropout).train(self.base_layer.training)
        self.bottleneck_dropout[adapter_name] = dropout
        self.bottleneck_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def watch_residual(self, block: nn.Module, sublayer: Sublayer) -> None:
        """Take x, which this layer never gets, from the module that gets it."""
        self._argument, source = sublayer.argument, block.get_submodule(sublayer.residual)
        self._hook = source.register_forward_pre_hook(self._see_residual, with_kwargs=True)
        if sublayer.norm:
            parent, _, name = sublayer.norm.rpartition(".")
            self._norm = (block.get_submodule(parent), name)

    @property
    def config_that_reads_x(self) -> BottleneckConfig | None:
        """The configuration of an adapter that needs x, if there is one."""
        configs = self.bottleneck_config.values()
        return next((config for config in configs if config.adapter_input != "output"), None)

    def _see_residual(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._call.x = weakref.ref([*args, *kwargs.values()][self._argument])

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """h plus what the active adapters add to it."""
        hidden = self.base_layer(x, *args, **kwargs)
        seen, self._call.x = self._call.x, None
        residual = seen() if seen is not None else None
        if self.disable_adapters or self.passed_over:
            return hidden
        if self._call.rows is not None:
            return self._by_rows(hidden, residual)
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                hidden = hidden + self._added(name, hidden, residual)
        return hidden

    def merge(self, *args, **kwargs) -> None:
        """Not possible."""
        raise NotImplementedError(NO_MERGING)

    def unmerge(self) -> None:
        """Nothing is merged, ever."""

    def _by_rows(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """h plus what the adapter that each row of the batch asks for adds to it."""
        names, given = self._call.rows, len(hidden)
        times, rest = divmod(given, len(names))  # beams; in OPT, whose h has two axes, tokens too
        if rest or (hidden.dim() > 2 and times not in (1, self._call.beams)):
            raise ValueError(f"adapter_names: {len(names)} names for a batch of {given} rows")
        result = hidden.clone()
        for name in set(names) & self.bottleneck_down.keys():
            rows = [row for row in range(given) if names[row // times] == name]
            result[rows] += self._added(name, hidden, residual, rows)
        return result

    def _added(self, name: str, hidden: torch.Tensor, residual: torch.Tensor | None, rows=None):
        """What an adapter adds to h (shape batch x tokens x d, as h), or to some rows of it, in h's
        dtype.
        """
        config, read = self.bottleneck_config[name], hidden
        if config.adapter_input != "output" and (residual is None or residual.shape != read.shape):
            raise RuntimeError(
                f"adapter_input={config.adapter_input!r}: the sublayer's input did not come by; "
                "chunk_size_feed_forward cannot be used with it, nor can a part of a block be "
                "called by itself"
            )
        if config.adapter_input == "input":
            read = residual
        elif config.adapter_input == "residual":
            read = hidden + residual
            if self._norm is not None:
                read = getattr(*self._norm)(read)
        if rows is not None:
            read = read[rows]
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        added = up(
            self.bottleneck_activation[name](down(self._cast_input_dtype(read, down.weight.dtype)))
        )
        if config.scaling == "learned":
            added = self.bottleneck_scaling[name](added)
        elif config.scaling != 1:
            added = added * config.scaling
        return self.bottleneck_dropout[name](added).to(hidden.dtype)


class BottleneckLinear(BottleneckLayer):
    """What takes a layer's place; PEFT's all-linear knows it again by "Linear" in its name."""


class BottleneckModel(BaseTuner):
    """PEFT's tuner; made by `get_peft_model` and its like."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, config: BottleneckConfig, model_config: dict):
        kind = model_config.get("model_type")
        known = SUBLAYERS.get(kind)
        if config.sublayers:
            known = {"sublayers": [Sublayer(**sublayer) for sublayer in config.sublayers]}
        if config.target_modules is None:
            if known is None:
                raise ValueError(
                    f"model type {kind!r}: bottleneck adapters do not know their place; pass "
                    "target_modules, the names of the linear layers that end its attention and "
                    "feed-forward sublayers, such as ['o_proj', 'down_proj']"
                )
            places = [config.placement] if config.placement != "both" else list(known)
            config.target_modules = {
                sublayer.output for place in places for sublayer in known[place]
            }
            if config.placement == "ffn" and known is _BERT:
                # "output.dense" also ends the names of attention's layers.
                attention = {sublayer.output for sublayer in known["attention"]}
                if isinstance(config.exclude_modules, str):
                    ends = "|".join(re.escape(name) for name in sorted(attention))
                    config.exclude_modules = rf"(?:{config.exclude_modules})|(?:.*\.)?(?:{ends})"
                else:
                    config.exclude_modules = attention | set(config.exclude_modules or ())
        reads_x = config.adapter_input != "output"
        if reads_x and known is None:
            raise ValueError(
                f"adapter_input={config.adapter_input!r}: what the sublayers of {kind!r} are added "
                "to is not known here; pass 'output', or sublayers, which names it"
            )
        if reads_x and model_config.get("do_layer_norm_before") is False:
            raise ValueError(f"adapter_input={config.adapter_input!r}: not with post-norm OPT")
        if config.adapter_input == "residual" and known is _GEMMA2:
            raise ValueError(f"adapter_input='residual': {kind} norms h before it is added to x")
        if config.layers_to_transform is not None and not config.layers_pattern and known:
            config.layers_pattern = list(_LAYER_LISTS)
        return config

    def _prepare_model(self, config: BottleneckConfig, model: nn.Module) -> None:
        if config.train_norms is None:
            causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            config.train_norms = not (causal or config.task_type == "CAUSAL_LM")
        if config.train_norms:
            names = norm_names(model, config.layers_to_transform, config.layers_pattern)
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *names]))

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key):
        if config.adapter_input != "output":
            kind = self.get_model_config(self.model).get("model_type")
            _sublayer(config, kind, current_key)  # or an error
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
        else:
            layer = BottleneckLinear(target, adapter_name, config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's. Our hooks are off meanwhile, for it copies norms that are trained, hooks too."""
        self._leave_residuals()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            kind = self.get_model_config(model).get("model_type")
            for key, layer in model.named_modules():
                if isinstance(layer, BottleneckLayer) and (reads_x := layer.config_that_reads_x):
                    sublayer = _sublayer(reads_x, kind, key)
                    block = key.removesuffix(sublayer.output).removesuffix(".")
                    layer.watch_residual(model.get_submodule(block), sublayer)

    def unload(self) -> nn.Module:
        """The model as it was, with its own norms; other `modules_to_save` stay as trained, as with
        LoRA.
        """
        self._leave_residuals()
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper) and _is_norm(module.original_module):
                module.set_adapter([])
        return super().unload()

    def _leave_residuals(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, BottleneckLayer) and layer._hook is not None:
                layer._hook.remove()

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(NO_MERGING)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        """PEFT's, by which it says which adapter each row of a batch wants, "__base__" for none."""
        if adapter_names is None:
            yield
            return
        if self.model.training:
            raise ValueError("adapter_names: not in training mode")
        for name in set(adapter_names) - {"__base__", *self.peft_config}:
            raise ValueError(f"adapter_names: no adapter is called {name!r}")
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in self.modules()):
            raise ValueError("adapter_names: not beside norms, heads or tokens that were trained")
        calls = [layer._call for layer in self.modules() if isinstance(layer, BottleneckLayer)]
        beams = max(kwargs.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        try:
            for call in calls:
                call.rows, call.beams = list(adapter_names), beams
            yield
        finally:
            for call in calls:
                call.rows = None

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type="linear",
    ) -> None:
        """Add an adapter whose parameters are the weighted sum of others': with weights that sum to
        1 their average, as AdapterHub's `average_adapter`. They must be alike but for their values.
        """
        if combination_type != "linear" or len(weights) != len(adapters) or not adapters:
            raise ValueError("add_weighted_adapter: takes 'linear', and a weight for each adapter")
        if adapter_name in self.peft_config or not set(adapters) <= self.peft_config.keys():
            raise ValueError(f"add_weighted_adapter: {adapters} must exist, {adapter_name!r} not")
        config, *others = (
            replace(self.peft_config[name], inference_mode=False, revision=None, peft_version=None)
            for name in adapters
        )
        if any(other != config for other in others):
            raise ValueError(f"add_weighted_adapter: {adapters} are configured differently")
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        of_model = self.get_model_config(self.model)
        set_additional_trainable_modules(
            self.model, config, of_model, adapter_name, activate_adapter=False
        )
        for parts in self.model.modules():
            if not isinstance(parts, nn.ModuleDict | nn.ParameterDict):
                continue
            if not {adapter_name, *adapters} <= set(parts.keys()):
                continue
            own, *given = (
                list(part.parameters()) if isinstance(part, nn.Module) else [part]
                for part in (parts[name] for name in (adapter_name, *adapters))
            )
            with torch.no_grad():
                for new, *olds in zip(own, *given, strict=True):
                    new.copy_(sum(weight * old for weight, old in zip(weights, olds, strict=True)))


class _Prefix(str):
    """Our prefix. PEFT warns of adapters named like a part of it, such as "en", without need."""

    def __contains__(self, adapter_name: str) -> bool:
        return False


def layer_number(name: str, lists: list[str] | str | None = None) -> int | None:
    """The number of the layer that a module or parameter belongs to, by its name. `lists` are names
    of the model's lists of layers, where they are unusual.
    """
    lists = [lists] if isinstance(lists, str) else lists or _LAYER_LISTS
    match = re.search(rf"(?:^|\.)(?:{'|'.join(lists)})\.(\d+)\.", name)
    match = match or re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def norm_names(
    model: nn.Module, layers: list[int] | int | None = None, lists: list[str] | str | None = None
) -> list[str]:
    """The layer norms of a model, as PEFT's `modules_to_save` takes them: by the last part of their
    names, or by their whole names where that part also ends the names of other modules or of norms
    in layers that were not asked for. Norms of queries and keys are left out, and so is what cannot
    be told from them by its name: the last norm of a Qwen3 or Gemma 3 without a head.
    """
    chosen = [layers] if isinstance(layers, int) else layers
    kinds = {  # where another adapter trains a norm too: that of the norm, not of PEFT's wrapper
        name.removesuffix(".original_module"): _is_norm(module)
        for name, module in model.named_modules()
        if ".modules_to_save" not in name
    }
    norms = {
        name: name.rpartition(".")[2]
        for name, is_norm in kinds.items()
        if is_norm and not name.endswith(("q_norm", "k_norm"))
        if not chosen or layer_number(name, lists) in chosen
    }

    def ends_others(end: str) -> bool:
        return any(name.endswith(end) and name not in norms for name in kinds)

    names = [name if ends_others(short) else short for name, short in norms.items()]
    return [name for name in dict.fromkeys(names) if not ends_others(name)]


def _features(layer: nn.Module) -> tuple[int, int]:
    """The widths of a Linear (also in 4 or 8 bits) or of transformers' Conv1D."""
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        raise ValueError("target_modules: MultiheadAttention uses its out_proj without calling it")
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(hasattr(layer, name) for name in names):
            return getattr(layer, names[0]), getattr(layer, names[1])
    raise ValueError(
        f"target_modules: {type(layer).__name__} is no linear layer, which a sublayer ends with"
    )


def _sublayer(config: BottleneckConfig, kind: str | None, key: str) -> Sublayer:
    """The sublayer that a module is the end of."""
    sublayers = [Sublayer(**sublayer) for sublayer in config.sublayers or ()] or [
        sublayer for place in SUBLAYERS[kind].values() for sublayer in place
    ]
    ends = [sublayer for sublayer in sublayers if f".{key}".endswith(f".{sublayer.output}")]
    if not ends:
        raise ValueError(
            f"target_modules: {key} ends no sublayer of {kind!r}, so what it is added to is not "
            "known; pass adapter_input='output'"
        )
    return max(ends, key=lambda sublayer: len(sublayer.output))


if BOTTLENECK in PEFT_TYPE_TO_CONFIG_MAPPING:  # by another copy of this file: its classes are used
    BottleneckConfig = PEFT_TYPE_TO_CONFIG_MAPPING[BOTTLENECK]
    BottleneckModel = PEFT_TYPE_TO_TUNER_MAPPING[BOTTLENECK]
    BottleneckLayer = BottleneckModel.tuner_layer_cls
else:
    register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
    PEFT_TYPE_TO_PREFIX_MAPPING[BOTTLENECK] = _Prefix(BottleneckModel.prefix)
PEFT_TYPE_TO_CONFIG_MAPPING[SAVED_TYPE] = BottleneckConfig
