"""Makes the folder adapterhub/: what AdapterHub's adapters 1.3.0 makes of small models.

adapters needs transformers 4, so it runs in an environment of its own:

    python3.11 -m venv adapterhub
    adapterhub/bin/pip install adapters==1.3.0 torch==2.13.0
    adapterhub/bin/python tests/golden/adapterhub.py

For each model: its weights, inputs, and for each kind of adapter the output and the gradients of
the adapter's parameters; and the adapter as `save_adapter` leaves it.
"""

from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

TARGET = Path(__file__).parent / "adapterhub"
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL)),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "t5": lambda: T5Model(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
}
KINDS = {
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "seq_bn": SeqBnConfig(reduction_factor=4),
    "par_bn": ParBnConfig(reduction_factor=2),
}


def main() -> None:
    """Write the folder."""
    for kind, build in MODELS.items():
        torch.manual_seed(1)
        model = build().eval()
        with (
            torch.no_grad()
        ):  # larger than transformers' start, so that no part is too small to see
            for one in model.parameters():
                one.copy_(torch.randn_like(one) * 0.3 + (1.0 if one.ndim == 1 else 0.0))
        tensors = {f"model.{name}": one.clone() for name, one in model.state_dict().items()}
        input_ids = torch.randint(3, 40, (2, 9))
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1, 6:] = 0
        tensors |= {"input_ids": input_ids, "attention_mask": attention_mask}
        tensors["weight"] = weight = torch.randn(2, 9, 16) * attention_mask[..., None]
        decoder = {"decoder_input_ids": input_ids} if kind == "t5" else {}
        adapters.init(model)
        for name, config in KINDS.items():
            model.add_adapter(name, config=config)
            model.train_adapter(name)
            model.eval()
            own = {key: one for key, one in model.named_parameters() if f".{name}." in key}
            with torch.no_grad():
                for one in own.values():
                    one.copy_(torch.randn_like(one) * 0.2)
            output = model(
                input_ids=input_ids, attention_mask=attention_mask, **decoder
            ).last_hidden_state
            (output * weight).sum().backward()
            tensors[f"{name}.output"] = output.detach().clone()
            for key, one in own.items():
                tensors[f"{name}.gradient.{key}"] = one.grad.clone()
            model.save_adapter(str(TARGET / f"{kind}_{name}"), name, use_safetensors=True)
            model.set_active_adapters(None)
        save_file(tensors, TARGET / f"{kind}.safetensors")


if __name__ == "__main__":
    main()
