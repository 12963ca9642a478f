"""Every recipe run in this process on a tiny model and a few rows, as the command line would."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tiny_bert import save_tiny_bert
from tiny_llama import save_tiny_llama

from recipelib.cli import arguments

TRAINING = [
    *("lora_sft", "adapter_sft", "prompt_tuning", "cloze_sft", "instruction_sft", "cot_sft"),
    *("transfer_learning", "gpipe_sft"),
]
RECIPES = [*TRAINING, "icl_eval"]
REVIEWS = [
    {"sentence": f"a {word} film, number {number}", "label": label}
    for number in range(4)
    for word, label in (("fine", "positive"), ("dull", "negative"))
]
SUMS = [
    {
        "question": f"{n} pens and {n} more?",
        "rationale": f"{n} and {n} are {2 * n}.",
        "answer": str(2 * n),
    }
    for n in range(1, 10)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Hello {n}"},
            {"role": "assistant", "content": f"Good day {n}"},
        ]
    }
    for n in range(8)
]


class Place(NamedTuple):
    """Where tiny models and the rows lie."""

    model: Path
    masked: Path
    reviews: Path
    sums: Path
    chats: Path


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_place(folder: Path) -> Place:
    """A tiny Llama, a tiny BERT, and for each kind of task a folder of rows."""
    place = Place(*(folder / name for name in Place._fields))
    save_tiny_llama(place.model)
    save_tiny_bert(place.masked)
    for data, rows, count in ((place.reviews, REVIEWS, 5), (place.sums, SUMS, 6)):
        write_rows(data / "train.jsonl", rows[:count])
        write_rows(data / "validation.jsonl", rows[count:])
    for split, rows in (("train", CHATS[:5]), ("test", CHATS[5:])):
        write_rows(place.chats / f"{split}.jsonl", rows)
    return place


def options_of(recipe: str, place: Place, **given: Any) -> dict[str, Any]:
    """The options of a run of a recipe that is over at once, and those given."""
    options: dict[str, Any] = {
        "model_name_or_path": str(place.model),
        "dataset": str(place.sums if recipe == "cot_sft" else place.reviews),
        "disable_tqdm": True,
    }
    if recipe in RECIPES and recipe != "cot_sft":  # whose default is by the rows
        options |= {"max_new_tokens": 6}
    trains = recipe in TRAINING and given.get("mode") != "features"
    if trains and not given.get("score_only"):
        options |= {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
        options |= {"learning_rate": 0.01, "gradient_accumulation_steps": 1}
        options |= {"max_eval_samples": -1}  # of which a draw would change the order
    if recipe == "icl_eval":
        options |= {"shots": 1, "max_length": 256}
    if recipe == "gpipe_sft":
        options |= {"micro_batches": 2, "per_device_train_batch_size": 1}
    if recipe == "prompt_tuning":
        options |= {"virtual_tokens": 4}
    if recipe == "instruction_sft":
        del options["dataset"]
        options |= {"template": [f"movie_reviews={place.reviews}"], "max_train_samples": 6}
    return {**options, **given}


def parsed(recipe: str, place: Place, **given: Any) -> tuple[Any, Any]:
    """What a recipe's `main` takes, for such a run."""
    return arguments(module_of(recipe), **options_of(recipe, place, **given))


def module_of(recipe: str) -> ModuleType:
    """A recipe."""
    return importlib.import_module(recipe)


def run(recipe: str, place: Place, folder: Path, **given: Any) -> Path:
    """Run a recipe; gives the folder that it wrote to."""
    module_of(recipe).main(*parsed(recipe, place, output_dir=str(folder), **given))
    return folder
