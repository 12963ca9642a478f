"""Recipes run as their tests need it: on models and rows that are made once for all of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

# Of different lengths, and as many of each label.
REVIEWS = [
    {"sentence": f"{'so ' * (number % 5)}{word} film, number {number}", "label": label}
    for number in range(12)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
SUMS = [
    {
        "question": f"{n} pens and {n} more?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(1, 13)
]
# A template of gold answers that no label names, scored by their loss.
QUESTIONS = """\
name: questions
form: generative
dataset: {path: nowhere, train: train, eval: test}
prompt: |-
  Question: {{ question }}
  Answer:
answer: " {{ answer }}"
metric: loss
"""


def write_rows(folder: Path, **splits: list[dict]) -> Path:
    """A folder of data: a file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Any]:
    """A `ForkServer`, which all launches of these tests share."""
    from launching import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory) -> Path:
    """A tiny causal model with its tokenizer."""
    from tiny_llama import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("causal_model"))


@pytest.fixture(scope="session")
def masked_model(tmp_path_factory) -> Path:
    """A tiny masked model with its tokenizer."""
    from tiny_bert import save_tiny_bert

    return save_tiny_bert(tmp_path_factory.mktemp("masked_model"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """Rows for movie_reviews, the template that recipes have by default: 24 and 6."""

    def seen(split: str, rows: list[dict]) -> list[dict]:
        return [{**row, "sentence": f"{split}: {row['sentence']}"} for row in rows]

    return write_rows(
        tmp_path_factory.mktemp("reviews"),
        train=seen("train", REVIEWS),
        validation=seen("validation", REVIEWS[:6]),
    )


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A file of the reviews that are scored, without their labels."""
    rows = [{"sentence": f"validation: {row['sentence']}"} for row in REVIEWS[:6]]
    return write_rows(tmp_path_factory.mktemp("questions"), questions=rows) / "questions.jsonl"


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    """Rows for gsm8k, whose answers have reasons: 8 and 4."""
    return write_rows(tmp_path_factory.mktemp("sums"), train=SUMS[:8], test=SUMS[8:])


@contextmanager
def without_slow_parts() -> Iterator[None]:
    """Meanwhile no memory is estimated and no figure drawn, which have tests of their own and take
    longer than all the rest of a tiny run.
    """
    from recipelib.pipeline import plan
    from recipelib.training import cloze_trainer, trainer
    from recipelib.training.memory import MemoryEstimate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.touch())
        for module in (trainer, cloze_trainer, plan):
            patch.setattr(module, "estimate_memory", lambda *_: MemoryEstimate(0, 0, 0, 0, 0))
        yield


def run_recipe(recipe: ModuleType, *, whole: bool = False, **options: Any) -> Path:
    """Run a recipe as its command line would, --predict included.

    Args:
        whole: see `without_slow_parts`.
        options: of the command line, by their names.
    Returns:
        The folder of the run.
    """
    from recipelib.cli import arguments
    from recipelib.reporting import answer_file

    args, training = arguments(recipe, **options)
    with nullcontext() if whole else without_slow_parts():
        if args.predict and recipe.__name__ != "icl_eval":
            answer_file(args, training)
        else:
            recipe.main(args, training)
    return Path(training.output_dir)


@pytest.fixture(scope="session")
def start(causal_model, reviews) -> Callable[..., Path]:
    """`run_recipe` on the tiny causal model and the reviews, unless options say otherwise."""

    def start(recipe: ModuleType, folder: Path, **options: Any) -> Path:
        common = {"model_name_or_path": causal_model, "dataset": reviews, "disable_tqdm": True}
        return run_recipe(recipe, **{**common, "output_dir": folder, **options})

    return start


@pytest.fixture
def runs(start, tmp_path) -> Callable[..., Callable[..., Path]]:
    """Gives for a recipe and options that its tests share what runs it in the test's folder."""

    def of(recipe: ModuleType, **shared: Any) -> Callable[..., Path]:
        def run(output: str = "out", **options: Any) -> Path:
            return start(recipe, tmp_path / output, **{**shared, **options})

        return run

    return of


@contextmanager
def watched_training() -> Iterator[SimpleNamespace]:
    """The last run's `trainer`, and by their names the parameters `before` its training."""
    from recipelib.training import RecipeTrainer

    seen, train = SimpleNamespace(trainer=None, before={}), RecipeTrainer.train

    def watch(self, *args, **options):
        seen.trainer = self
        named = self.model.named_parameters()
        seen.before = {name: parameter.detach().clone() for name, parameter in named}
        return train(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeTrainer, "train", watch)
        yield seen


def changed(seen: SimpleNamespace) -> set[str]:
    """The names of the parameters that the training that was watched has changed."""
    import torch

    exact = {"rtol": 0, "atol": 0, "equal_nan": True}  # packed bits may read as nan
    return {
        name
        for name, parameter in seen.trainer.model.named_parameters()
        if not torch.allclose(parameter, seen.before[name], **exact)
    }
