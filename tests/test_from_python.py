"""From Python a recipe trains with exactly the settings of its command line."""

import dataclasses
import json
import runpy
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
from run_files import losses, read_jsonl

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
    return {name: str(value) for name, value in vars(arguments).items()}


@pytest.mark.parametrize("recipe", [*RECIPES, "search_label_words"])
@pytest.mark.parametrize("options", [{}, SOME], ids=["none", "some"])
def test_main_is_given_what_the_command_line_gives_it(recipe, options, monkeypatch):
    ours = cli.arguments(module_of(recipe), **options)
    theirs = of_the_script(recipe, options, monkeypatch)
    for one, other in zip(ours, theirs, strict=True):
        assert settings(one) == settings(other)
    for name, value in module_of(recipe).DEFAULTS.items():
        if name not in options:
            assert getattr(ours[1], name) == value


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_that_of_the_command_line(recipe, place, tmp_path, monkeypatch):
    ours = run(recipe, place, tmp_path / "python")
    options = options_of(recipe, place, output_dir=str(tmp_path / "script"))
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", *command_line(options)])
    runpy.run_path(str(SCRIPTS / f"{recipe}.py"), run_name="__main__")
    theirs = tmp_path / "script"
    assert read_jsonl(ours / "predictions.jsonl") == read_jsonl(theirs / "predictions.jsonl")
    if recipe in TRAINING:
        assert losses(ours) == losses(theirs)
        assert len(losses(ours)) == 2
