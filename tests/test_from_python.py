"""From Python a recipe trains with exactly the settings of its command line; in one process, and in
several that a program starts.
"""

import dataclasses
import json
import runpy
from functools import cache
from pathlib import Path

import pytest
from quick_runs import (
    RECIPES,
    TRAINING,
    make_place,
    module_of,
    options_of,
    run,
)
from recipe_runs import without_slow_parts
from run_files import losses, read_json, read_jsonl

from recipelib import cli

SCRIPTS = Path(__file__).resolve().parents[1] / "recipes"
# Options of all kinds: a number, a flag, a list, JSON.
SOME = {
    "max_train_samples": 4,
    "skip_bad_rows": True,
    "columns": ["text=sentence"],
    "chat_template_kwargs": {"deep": False},
    "seed": 7,
    "max_length": 300,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with without_slow_parts():
        yield make_place(tmp_path_factory.mktemp("place"))


def command_line(options: dict) -> list[str]:
    """The options as they are written on a command line."""
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        words += [json.dumps(one) if isinstance(one, bool | dict) else str(one) for one in values]
    return words


def of_the_script(recipe: str, options: dict, monkeypatch) -> tuple:
    """What `main` is given where a recipe is run as a script with these options."""
    taken = []

    def take(main, arguments, description, defaults, **more):
        taken.append(cli.parse_arguments(arguments, description, defaults))

    monkeypatch.setattr("sys.argv", [f"{recipe}.py", *command_line(options)])
    with monkeypatch.context() as patch:
        patch.setattr(cli, "run_recipe", take)
        runpy.run_path(str(SCRIPTS / f"{recipe}.py"), run_name="__main__")
    return taken[0]


def settings(arguments) -> dict:
    """A dataclass's fields, and what it has made of them."""
    assert dataclasses.is_dataclass(arguments)
    return {name: str(value) for name, value in vars(arguments).items() if name != "command"}


@pytest.mark.parametrize("recipe", [*RECIPES, "search_label_words"])
@pytest.mark.parametrize("options", [{}, SOME], ids=["none", "some"])
def test_main_is_given_what_the_command_line_gives_it(recipe, options, monkeypatch):
    ours = cli.arguments(module_of(recipe), **options)
    theirs = of_the_script(recipe, options, monkeypatch)
    for one, other in zip(ours, theirs, strict=True):
        assert settings(one) == settings(other)
    assert ours[1].command == [f"recipes/{recipe}.py", *command_line(options)]  # for the card
    for name, value in module_of(recipe).DEFAULTS.items():
        if name not in options:
            assert getattr(ours[1], name) == value


# A step's rows, and so its loss, are those of one process.
IN_ORDER = {"train_sampling_strategy": "random", "lr_scheduler_type": "constant"}


def in_order(recipe: str) -> dict:
    return IN_ORDER if recipe in TRAINING else {}


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """Gives the folder with a run of a recipe in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return cache(lambda recipe: run(recipe, place, folder / recipe, **in_order(recipe)))


@pytest.fixture(scope="module")
def in_two(place, tmp_path_factory, fork_server):
    """Gives the folder with a run of each recipe over two processes that were started so."""
    folder = tmp_path_factory.mktemp("in_two")

    def told(recipe: str, name: str) -> dict:
        own = {"per_device_train_batch_size": 1} if recipe in TRAINING else {}
        own |= {"output_dir": str(folder / name), **in_order(recipe)}
        return options_of(recipe, place, **own)

    @cache
    def start(how: str) -> Path:
        runs = {name: [name, told(name, f"{how}/{name}"), {}] for name in RECIPES}
        if how == "notebook":
            runs["fsdp2"] = ["lora_sft", told("lora_sft", "notebook/fsdp2"), FSDP2]
        launched = fork_server.from_python(how, folder / f"{how}.json", runs)
        assert launched.code == 0, launched.errors[-5000:]
        return folder / how

    return start


@pytest.mark.slow
@pytest.mark.parametrize("how", ["notebook", "spawn"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_started_from_python_train_what_one_does(how, recipe, alone, in_two):
    assert_equal(in_two(how) / recipe, alone(recipe), recipe in TRAINING)


def test_fsdp_is_asked_for_by_the_variables_that_accelerate_launch_sets(alone, in_two):
    metrics = assert_equal(in_two("notebook") / "fsdp2", alone("lora_sft"), trained=True)
    assert metrics["distributed_type"] == "FSDP"


def assert_equal(ours: Path, alone: Path, trained: bool) -> dict:
    """Two processes did what one does; gives their metrics."""
    metrics, expected = (read_json(folder / "metrics.json") for folder in (ours, alone))
    assert metrics["world_size"] == 2
    assert metrics["score"] == pytest.approx(expected["score"], abs=1e-4)
    if trained:
        assert losses(ours) == pytest.approx(losses(alone), abs=1e-4)
    return metrics


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_that_of_the_command_line(recipe, alone, place, tmp_path, monkeypatch):
    ours, folder = alone(recipe), str(tmp_path / "script")
    options = options_of(recipe, place, output_dir=folder, **in_order(recipe))
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", *command_line(options)])
    runpy.run_path(str(SCRIPTS / f"{recipe}.py"), run_name="__main__")
    theirs = tmp_path / "script"
    assert read_jsonl(ours / "predictions.jsonl") == read_jsonl(theirs / "predictions.jsonl")
    if recipe in TRAINING:
        assert losses(ours) == losses(theirs)
        assert len(losses(ours)) == 2
