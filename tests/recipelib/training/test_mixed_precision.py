"""Training in bfloat16: adapters stay in float32 and cost no copies; one precision a process."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for

from recipelib.adapters.bottleneck import BottleneckConfig
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

TOKENIZER = tokenizer_for("gpt2")
ROWS = [{"input_ids": [7, 8, 9, 10 + row], "labels": [-100, -100, 9, 10]} for row in range(8)]
ADAPTERS = {
    "lora": (LoraConfig(target_modules="all-linear", lora_dropout=0.2), "lora_A.default"),
    "dora": (LoraConfig(target_modules="all-linear", use_dora=True), "lora_A.default"),
    "bottleneck": (BottleneckConfig(bottleneck_size=4), "bottleneck_down.default"),
}


def train(kind: str, folder) -> tuple[dict[str, torch.Tensor], set[torch.dtype]]:
    """The adapter after two steps, and the dtypes of what its first layers were given."""
    config, first = ADAPTERS[kind]
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(len(TOKENIZER)).to(torch.bfloat16), config)
    seen = set()
    for name, one in model.named_modules():
        if name.endswith(first):
            one.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    training = RecipeConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=0.01,
        bf16=True,
        use_cpu=True,
        activation_checkpointing=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    RecipeTrainer(model, training, examples_task(ROWS, TOKENIZER)).train()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert {one.dtype for one in trained.values()} == {torch.float32}
    given = {*seen}
    # Once trained it is scored without autocast.
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    return trained, given


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_adapter_s_input_is_not_copied_to_float32_and_nothing_else_changes(
    kind, tmp_path, monkeypatch
):
    found, seen = train(kind, tmp_path)
    assert seen == {torch.bfloat16}
    monkeypatch.setattr(RecipeTrainer, "_without_input_casts", lambda self: nullcontext())
    wanted, copied = train(kind, tmp_path)
    assert copied == {torch.float32}
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=0)


def test_variants_of_lora_keep_their_casts(tmp_path):
    assert train("dora", tmp_path)[1] == {torch.float32}
