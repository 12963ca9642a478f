"""A classification head is trained on the mean over a step's rows, however they are batched."""

import pytest
import torch
import torch.nn.functional as F
from deep_models import class_rows, deep, freeze, train_above

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WAYS = [
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
]


def model_of(family: str):
    fields = NO_DROPOUT if family == "bert" else {"attention_dropout": 0.0}
    return freeze(deep(family, "classes", **fields), [3], head=True)


def own_losses(model) -> list[float]:
    """The cross-entropy of each row by itself, without padding."""
    losses = []
    for row in class_rows(16):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits
        losses.append(F.cross_entropy(logits, torch.tensor([row["labels"]])).item())
    return losses


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_the_mean_of_that_of_each_row_by_itself(family, way, tmp_path):
    model = model_of(family)
    options = {"learning_rate": 0.0, "num_train_epochs": 1, "train_sampling_strategy": "random"}
    trainer = train_above(tmp_path, model, "classes", cached=True, **options, **way)
    wanted = own_losses(model.eval())
    assert max(wanted) - min(wanted) > 0.1
    assert len(trainer.losses) == 2
    assert sum(trainer.losses) / 2 == pytest.approx(sum(wanted) / 16, abs=1e-5)


def test_steps_in_parts_learn_what_whole_ones_do(tmp_path):
    found = []
    for number, way in enumerate(WAYS):
        model = model_of("bert")
        options = {"train_sampling_strategy": "random", **way}
        trainer = train_above(tmp_path / str(number), model, "classes", cached=True, **options)
        found.append((trainer.losses, dict(model.named_parameters())))
    (whole, wanted), (parts, weights) = found
    assert parts == pytest.approx(whole, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], wanted[name], atol=1e-5, rtol=0, msg=name)
