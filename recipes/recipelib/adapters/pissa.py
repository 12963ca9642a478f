"""PiSSA's adapter as plain LoRA, which fits the untouched base model (Meng et al. 2024,
arXiv:2404.02948, appendix C).

PEFT converts it while it saves, by loading the starting adapter into the live model. That cannot
be done to a model that FSDP has sharded, so this changes the saved files instead.
"""

from __future__ import annotations

import shutil

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from recipelib.models import bare_model
from recipelib.runtime import UserError, is_main_process


def save_start(model, output_dir: str) -> None:
    """Save the adapter that PiSSA starts from, whose product B0 A0 it has taken out of W.

    Raises:
        UserError: W is also the embeddings', which read it without B0 A0 added.
    """
    bare = bare_model(model)
    table = bare.get_input_embeddings()
    for layer in (table, bare.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer) and layer.weight is table.weight:
            raise UserError(
                "--pissa: starts from the weights of linear layers, and one of --target_modules "
                "has the embeddings'; leave it out"
            )
    if is_main_process():
        model.save_pretrained(f"{output_dir}/pissa_start")


def save_as_lora(output_dir: str) -> None:
    """Make PiSSA's saved adapter a plain LoRA of rank 2r that fits the untouched base model:
    W' + s B A = W + s (B A - B0 A0) with W' = W - s B0 A0, so A0 is put below A and -B0 beside B.
    """
    if not is_main_process():
        return
    file, start = f"{output_dir}/adapter_model.safetensors", f"{output_dir}/pissa_start"
    trained, first = load_file(file), load_file(f"{start}/adapter_model.safetensors")
    # PEFT saves a head that is adapted with its W', and the untouched base has W.
    trained = {name: weight for name, weight in trained.items() if ".base_layer." not in name}
    for name, weight in trained.items():
        if ".lora_A." in name:
            trained[name] = torch.cat([weight, first[name]])
        elif ".lora_B." in name:
            trained[name] = torch.cat([weight, -first[name]], dim=1)
    save_file(trained, file, {"format": "pt"})
    config = LoraConfig.from_pretrained(output_dir)
    config.init_lora_weights, config.r = True, 2 * config.r
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the scale s stays
    config.save_pretrained(output_dir)
    shutil.rmtree(start)
