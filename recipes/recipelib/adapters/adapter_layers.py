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
from recipelib.adapters.bottleneck import BottleneckConfig, BottleneckLayer, layer_number
from recipelib.models import decoder_layers, require_modules
from recipelib.runtime import UserError, is_main_process


@contextmanager
def errors_name_options() -> Iterator[None]:
    """What PEFT and the adapters' configuration refuse, as one line that names the option.

    Raises:
        UserError: what they said.
    """
    try:
        yield
    except ValueError as error:
        text = " ".join(str(error).split())
        named = re.match(r"[a-z_]+[=:,]", text)  # else a model whose layers are not known
        raise UserError(f"--{text if named else f'target_modules: {text}'}") from None


def add_bottlenecks(
    model,
    config: BottleneckConfig,
    adapterhub: str | None = None,
    top_layers: int | None = None,
    drop_below: int | None = None,
    revision: str | None = None,
) -> PeftModel:
    """`get_peft_model` for bottleneck adapters, with what cannot work refused in a line.

    Args:
        adapterhub: the folder of an adapter of AdapterHub's to start from, instead of `config`.
        top_layers: how many layers at the top get adapters; all by default. Below them there is no
            backward pass.
        drop_below: the layer below which adapters will be dropped once they are trained.
        revision: of the base model, for PEFT to write down.
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
    if isinstance(config.target_modules, set):
        require_modules(model, sorted(config.target_modules))
    if top_layers:
        config.layers_to_transform = list(range(lowest, layers))
    with errors_name_options():
        if adapterhub:
            model = load_adapterhub(model, adapterhub, task_type="CAUSAL_LM", revision=revision)
        else:
            model = get_peft_model(model, config, revision=revision)
    if top_layers:
        # Where activations are recomputed, transformers asks for gradients down to the embeddings.
        decoder_layers(model)[lowest].register_forward_pre_hook(
            lambda module, given: (given[0].detach(), *given[1:])
        )
    if drop_below:
        with without_adapters(model, drop_below):
            pass  # there are some to drop, or a line says so
    return model


@contextmanager
def without_adapters(model, below: int | None = None) -> Iterator[int]:
    """The base model meanwhile, or only in the layers below a number. Gives the number of adapters
    that are passed over.

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
    """Whether a layer is; what stands in none is not."""
    return number is not None and number < layer


def save_without_adapters_below(output_dir: str, layer: int) -> None:
    """Write the adapter without those of the lowest layers to OUTPUT_DIR/dropped, for PEFT."""
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
    """Put the file that makes PEFT know the adapters beside them, as `peft_bottleneck.py`."""
    if is_main_process():
        shutil.copy(bottleneck.__file__, f"{output_dir}/peft_bottleneck.py")
