"""The summary before training."""

from types import SimpleNamespace

import torch
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for

from recipelib.models.quantization import count_parameters
from recipelib.training.memory import MemoryEstimate
from recipelib.training.plan import show_plan

MEMORY = MemoryEstimate(parameters=1_000, gradients=0, optimizer=2_000, activations=3_000, logits=0)


def test_the_plan_says_what_is_trained_on_what(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    training = SimpleNamespace(
        model_dtype=(torch.float32, "on a CPU"),
        world_size=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        seed=0,
        data_seed=None,
        train_sampling_strategy="random",
        packing=False,
        learning_rate=5e-4,
        lr_scheduler_type=SimpleNamespace(value="cosine"),
        output_dir="runs/mine",
        loss_type="dft",
    )
    model = tiny_llama(300)
    rows = [{"input_ids": [5] * 6, "labels": [-100] * 4 + [5, 5]}] * 4
    task = examples_task(rows, tokenizer_for("gpt2"))
    task.model_name, task.sources = "owner/base", {"train": "rows.jsonl"}
    show_plan(model, training, task, MEMORY, {"embed": 0.01, "lora_B": 0.02})
    out = capsys.readouterr().out
    total = count_parameters(model)[1]
    for shown in (
        "owner/base, float32 (on a CPU)",
        f"{total:,} trainable of {total:,} (100.00%)",
        "rows.jsonl",
        "4 from 4 rows; 0 shortened",
        "24, of which 8 supervised; 0% padding",
        "24 = 4 per device x 3 accumulated x 2 (processes)",
        "0.0005, embed 0.01, cosine",
        "dft, by each token's probability",
        "runs/mine",
        str(MEMORY),
    ):
        assert shown in out
