"""Where an option of a recipe shows: in a preview, in what libraries and the trainer are given by a
run that trains and scores nothing, in answers, in a line that refuses it.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from quick_runs import (
    Place,
    module_of,
    parsed,
    run,
)

from recipelib.adapters import BottleneckConfig, adapter_layers
from recipelib.cli import run_recipe
from recipelib.evaluation import TaskScore
from recipelib.models import loading, nature, sources
from recipelib.pipeline import PipelineTrainer, stages
from recipelib.reporting import answer_file
from recipelib.runtime import UserError
from recipelib.training.cloze_trainer import ClozeTrainer
from recipelib.training.trainer import RecipeTrainer


def placed(value: Any, recipe: str, place: Place) -> Any:
    """A value of the table with the files that it names: <model>, <rows>, <others>, <bad>, ..."""
    if isinstance(value, list):
        return [placed(item, recipe, place) for item in value]
    if not isinstance(value, str):
        return value
    root, kind = place.model.parent, "sums" if recipe == "cot_sft" else "reviews"
    names = {
        **{f"<{name}>": str(folder) for name, folder in place._asdict().items()},
        "<rows>": str(root / kind),
        "<others>": str(root / "others" / kind),
        "<bad>": str(root / "bad" / kind),
        "<template>": str(root / f"{kind}.yaml"),
        "<root>": str(root),
    }
    for name, path in names.items():
        value = value.replace(name, path)
    return value


# Where an option shows --------------------------------------------------------------------------


class Watch:
    """Watches recipes; what was seen with the same options is kept."""

    def __init__(self, place: Place, folder: Path):
        self.place, self.folder = place, folder
        self._seen: dict[str, Any] = {}

    def once(self, how: Callable, recipe: str, options: dict) -> Any:
        """What a way of watching sees of a recipe with these options."""
        key = json.dumps([how.__name__, recipe, options], sort_keys=True)
        if key not in self._seen:
            self._seen[key] = how(self, recipe, options)
        return self._seen[key]

    def parse(self, recipe: str, options: dict) -> tuple[Any, Any]:
        """What `main` takes."""
        options = {name: placed(value, recipe, self.place) for name, value in options.items()}
        folder = {"output_dir": str(self.folder / "out")}
        return parsed(recipe, self.place, **{**folder, **options})


class Line(str):
    """What a user's mistake ends in."""


def line_of(error: UserError) -> Line:
    assert str(error).strip()
    assert "\n" not in str(error)
    return Line(error)


