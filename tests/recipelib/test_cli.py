"""Every recipe's --help is fast and complete, and every mistake in its arguments is one line."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipelib.cli import RecipeArguments, option, parse_arguments, run_recipe
from recipelib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [  # not consolidate.py, which trains nothing
    one for one in sorted((ROOT / "recipes").glob("*.py")) if "run_recipe(" in one.read_text()
]
COMMON = {one.name for one in dataclasses.fields(RecipeArguments)}


@dataclass
class Arguments(RecipeArguments):
    r: int = option(16, "Rank; 10 % of the width is a lot.")
    ratio: float | None = option(None, "How much faster.")
    layers: list[str] = option(["all-linear"], "Layers to adapt.")
    merge: bool = option(False, "Also merge.")


DEFAULTS = {"output_dir": "runs/here", "learning_rate": 5e-4, "lr_scheduler_type": "cosine"}


def parse(*argv: str):
    return parse_arguments(Arguments, "What it does.", DEFAULTS, argv)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes config.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write


def the_line(*argv: str) -> str:
    """The one line that the arguments end in."""
    with pytest.raises(UserError) as error:
        parse(*argv)
    line = str(error.value)
    assert line.strip()
    assert "\n" not in line
    return line


def arguments_of(recipe: Path) -> type:
    module = importlib.import_module(recipe.stem)
    (found,) = (
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, RecipeArguments) and one is not RecipeArguments
    )
    return found


# --help


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda one: one.stem)
def test_help_answers_at_once_and_lists_every_argument_with_its_default(recipe):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", recipe, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert seconds < 2.5
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "trl", "peft", "numpy"}
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    listed = dict(re.findall(r"^  --(\w+)\s(.*?)(?=^  --|^$|\Z)", done.stdout, re.M | re.S))
    own = arguments_of(recipe)()
    for one in dataclasses.fields(own):
        value = one.default  # not the instance's, which may depend on others
        if value is dataclasses.MISSING:
            value = one.default_factory()
        shown = " ".join(value) if isinstance(value, list) else value
        text = " ".join(listed[one.name].split())
        assert text.endswith(f"[{shown}]") == (shown not in ("", None) and shown is not False)
    assert own.__doc__
    assert {"output_dir", "learning_rate"} <= listed.keys() or "eval" in recipe.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda one: one.stem)
def test_no_argument_of_a_recipe_is_the_trainers_too(recipe):
    from recipelib.training.config import RecipeConfig

    names = {one.name for one in dataclasses.fields(arguments_of(recipe))}
    assert names >= COMMON
    assert not names & {one.name for one in dataclasses.fields(RecipeConfig)}


def test_help_explains_before_it_lists(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--r", "nonsense", "--help")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.index("What it does.") < out.index("--r ") < out.index("--template")
    assert "10 % of the width" in out


def test_help_all_adds_the_trainers_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help_all")
    assert end.value.code == 0
    out = capsys.readouterr().out
    for shown in ("--r R", "10 % of the width", "--template", "--weight_decay", "--max_length"):
        assert shown in out


# What is taken


def test_without_arguments_the_defaults_hold():
    arguments, training = parse()
    assert arguments == Arguments()
    assert training.output_dir == "runs/here"
    assert training.learning_rate == 5e-4
    assert training.lr_scheduler_type == "cosine"


def test_flags_stand_alone_or_with_a_value_and_the_last_word_holds():
    assert parse("--merge")[0].merge is True
    assert parse("--merge", "false", "--skip_bad_rows", "--r", "4")[0].merge is False
    arguments, training = parse("--r", "4", "--r=8", "--layers", "a", "b", "--learning-rate", "3")
    assert (arguments.r, arguments.layers, training.learning_rate) == (8, ["a", "b"], 3.0)


def test_yaml_sets_and_the_command_line_wins(config):
    file = config(
        "learning_rate: 1e-4\nr: 8\nratio: 16\nlayers: [q_proj, 1]\nmerge: true\n"
        "max_train_samples: null\nchat_template_kwargs: {enable_thinking: false}\n"
        "save_strategy: 'no'\nwarmup_steps: 10\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    for argv in (["--config", file], [f"--config={file}"], ["--r", "4", "--config", file]):
        arguments, training = parse(*argv)
        assert arguments.r == (4 if "--r" in argv else 8)
        assert type(training.learning_rate) is float
        assert training.learning_rate == 1e-4
        assert type(arguments.ratio) is float
        assert arguments.layers == ["q_proj", "1"]
        assert arguments.merge is True
        assert arguments.max_train_samples is None
        assert arguments.chat_template_kwargs == {"enable_thinking": False}
        assert training.save_strategy == "no"
        assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    arguments, _ = parse("--config", file, "--merge", "false", "--layers", "x", "--r", "1")
    assert (arguments.merge, arguments.layers, arguments.r) == (False, ["x"], 1)


def test_a_second_config_overrides_the_first(config):
    first, second = config("r: 1\nratio: 1"), config("r: 2", "second.yaml")
    arguments, _ = parse("--config", first, "--config", second)
    assert (arguments.r, arguments.ratio) == (2, 1.0)


def test_a_lone_word_in_yaml_is_a_list_of_one_where_a_list_is_due(config):
    assert parse("--config", config("layers: q_proj"))[0].layers == ["q_proj"]
    assert parse("--config", config("columns: []"))[0].columns == []


@settings(max_examples=15)
@given(
    rate=st.floats(1e-12, 1e6),
    r=st.integers(1, 10**6),
    merge=st.booleans(),
    name=st.text(st.characters(categories=["L", "N", "P", "S"], max_codepoint=0x24F), min_size=1),
)
def test_yaml_and_the_command_line_mean_the_same(rate, r, merge, name, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    quoted = "'" + name.replace("'", "''") + "'"
    lines = f"learning_rate: {rate!r}\nr: {r}\nmerge: {merge}\ntemplate: {quoted}\n"
    file.write_text(lines, encoding="utf-8")
    in_yaml, yaml_training = parse("--config", str(file))
    given, training = parse(
        *("--learning_rate", repr(rate), "--r", str(r), "--merge", str(merge)), f"--template={name}"
    )
    assert in_yaml == given
    assert yaml_training.learning_rate == training.learning_rate == rate
    assert in_yaml.template == name


# What is refused, in one line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learn", "1"], "command line: unknown argument --learn; did you mean --learning_rate?"),
        (["--learning_rat=1"], "unknown argument --learning_rat=1; did you mean --learning_rate?"),
        (["--max-lenght", "1"], "did you mean --max_length?"),
        (["--zzz"], "unknown argument --zzz; see --help"),
        (["stray"], "unknown argument stray"),
        (["--"], "unknown argument --; see --help"),
        (["--r"], "--r: expected one argument"),
        (["--r", "4.5"], "--r: invalid int value: '4.5'"),
        (["--ratio", "high"], "--ratio: invalid float value: 'high'"),
        (["--merge", "maybe"], "--merge: Truthy value expected: got maybe"),
        (["--rendering", "html"], "--rendering: invalid choice: 'html' (choose from 'text', 'ch"),
        (["--config"], "command line: --config needs a file"),
        (["--config", "missing.yaml"], "missing.yaml: No such file"),
        (["--config=missing.yaml"], "missing.yaml: No such file"),
        (["--chat_template_kwargs", "{a: 1}"], "--chat_template_kwargs: no JSON"),
        (["--chat_template_kwargs", "[1]"], "--chat_template_kwargs: JSON, but no object"),
        (["--chat_template_kwargs", "[" * 100_000], "--chat_template_kwargs: no JSON"),
        (["--max_train_samples", "0"], "--max_train_samples 0: must be 1 or more"),
        (["--max_train_samples", "-2"], "--max_train_samples -2: must be 1 or more"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0: must be 1 or more"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be 1 or more"),
        (["--eval_batch_tokens", "0"], "--eval_batch_tokens 0: must be 1 or more"),
        (["--preview", "-1"], "--preview -1: must be 0 or more"),
        (["--lr_scheduler_type", "bend"], "invalid choice: 'bend'"),
        (["--lr_scheduler_kwargs", "{a"], "arguments: "),
        (["--load_best_model_at_end", "true"], "the save and eval strategy to match"),
        (["--accelerator_config", "missing.json"], "missing.json"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, said):
    line = the_line(*argv)
    assert said in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "learning_rat: unknown key; did you mean learning_rate?"),
        ("learning-rate: 1", "learning-rate: unknown key; did you mean learning_rate?"),
        ("config: other.yaml", "config: unknown key; see --help"),
        ("env: {A: 1}", "env: unknown key"),
        ("r: 1\nr: 2", "line 2: the key 'r' stands twice"),
        ("0: 1", "line 1: the key 0"),
        ("- r", "holds no keys"),
        ("", "holds no keys"),
        ("r: [1", "line 1: "),
        ("r: sixteen", "r: invalid int value: 'sixteen'"),
        ("r: 4.5", "r: invalid int value: '4.5'"),
        ("r: true", "r: invalid int value: 'True'"),
        ("r: [1]", "r: cannot be a list"),
        ("r: {a: 1}", "r: cannot be keys and values"),
        ("r: null", "r: cannot be null"),
        ("ratio: [1.0, 2.0]", "ratio: cannot be a list"),
        ("learning_rate: {a: 1}", "learning_rate: cannot be keys and values"),
        ("learning_rate: fast", "learning_rate: invalid float value: 'fast'"),
        ("merge: maybe", "merge: Truthy value expected: got maybe"),
        ("merge: null", "merge: cannot be null"),
        ("layers: {a: 1}", "layers: cannot be keys and values"),
        ("template: [a]", "template: cannot be a list"),
        ("rendering: html", "rendering: invalid choice: 'html'"),
        ("save_strategy: no", "save_strategy: invalid choice: 'False' (choose from 'no', 'steps'"),
        ("save_strategy: no", "; put a word such as no into quotes"),
        ("lr_scheduler_type: bend", "lr_scheduler_type: invalid choice: 'bend'"),
    ],
)
def test_a_mistake_in_yaml_is_one_line_that_names_the_file_and_the_key(text, said, config):
    line = the_line("--config", config(text))
    assert line.startswith("config.yaml: ")
    assert said in line


def test_a_value_that_yaml_lets_pass_is_checked_like_the_command_lines(config):
    assert the_line("--config", config("preview: -1")) == the_line("--preview", "-1")
    assert the_line("--config", config("chat_template_kwargs: '[]'")).startswith("--chat_template")


# How a run ends


def end_of(argv, main, monkeypatch, capsys) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["recipe.py", *argv])
    with pytest.raises(SystemExit) as end:
        run_recipe(main, Arguments, "What it does.", DEFAULTS)
    out, err = capsys.readouterr()
    assert out == ""
    return end.value.code, err


def test_a_users_mistake_ends_in_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(arguments, training):
        raise UserError(f"rows.jsonl:{arguments.r}: no text; write some")

    code, err = end_of(["--r", "7"], main, monkeypatch, capsys)
    assert (code, err) == (2, "error: rows.jsonl:7: no text; write some\n")
    code, err = end_of(["--r", "x"], main, monkeypatch, capsys)
    assert (code, err.count("\n")) == (2, 1)


def test_another_process_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    code, err = end_of(["--r", "x"], None, monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error (process 1): command line: ")


def test_an_interrupt_ends_in_one_line_and_exit_code_130(monkeypatch, capsys):
    def main(arguments, training):
        raise KeyboardInterrupt

    code, err = end_of([], main, monkeypatch, capsys)
    assert (code, err.count("\n")) == (130, 1)
    assert "--resume_from_checkpoint last" in err


def test_a_run_that_went_well_ends_what_its_processes_spoke_through(monkeypatch):
    def main(arguments, training):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    run_recipe(main, Arguments, "What it does.", DEFAULTS)
    assert not torch.distributed.is_initialized()


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(arguments, training):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(ZeroDivisionError):
        run_recipe(main, Arguments, "What it does.", DEFAULTS)


def test_a_recipe_run_as_a_script_ends_so_too():
    done = subprocess.run(
        [sys.executable, RECIPES[0], "--template_", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: command line: unknown argument --template_; did you mean --template?"
    )
