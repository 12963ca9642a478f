"""`RecipeTrainer`, in parts of similar length, learns what TRL's trainer does in whole steps."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for
from trl import SFTConfig, SFTTrainer

from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

# 40 rows of 4 to 43 tokens, the last third of each supervised.
ROWS = [
    {"input_ids": [3 + (7 * number + place) % 250 for place in range(length)]}
    for number, length in enumerate((11 * number) % 40 + 4 for number in range(40))
]
for row in ROWS:
    length = len(row["input_ids"])
    row["labels"] = [-100] * (length - length // 3 - 1) + row["input_ids"][-(length // 3 + 1) :]


def adapted():
    """The same random adapter at every call, B not zero so that every loss depends on it."""
    model = tiny_llama(300)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


def train(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step, and by how much each weight changed."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = trainer.model.named_parameters()
    return losses, {name: weight.detach() - before[name] for name, weight in after}


def test_the_loss_of_every_step_and_what_is_learned_are_trls(tmp_path):
    shared = {
        "output_dir": str(tmp_path),
        "train_sampling_strategy": "batch_rebalance",
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    task = examples_task(ROWS, tokenizer_for("gpt2"))
    data = {"train_dataset": Dataset.from_list(ROWS), "processing_class": task.tokenizer}
    ours = RecipeConfig(**shared, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    theirs = SFTConfig(**shared, per_device_train_batch_size=8, max_length=None)
    losses, change = train(RecipeTrainer(adapted(), ours, task))
    wanted, learned = train(SFTTrainer(adapted(), theirs, **data))
    assert len(losses) == 10
    assert losses == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 0.02
    difference = sum((change[name] - one).square().sum() for name, one in learned.items())
    norm = sum(one.square().sum() for one in learned.values())
    assert norm > 0
    assert difference.sqrt() <= 1e-3 * norm.sqrt()