def preview(watch: Watch, recipe: str, options: dict) -> str:
    """What --preview prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            module_of(recipe).main(*watch.parse(recipe, {"preview": 1, **options}))
        except UserError as error:
            return line_of(error)
    return out.getvalue()


def start(watch: Watch, recipe: str, options: dict) -> dict[str, Any] | Line:
    """What libraries and trainer are given by a run that trains nothing and scores nothing."""
    seen: dict[str, Any] = {"loaded": [], "scored": [], "runs": [], "left": []}
    with watched(seen), contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            module_of(recipe).main(*watch.parse(recipe, options))
        except UserError as error:
            return line_of(error)
    return {**seen, "out": out.getvalue()}


@contextlib.contextmanager
def watched(seen: dict[str, Any]) -> Iterator[None]:
    """Meanwhile what a run does is written down and, where it takes long, not done."""
    load_pretrained = loading.load_pretrained

    def load(name, **options):
        seen["loaded"].append({key: str(value) for key, value in options.items()})
        return load_pretrained(name, **{**options, "revision": None})

    def score(model, asker, rows, draws=(), **options):
        kept = {key: value for key, value in options.items() if key != "journal"}
        seen["scored"].append({"rows": count(rows), "draws": len(draws), **kept})
        return TaskScore("accuracy", 0.5, 0.1, rows=count(rows))

    def count(rows) -> int:
        return len(getattr(rows, "asked", rows))

    def train(trainer, *args, **options):
        model = trainer.model
        config = getattr(model, "active_peft_config", None)
        optimizer = trainer.optimizer or trainer.create_optimizer()
        trained = {name: it for name, it in model.named_parameters() if it.requires_grad}
        numbers = {
            type(callback).__name__: {
                name: value for name, value in vars(callback).items() if isinstance(value, int)
            }
            for callback in trainer.callback_handler.callbacks
        }
        seen["runs"].append(Path(trainer.args.output_dir).name)
        seen["peft"] = config and config.to_dict()
        seen["cache"] = trainer.cache and (str(trainer.cache.root), str(trainer.cache.dtype))
        seen["examples"] = len(trainer.task.encoded.examples)
        seen["trained"] = {name: it.sum().item() for name, it in trained.items()}
        seen["callbacks"] = numbers
        seen["optimizer"] = type(optimizer).__name__.lower()
        seen["rates"] = {
            name: group["lr"]
            for group in optimizer.param_groups
            for name, it in trained.items()
            if any(it is parameter for parameter in group["params"])
        }

    def save(trainer, task, base, tuned, *, method, more=None):
        seen["left"].append({"method": method, **(more or {})})
        return {"score": 0.5, "base_score": 0.5, "train_seconds": 1, "peak_memory_bytes": 1}

    def save_features(task, training, model, choice, base, tuned):
        seen["left"].append(
            {"layers": [*choice.layers], "kind": choice.probe.kind, **task.features_of}
        )

    def leave(name: str) -> Callable:
        return lambda *args, **options: seen["left"].append({name: args[1:]})

    def search(model, asker, train, evaluation, seed, **options):
        seen["scored"].append({"train": count(train), "rows": count(evaluation), **options})

    def embed(model, encoder):
        seen["left"].append({"embedded": True})
        return None  # by their words

    def adapterhub(model, folder, **options):
        seen["left"].append({"adapterhub": folder})
        return get_peft_model(model, BottleneckConfig(task_type="CAUSAL_LM"))

    with pytest.MonkeyPatch.context() as patch:
        for module in (loading, stages):
            patch.setattr(module, "load_pretrained", load)
        for module in (loading, nature, sources, stages):
            # The tiny model's folder stands for a hub id, which has revisions.
            patch.setattr(module, "hub_errors_in_one_line", lambda *_: contextlib.nullcontext())
        for name in ("task.task.evaluate_task", "task.cloze.score_cloze"):
            patch.setattr(f"recipelib.{name}", score)
        for name in ("score_labels", "score_answers", "score_losses"):
            patch.setattr(f"recipelib.evaluation.{name}", score)
        for trainer in (RecipeTrainer, ClozeTrainer, PipelineTrainer):
            patch.setattr(trainer, "train", train)
            patch.setattr(trainer, "save_model", lambda self: None)
        patch.setattr("recipelib.reporting.save_run", save)
        patch.setattr("recipelib.reporting.save_features_run", save_features)
        patch.setattr("recipelib.evaluation.search_label_words", search)
        patch.setattr("recipelib.inference.embedding_similarity", embed)
        for name in ("save_draws", "save_score", "save_few_shot", "save_label_words"):
            patch.setattr(f"recipelib.reporting.{name}", leave(name))
        for name in ("save_predictions", "say_wrong"):
            patch.setattr(f"recipelib.reporting.{name}", lambda *args: None)
        for name in ("save_start", "save_as_lora", "save_own_code", "save_without_adapters_below"):
            patch.setattr(f"recipelib.adapters.{name}", leave(name))
        patch.setattr(adapter_layers, "load_adapterhub", adapterhub)
        four_bits = {"quantization_config": None}
        patch.setattr("recipelib.models.four_bit_loading", lambda *_: four_bits)
        yield


def answers(watch: Watch, recipe: str, options: dict) -> dict[str, str]:
    """The answers to a file of questions, by what a run of LoRA has left that writes them."""
    folder = watch.folder / "lora"
    if not folder.exists():
        sums = {"dataset": str(watch.place.sums), "template": "word_problems"}
        run("lora_sft", watch.place, folder, **sums)
    ask = {"template": "word_problems", "predict": "<root>/questions.jsonl", **options}
    if recipe == "icl_eval":
        args, training = watch.parse(recipe, {"dataset": "<sums>", **ask})
        module_of(recipe).main(args, training)
    else:
        args, training = watch.parse(recipe, {**ask, "output_dir": str(folder)})
        answer_file(args, training)
    files = [*Path(training.output_dir).glob("predictions_*.jsonl")]
    texts = {file.name: file.read_text() for file in files}
    for file in files:
        file.unlink()
    return texts


def command(watch: Watch, recipe: str, options: dict) -> list:
    """Which files a command line has answered; and that `main` is called otherwise."""
    asked, module = [], module_of(recipe)
    kind = module.main.__annotations__["args"]
    argv = [part for name, value in options.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{recipe}.py", *argv])
        patch.setattr("recipelib.reporting.answer_file", lambda args, _: asked.append(args.predict))
        main = lambda *_: asked.append("main")  # noqa: E731
        run_recipe(main, kind, module.__doc__, module.DEFAULTS)
    return asked
