"""Every recipe's --help is fast and complete, and every mistake in its arguments is one line."""

import dataclasses
import importlib.util
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipelib.cli import RecipeArguments, arguments, option, parse_arguments, run_recipe
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
    plain: bool = option(False, "Plainly.")
    dropout: float = option(0.0, "A share.", least=0, below=1)
    tune: str = option("head", "What is trained.", choices=["head", "body"])


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
    return importlib.import_module(recipe.stem).main.__annotations__["args"]


# --help


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda one: one.stem)
def test_help_answers_at_once_and_lists_every_argument_with_its_default(recipe):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", recipe, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime - before.ru_utime < 1.5  # of the processor, however busy it is
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "trl", "peft", "numpy"}
    assert not imported & {"huggingface_hub", "filelock", "rich"}
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
    assert listed.keys() >= importlib.import_module(recipe.stem).DEFAULTS.keys()


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
    args, training = parse()
    assert args == Arguments()
    assert training.output_dir == "runs/here"
    assert training.learning_rate == 5e-4
    assert training.lr_scheduler_type == "cosine"


def test_flags_stand_alone_or_with_a_value_and_the_last_word_holds():
    assert parse("--plain")[0].plain is True
    assert parse("--plain", "false", "--skip_bad_rows", "--r", "4")[0].plain is False
    args, training = parse("--r", "4", "--r=8", "--layers", "a", "b", "--learning-rate", "3")
    assert (args.r, args.layers, training.learning_rate) == (8, ["a", "b"], 3.0)


