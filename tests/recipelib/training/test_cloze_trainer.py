"""Of several passes the best one is kept."""

import pytest
import torch
from tiny_llama import tiny_llama
from tiny_task import examples_task
from tokenizers_for_tests import tokenizer_for
from transformers import TrainerCallback

from recipelib.training.cloze_trainer import keep_best
from recipelib.training.config import RecipeConfig
from recipelib.training.trainer import RecipeTrainer

TOKENIZER = tokenizer_for("gpt2")
ROWS = [{"input_ids": [7, 8, 9 + row], "labels": [-100, -100, 9 + row]} for row in range(4)]


class Weights(TrainerCallback):
    """The trained weights at the end of each pass."""

    def __init__(self):
        self.passes = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        trained = (weight for weight in model.parameters() if weight.requires_grad)
        self.passes.append([weight.detach().clone() for weight in trained])


def train(folder, scores):
    """With these scores of the validation rows, pass by pass; None: there are no such rows."""
    model = tiny_llama(len(TOKENIZER))
    model.lm_head.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    training = RecipeConfig(
        output_dir=str(folder),
        num_train_epochs=len(scores or [0, 0]),
        learning_rate=0.01,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    task = examples_task(ROWS, TOKENIZER)
    task.validation = None if scores is None else "rows"
    waiting, asked = iter(scores or []), []

    def validate(model):
        asked.append(model)
        return next(waiting)

    task.validate = validate
    trainer, weights = RecipeTrainer(model, training, task), Weights()
    trainer.add_callback(weights)
    kept = keep_best(trainer, task)
    trainer.train()
    after = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    assert asked == [model] * len(scores or [])
    return kept, weights.passes, after


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, -1.0), (0.75, -2.0), (0.25, -0.1)], 1),
        ([(0.5, -2.0), (0.5, -1.0), (0.5, -1.5)], 1),  # of equals the surer one
        ([(0.5, -1.0), (0.5, -1.0), (0.5, -1.0)], 0),  # of equals the first
        ([(0.1, -1.0), (0.2, -1.0), (0.3, -9.0)], 2),
    ],
)
def test_a_run_ends_with_the_weights_of_its_best_pass(scores, best, tmp_path):
    kept, passes, after = train(tmp_path, scores)
    assert kept == [score for score, _ in scores]
    assert not same(passes[0], passes[1])  # it trains
    assert [same(after, weights) for weights in passes] == [
        place == best for place in range(len(scores))
    ]


def test_without_validation_rows_the_last_pass_stays(tmp_path):
    kept, passes, after = train(tmp_path, None)
    assert kept is None
    assert same(after, passes[-1])
