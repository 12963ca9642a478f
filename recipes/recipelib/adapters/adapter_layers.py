"""Which layers have bottleneck adapters: those at the top only, or all but the lowest once they are
trained (AdapterDrop, Rueckle et al. 2021, arXiv:2010.11918).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from recipelib.adapters import bottleneck
from recipelib.adapters.adapterhub import load_adapterhub
from recipelib.adapters.bottleneck import (
    SUBLAYERS,
    BottleneckConfig,
    BottleneckLayer,
    layer_number,
)
from recipelib.adapters.further import TrainedAdapter
from recipelib.models import decoder_layers, require_modules, without_lora
from recipelib.runtime import UserError, is_main_process, say


@contextmanager
def errors_name_options() -> Iterator[None]:
    """A context that turns what PEFT and the adapters' configuration refuse into one line that
    names the option.

    Raises:
        UserError: what they said.
    """
    try:
        yield
    except ValueError as error:
        text = " ".join(str(error).split())
        named = re.match(r"[a-z_]+[=:,]", text)  # else it is a model whose layers are unknown
        raise UserError(f"--{text if named else f'target_modules: {text}'}") from None


def add_bottlenecks(
    model,
    config: BottleneckConfig | TrainedAdapter,
    adapterhub: str | None = None,
    top_layers: int | None = None,
    drop_below: int | None = None,
    revision: str | None = None,
) -> PeftModel:
    """`get_peft_model` for bottleneck adapters; what cannot work is refused in one line.

    Args:
        config: of new adapters, or trained ones to train further.
        adapterhub: the folder of an AdapterHub adapter to start from, instead of `config`.
        top_layers: how many layers at the top get adapters; all by default. Below them there is no
            backward pass.
        drop_below: the layer below which adapters will be dropped once they are trained.
        revision: of the base model; PEFT writes it into the adapter's configuration.
    Raises:
        UserError: layers that the model does not have, or adapters that it cannot have.
    """
    layers = model.config.get_text_config().num_hidden_layers
    for name, number in (("top_layers", top_layers), ("drop_adapters_below", drop_below)):
        if (number or 0) >= layers:
            raise UserError(f"--{name} {number}: the model has {layers} layers")
    lowest = layers - (top_layers or layers)
    if drop_below and drop_below <= lowest:
        raise UserError(
            f"--drop_adapters_below {drop_below}: the lowest adapters are those of layer {lowest}"
        )
    trained = isinstance(config, TrainedAdapter)
    if trained:
        pass  # checked when it was opened
    elif isinstance(config.target_modules, set):
        require_modules(model, sorted(config.target_modules))
    elif not adapterhub and model.config.model_type not in SUBLAYERS:
        config.target_modules = _usual_ends(model, config.placement)
        config.exclude_modules = without_lora(model) or None
    if top_layers and not trained:
        config.layers_to_transform = list(range(lowest, layers))
    with errors_name_options():
        if trained:
            model = config.on(model)
        elif adapterhub:
            model = load_adapterhub(model, adapterhub, task_type="CAUSAL_LM", revision=revision)
        else:
            model = get_peft_model(model, config, revision=revision)
    if top_layers:
        # Recomputing activations makes transformers ask for gradients of the embeddings; detached,
        # the backward pass still ends here.
        decoder_layers(model)[lowest].register_forward_pre_hook(
            lambda module, inputs: (inputs[0].detach(), *inputs[1:])
        )
    if drop_below:
        with without_adapters(model, drop_below):
            pass  # raises if there are none to drop
    return model


# Where sublayers end in the many models whose layers are made as Llama's.
_USUAL = {"attention": "self_attn.o_proj", "ffn": "mlp.down_proj"}


def _usual_ends(model, placement: str) -> set[str] | None:
    """The linear layers that end the sublayers of a model that `SUBLAYERS` does not list, if all
    its layers have them under their usual names.
    """
    ends = {end for place, end in _USUAL.items() if placement in ("both", place)}
    layers = decoder_layers(model)
    if not layers or not all(ends <= {name for name, _ in each.named_modules()} for each in layers):
        return None
    say(f"adapters stand after {' and '.join(sorted(ends, reverse=True))}, as in Llama")
    return ends


@contextmanager
def without_adapters(model, below: int | None = None) -> Iterator[int]:
    """A context in which adapters are passed over: all of them, or those in layers below a number.
    Yields how many.

    Raises:
        UserError: there are none below.
    """
    adapters = [
        module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLayer)
        and (below is None or _is_below(layer_number(name), below))
    ]
    if below is not None and not adapters:
        raise UserError("--drop_adapters_below: no adapter is in a layer with a number")
    for adapter in adapters:
        adapter.passed_over = True
    try:
        yield len(adapters)
    finally:
        for adapter in adapters:
            adapter.passed_over = False


def _is_below(number: int | None, layer: int) -> bool:
    """Whether a layer's number is below `layer`; None, of what stands in no layer, is not."""
    return number is not None and number < layer


def save_without_adapters_below(output_dir: str, layer: int) -> None:
    """Write the adapters without those of the layers below `layer` to OUTPUT_DIR/dropped, as PEFT
    loads them.
    """
    if not is_main_process():
        return
    weights = load_file(f"{output_dir}/adapter_model.safetensors")
    kept = {
        name: weight
        for name, weight in weights.items()
        if ".bottleneck_" not in name or not _is_below(layer_number(name), layer)
    }
    config = PeftConfig.from_pretrained(output_dir)
    config.layers_to_transform = sorted(
        {layer_number(name) for name in kept if ".bottleneck_" in name} - {None}
    )
    Path(output_dir, "dropped").mkdir(exist_ok=True)
    save_file(kept, f"{output_dir}/dropped/adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(f"{output_dir}/dropped")


def save_own_code(output_dir: str) -> None:
    """Copy the file that adds the method to PEFT beside the adapters, as `peft_bottleneck.py`."""
    if is_main_process():
        shutil.copy(bottleneck.__file__, f"{output_dir}/peft_bottleneck.py")
