"""What the documentation says is so: its commands parse, its links lead somewhere, its templates
load and its code runs.
"""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import lora_sft
import pytest
import yaml
from peft import PeftModel
from run_files import read_json, read_jsonl
from test_rooms import ROOMS, SCRIPTS
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.cli import parse_arguments
from recipelib.prompts import sandbox, schema
from recipelib.prompts.template import PromptTemplate

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "README.md",
    "CONTRIBUTING.md",
    "recipes/README.md",
    "data_templates/README.md",
    "accelerate_configs/README.md",
    "benchmarks/README.md",
]
DOCS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, RECIPES = DOCS["README.md"], DOCS["recipes/README.md"]
TEMPLATES = DOCS["data_templates/README.md"]
every_document = pytest.mark.parametrize("document", NAMES)


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def block_with(language: str, text: str, part: str) -> str:
    (block,) = [block for block in blocks(language, text) if part in block]
    return block


def prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def table(text: str, head: str) -> list[list[str]]:
    """The rows of the table whose first line begins so, as cells."""
    lines = text[text.index(f"\n{head}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# Commands


def commands(text: str) -> list[list[str]]:
    """The words of every command, in blocks and in lines, that runs a recipe, tool or benchmark."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    lines += [code for code in in_code(prose(text)) if re.search(r"\.py [-\w]", code)]
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in parts if words and words[0] != "cp" and script_of(words)]


def script_of(words: list[str]) -> str | None:
    """The recipe, tool or benchmark that a command runs, from the repository's root."""
    scripts = [f"recipes/{word}" if "/" not in word else word for word in words]
    known = (script for script in scripts if script.endswith(".py") and (ROOT / script).is_file())
    return next(known, None)


def arguments_of(words: list[str]) -> list[str]:
    """What a command tells its script; with a number for a seed that the text leaves open."""
    script = Path(script_of(words)).name
    place = next(n for n, word in enumerate(words) if Path(word).name == script)
    return [re.sub(r"^SEED$", "0", word) for word in words[place + 1 :]]


ALL_COMMANDS = [
    pytest.param(words, id=f"{name}: {' '.join(words)}")
    for name, text in DOCS.items()
    for words in {tuple(words): words for words in commands(text)}.values()
]


@pytest.mark.parametrize("document", [name for name in NAMES if name != "CONTRIBUTING.md"])
def test_a_document_has_commands_to_check(document):
    assert commands(DOCS[document])


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_every_command_is_one_that_its_script_takes(words, tmp_path, monkeypatch):
    (tmp_path / "my_run.yaml").write_text(block_with("yaml", RECIPES, "learning_rate"))
    script, argv = script_of(words), arguments_of(words)
    monkeypatch.chdir(tmp_path)
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    if script.startswith("benchmarks/"):
        files = (ROOT / script, ROOT / "benchmarks" / "measuring.py")  # which has what many share
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        assert [word for word in argv if word.startswith("--") and word not in source] == []
        return
    recipe = importlib.import_module(Path(script).stem)
    if not hasattr(recipe, "DEFAULTS"):
        assert parsed_by(recipe, argv, monkeypatch)
    elif "--help" not in argv:
        kind = recipe.main.__annotations__["args"]
        assert parse_arguments(kind, "", recipe.DEFAULTS, argv)


class Parsed(Exception):
    """Ends a tool where it has read its command line."""


def parsed_by(tool, argv: list[str], monkeypatch) -> argparse.Namespace:
    """What argparse makes of a tool's command line; the tool does nothing with it."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, given):
        raise Parsed(parse(parser, given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        tool.main(argv)
    return parsed.value.args[0]


# What is named, and where


def sections(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@every_document
def test_every_link_leads_to_a_file_and_a_section(document):
    links = re.findall(r"\]\(([^)\s]+)\)", DOCS[document])
    assert links
    for link in links:
        if link.startswith("http"):
            continue
        name, _, section = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        if section:
            assert section in sections(target.read_text(encoding="utf-8")), link


@cache
def files_of_ours() -> list[str]:
    folders = ["recipes", "tests", "benchmarks", "data_templates", "accelerate_configs"]
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    return [f"/{file.relative_to(ROOT).as_posix()}" for file in found]


@every_document
def test_every_script_that_is_named_is_there(document):
    # The copy of a file of ours, and a place holder.
    known = ("peft_bottleneck.py", "tests/test_NAME.py", "bottleneck.py")
    named = [code for code in in_code(prose(DOCS[document])) if re.fullmatch(r"[\w./]+\.py", code)]
    for name in named:
        assert name in known or any(file.endswith(f"/{name}") for file in files_of_ours()), name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_every_recipe_and_tool_is_in_both_tables(script):
    assert f"`recipes/{script}`" in README
    rows = [cells for cells in table(RECIPES, "| file |") if f"[`{script}`]" in cells[0]]
    assert len(rows) == 1
    defaults = getattr(importlib.import_module(script.removesuffix(".py")), "DEFAULTS", None)
    assert defaults is None or rows[0][-1] == f"`{defaults['output_dir']}/`"


def test_the_rooms_stand_in_their_order():
    rows = table(RECIPES, "| room |")
    assert [room.strip("`") for room, *_ in rows] == ROOMS
    for room, _, first in rows:
        folder = ROOT / "recipes" / "recipelib" / room.strip("`")
        folder = folder if folder.is_dir() else folder.parent
        assert (folder / first.strip("`")).is_file()


def test_a_row_s_way_to_the_loss_is_as_described():
    way = RECIPES[RECIPES.index("To follow one row") :].split("\n\n")[0]
    named = re.findall(r"`(\w+)`\s+(?:is\s+)?(?:in\s+|\()`([\w/]+\.py)`", way)
    assert len(named) == 5
    for name, file in named:
        assert f"def {name}(" in (ROOT / "recipes" / "recipelib" / file).read_text(), name


@pytest.mark.parametrize(
    ("document", "head", "pattern"),
    [
        ("data_templates/README.md", "| template |", "data_templates/*.yaml"),
        ("accelerate_configs/README.md", "| config |", "accelerate_configs/*.yaml"),
        ("README.md", "| config |", "accelerate_configs/*.yaml"),
    ],
)
def test_a_table_has_every_file_of_its_folder(document, head, pattern):
    named = [name for cells in table(DOCS[document], head) for name in in_code(cells[0])]
    files = [file.stem for file in ROOT.glob(pattern)]
    assert sorted(name.removesuffix(".yaml") for name in named) == sorted(files)


def test_every_benchmark_and_figure_has_its_place():
    text = DOCS["benchmarks/README.md"]
    for file in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{file.name}`" in text
    for file in (ROOT / "benchmarks").glob("*.png"):
        assert f"]({file.name})" in text


# Templates

ALL_TEMPLATES = [
    pytest.param(block, id=f"{name}: {block.split()[1]}")
    for name, text in DOCS.items()
    for block in blocks("yaml", text)
    if "\nform: " in block
]


@pytest.mark.parametrize("block", ALL_TEMPLATES)
def test_every_template_shown_is_one(block, tmp_path):
    assert PromptTemplate(yaml.safe_load(block), tmp_path / "shown.yaml")


def test_the_template_of_the_readme_asks_what_it_seems_to(tmp_path):
    (text,) = blocks("yaml", README)
    template = PromptTemplate(yaml.safe_load(text), tmp_path / "readme.yaml")
    (question,) = template.questions({"sentence": "Not a dull moment.", "stars": 1})
    assert template.prompt(question).endswith("The sentiment of the review is")
    assert question.answer == " positive"


def test_every_field_of_a_template_is_explained_and_no_other():
    rows = table(TEMPLATES, "| field |")
    assert sorted(name for cells in rows for name in in_code(cells[0])) == sorted(schema.KINDS)
    meaning = {name: cells[1] for cells in rows for name in in_code(cells[0])}
    for field, parts in schema._INNER.items():
        assert {part for part in parts if f"`{part}`" not in meaning[field]} == set(), field


def test_every_metric_and_filter_is_named():
    metrics = [name for cells in table(TEMPLATES, "| metric |") for name in in_code(cells[0])]
    assert sorted(metrics) == sorted(schema.METRICS)
    filters = in_code(re.search(r"Filters: (.*?)\. ", TEMPLATES, re.DOTALL)[1])
    assert {*filters} == {*sandbox.ENVIRONMENT.filters} - {"limited"}


# Code that runs


def test_from_python_the_readme_s_lines_have_the_command_line_s_defaults(monkeypatch, tmp_path):
    (code,) = blocks("python", README)
    monkeypatch.chdir(tmp_path)
    given = []

    def main(args: lora_sft.LoraArguments, training):
        given.extend([args, training])

    monkeypatch.setattr(lora_sft, "main", main)
    exec(code, {})
    args, training = given
    assert (args.template, training.max_steps) == ("sst2", 10)
    assert training.learning_rate == lora_sft.DEFAULTS["learning_rate"]


def run(words: list[str], *more: str, monkeypatch) -> None:
    """A command, in this process; a mistake would end it with SystemExit."""
    script = str(ROOT / script_of(words))
    monkeypatch.setattr(sys, "argv", [script, *arguments_of(words), *more])
    runpy.run_path(script, run_name="__main__")


def test_a_task_of_ones_own_goes_as_the_steps_say(tmp_path, monkeypatch, capsys):
    (rows,) = blocks("csv", RECIPES)
    (tmp_path / "tickets.csv").write_text(rows)
    (tmp_path / "tickets.yaml").write_text(block_with("yaml", RECIPES, "name: tickets"))
    (tmp_path / "new.csv").write_text("message\nThe lid is broken\n")
    monkeypatch.chdir(tmp_path)
    own = ["--max_length", "300", "--disable_tqdm", "true"]
    model = ["--model_name_or_path", str(save_tiny_llama(tmp_path / "model"))]
    steps = block_with("bash", RECIPES, "--template tickets.yaml").splitlines()
    for words in map(shlex.split, steps):
        run(words, *own, *(() if "--predict" in words else model), monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert "The customer has a problem with the" in said
    assert "' shipping'" in said
    found = "runs/label_words/template.yaml"
    assert found in RECIPES
    words = PromptTemplate.load(found).verbalizer
    assert set(words) == {"billing", "technical", "delivery"}
    scored = ["cloze_sft.py", "--template", found, "--score_only", "true"]
    run(scored, *own, *model, "--output_dir", "runs/searched", monkeypatch=monkeypatch)
    assert read_json(tmp_path / "runs/zero/metrics.json")["trainable_parameters"] == 0
    assert read_json(tmp_path / "runs/tickets/metrics.json")["train_rows"] == 11
    (answer,) = read_jsonl(tmp_path / "runs/tickets/predictions_new.jsonl")
    assert answer["prediction"] in words

    written = {who: in_code(what) for who, what in table(RECIPES, "| who |")}
    trained = written["every training run"] + written["an adapter or a prompt"]
    for name in [name for name in trained if "." in name and "(" not in name]:
        name = name.rpartition("PeftModel.")[2]
        assert name == "from_pretrained" or (tmp_path / "runs/tickets" / name).is_file(), name
    only_scored = {file.name for file in (tmp_path / "runs/zero").iterdir()}
    assert only_scored == {*written["`cloze_sft.py --score_only true`"]}


def test_adapters_in_ones_own_code_are_made_as_shown(tmp_path, monkeypatch):
    folder = save_tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    shutil.copy(
        ROOT / "recipes" / "recipelib" / "adapters" / "bottleneck.py",
        tmp_path / "peft_bottleneck.py",
    )
    monkeypatch.syspath_prepend(tmp_path)
    code = block_with("python", RECIPES, "BottleneckConfig")
    model, base = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    names = {"model": model, "base": base}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    variants = re.findall(r"`((?:placement|layers_to_transform)=[^`]*)`", RECIPES)
    assert len(variants) == 3
    for variant in variants:
        assert eval(f"BottleneckConfig({variant})", names)