def test_yaml_sets_and_the_command_line_wins(config):
    file = config(
        "learning_rate: 1e-4\nr: 8\nratio: 16\nlayers: [q_proj, 1]\nplain: true\n"
        "max_train_samples: null\nchat_template_kwargs: {enable_thinking: false}\n"
        "save_strategy: 'no'\nwarmup_steps: 10\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    for argv in (["--config", file], [f"--config={file}"], ["--r", "4", "--config", file]):
        args, training = parse(*argv)
        assert args.r == (4 if "--r" in argv else 8)
        assert type(training.learning_rate) is float
        assert training.learning_rate == 1e-4
        assert type(args.ratio) is float
        assert args.layers == ["q_proj", "1"]
        assert args.plain is True
        assert args.max_train_samples is None
        assert args.chat_template_kwargs == {"enable_thinking": False}
        assert training.save_strategy == "no"
        assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    args, _ = parse("--config", file, "--plain", "false", "--layers", "x", "--r", "1")
    assert (args.plain, args.layers, args.r) == (False, ["x"], 1)


def test_a_second_config_overrides_the_first(config):
    first, second = config("r: 1\nratio: 1"), config("r: 2", "second.yaml")
    args, _ = parse("--config", first, "--config", second)
    assert (args.r, args.ratio) == (2, 1.0)


def test_a_lone_word_in_yaml_is_a_list_of_one_where_a_list_is_due(config):
    assert parse("--config", config("layers: q_proj"))[0].layers == ["q_proj"]
    assert parse("--config", config("columns: []"))[0].columns == []


@settings(max_examples=15)
@given(
    rate=st.floats(1e-12, 1e6),
    r=st.integers(1, 10**6),
    plain=st.booleans(),
    name=st.text(st.characters(categories=["L", "N", "P", "S"], max_codepoint=0x24F), min_size=1),
)
def test_yaml_and_the_command_line_mean_the_same(rate, r, plain, name, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    quoted = "'" + name.replace("'", "''") + "'"
    lines = f"learning_rate: {rate!r}\nr: {r}\nplain: {plain}\ntemplate: {quoted}\n"
    file.write_text(lines, encoding="utf-8")
    in_yaml, yaml_training = parse("--config", str(file))
    given, training = parse(
        *("--learning_rate", repr(rate), "--r", str(r), "--plain", str(plain)), f"--template={name}"
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
        (["--plain", "maybe"], "--plain: Truthy value expected: got maybe"),
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
        (["--dropout", "-0.1"], "--dropout -0.1: must be 0 or more"),
        (["--dropout", "1"], "--dropout 1.0: must be below 1"),
        (["--dropout", "nan"], "--dropout nan: must be 0 or more"),
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
        ("plain: maybe", "plain: Truthy value expected: got maybe"),
        ("plain: null", "plain: cannot be null"),
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
    assert the_line("--config", config("dropout: 1")) == the_line("--dropout", "1")
    assert the_line("--config", config("chat_template_kwargs: '[]'")).startswith("--chat_template")


# Limits


def test_a_number_within_its_limits_is_taken_and_none_is_no_number():
    for dropout in ("0", "0.999"):
        assert parse("--dropout", dropout)[0].dropout == float(dropout)
    assert Arguments(max_train_samples=None).max_train_samples is None
    assert Arguments(max_train_samples=1).max_train_samples == 1
    assert Arguments(max_train_samples=-1).max_train_samples is None  # all of them
    for wrong in ({"dropout": 1.0}, {"dropout": -1e-9}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=f"^--{next(iter(wrong))} .*: must be "):
            Arguments(**wrong)


# What has moved


@dataclass
class Elsewhere(RecipeArguments):
    """Of a recipe that has no --tune."""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--merge", "--merge: has moved; run 'python recipes/merge.py OUTPUT_DIR' afterwards"),
        ("--merge true", "--merge: has moved; run 'python"),
        ("--merge=true", "--merge: has moved; run 'python"),
        ("--r 4 --merge", "--merge: has moved; run 'python"),
        ("--search_label_words", "--search_label_words: has moved; run recipes/search_label_"),
        ("--search-label-words=true", "--search_label_words: has moved; run recipes/search_"),
        ("--tune model", "--tune model: has moved; run recipes/cloze_sft.py"),
        ("--tune=model", "--tune model: has moved; run recipes/cloze_sft.py"),
        ("--tune both", "--tune both: has moved; run recipes/cloze_sft.py --soft_prompt true"),
        ("--tune none --r 4", "--tune none: has moved; run recipes/cloze_sft.py --score_only true"),
    ],
)
def test_an_option_that_has_moved_names_its_new_place(argv, said):
    line = the_line(*argv.split())
    assert line.startswith(said)
    assert "\n" not in line


def test_what_has_not_moved_is_taken_or_unknown():
    assert parse("--tune", "body")[0].tune == "body"
    assert "--tune: invalid choice: 'modell'" in the_line("--tune", "modell")
    with pytest.raises(UserError, match="unknown argument --tune; see --help"):
        parse_arguments(Elsewhere, "", DEFAULTS, ["--tune", "model"])


def test_in_yaml_and_from_python_what_has_moved_is_said_too(config):
    line = the_line("--config", config("tune: model"))
    assert line == "config.yaml: tune model: has moved; run recipes/cloze_sft.py"
    assert the_line("--config", config("merge: true")).startswith("config.yaml: merge: has moved")
    with pytest.raises(UserError, match=r"^arguments: merge: has moved; run 'python recipes/merge"):
        arguments(importlib.import_module("lora_sft"), merge=True)


# From Python


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_from_python_the_defaults_of_the_command_line_hold(recipe, monkeypatch):
    module = importlib.import_module(recipe.stem)
    command = partial(parse_arguments, arguments_of(recipe), module.__doc__, module.DEFAULTS)
    for options, argv in (
        ({}, []),
        ({"template": "sst2", "seed": 10}, ["--template", "sst2", "--seed", "10"]),
    ):
        found, wanted = arguments(module, **options), command(argv)
        assert found[0] == wanted[0]
        assert found[1].to_dict() == wanted[1].to_dict()
    for name, value in module.DEFAULTS.items():
        assert getattr(found[1], name) == value


def test_the_command_line_of_the_python_that_calls_is_not_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--r", "4", "--unknown"])
    assert arguments(importlib.import_module("lora_sft"))[0].r == 16


@pytest.mark.parametrize("head", ["", "from __future__ import annotations\n"])
def test_a_copy_of_a_recipe_has_the_copys_own_defaults(head, tmp_path):
    text = (ROOT / "recipes" / "lora_sft.py").read_text()
    place = text.index('"""\n', 3) + 4
    changed = text[:place] + head + text[place:]
    changed = changed.replace("r: int = option(16,", "r: int = option(7,")
    changed = changed.replace('"output_dir": "runs/lora_sft"', '"output_dir": "runs/mine"')
    (tmp_path / "my_sft.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("my_sft", tmp_path / "my_sft.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["my_sft"] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        args, training = arguments(module, lora_dropout=0.1)
    finally:
        del sys.modules["my_sft"]
    assert (args.r, args.lora_dropout, training.output_dir) == (7, 0.1, "runs/mine")
    assert type(args).__module__ == "my_sft"


def test_values_of_every_kind_are_taken_as_they_are_in_python():
    lora_sft = importlib.import_module("lora_sft")
    args, training = arguments(
        lora_sft,
        dora=True,
        target_modules=["q_proj", "v_proj"],
        columns=("text=review",),
        loraplus_ratio=16,
        max_train_samples=None,
        chat_template_kwargs={"enable_thinking": False},
        dataset=Path("rows.jsonl"),
        lr_scheduler_kwargs={"num_cycles": 2},
        bf16=False,
        eval_strategy="epoch",
    )
    assert args.dora is True
    assert args.target_modules == ["q_proj", "v_proj"]
    assert args.columns == ["text=review"]
    assert args.loraplus_ratio == 16.0
    assert args.max_train_samples is None
    assert args.chat_template_kwargs == {"enable_thinking": False}
    assert args.dataset == "rows.jsonl"
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.bf16 is False
    assert training.eval_strategy == "epoch"
    assert arguments(lora_sft, target_modules="q_proj", columns=[])[0].target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rat": 1}, "arguments: learning_rat: unknown key; did you mean learning_rate?"),
        ({"r": "many"}, "arguments: r: invalid int value: 'many'"),
        ({"r": None}, "arguments: r: cannot be null"),
        ({"r": [1]}, "arguments: r: cannot be a list"),
        ({"r": {"a": 1}}, "arguments: r: cannot be keys and values"),
        ({"r": 0}, "--r 0: must be 1 or more"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0: must be below 1"),
        ({"rendering": "html"}, "arguments: rendering: invalid choice: 'html'"),
        ({"pissa": True, "load_in_4bit": True}, "--pissa: starts from the full weights"),
        ({"max_length": 0}, "--max_length 0: must be 1 or more"),
    ],
)
def test_a_mistake_in_python_is_one_users_error(options, said):
    with pytest.raises(UserError) as error:
        arguments(importlib.import_module("lora_sft"), **options)
    line = str(error.value)
    assert line.startswith(said)
    assert "\n" not in line


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
    done = subprocess.run([sys.executable, RECIPES[0], "--merge"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr == (
        "error: --merge: has moved; run 'python recipes/merge.py OUTPUT_DIR' afterwards\n"
    )
