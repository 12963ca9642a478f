"""What the README says is so: its commands parse, its files are there, its template loads."""

import re
import shlex
import shutil
from pathlib import Path

import adapter_sft
import cot_sft
import icl_eval
import instruction_sft
import lora_sft
import prompt_tuning
import pytest
import yaml
from peft import PeftModel
from run_files import read_json, read_jsonl
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.cli import parse_arguments
from recipelib.prompts.schema import KINDS
from recipelib.prompts.template import PromptTemplate

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = {
    "recipes/adapter_sft.py": (adapter_sft, adapter_sft.AdapterArguments),
    "recipes/lora_sft.py": (lora_sft, lora_sft.LoraArguments),
    "recipes/icl_eval.py": (icl_eval, icl_eval.IclArguments),
    "recipes/instruction_sft.py": (instruction_sft, instruction_sft.InstructionArguments),
    "recipes/cot_sft.py": (cot_sft, cot_sft.CotArguments),
    "recipes/prompt_tuning.py": (prompt_tuning, prompt_tuning.PromptArguments),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def recipe_commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(accelerate launch [^`]*)`", README)
    words = (shlex.split(line, comments=True) for line in lines)
    return [one for one in words if any(word.startswith("recipes/") for word in one)]


def test_there_are_commands_to_check():
    assert len(recipe_commands()) >= 5


@pytest.mark.parametrize("command", recipe_commands(), ids=" ".join)
def test_every_command_is_one_that_the_recipe_takes(command, tmp_path, monkeypatch):
    (tmp_path / "my_run.yaml").write_text("learning_rate: 1e-4\n")
    monkeypatch.chdir(tmp_path)
    place = next(n for n, word in enumerate(command) if word.startswith("recipes/"))
    recipe, arguments = RECIPES[command[place]]
    argv = command[place + 1 :]
    if "--help" not in argv:
        # Seeds and folders that the text leaves open.
        argv = [re.sub(r"^(SEED|N)$", "0", word) for word in argv]
        assert parse_arguments(arguments, "", recipe.DEFAULTS, argv)


def test_every_recipe_is_in_the_table():
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert f"recipes/{recipe.name}" in README


def test_every_named_file_exists():
    named = re.findall(r"\]\(([^)#:]+)\)", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_template_shown_is_one(tmp_path):
    text = blocks("yaml")[0]
    template = PromptTemplate(yaml.safe_load(text), tmp_path / "readme.yaml")
    (question,) = template.questions({"sentence": "Not a dull moment.", "stars": 1})
    assert template.prompt(question).endswith("The sentiment of the review is")
    assert question.answer == " positive"


def test_a_task_of_ones_own_goes_as_the_steps_say(tmp_path, monkeypatch, capsys):
    (rows,) = blocks("csv")
    (tmp_path / "tickets.csv").write_text(rows)
    (template,) = [one for one in blocks("yaml") if one.startswith("name: tickets")]
    (tmp_path / "tickets.yaml").write_text(template)
    (tmp_path / "new.csv").write_text("message\nThe lid is broken\n")
    model = save_tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (steps,) = [one for one in blocks("bash") if "tickets.yaml" in one]
    for line in steps.splitlines():
        argv = shlex.split(line)[3:]
        if "--predict" not in argv:
            argv += ["--model_name_or_path", str(model)]
        argv += ["--max_length", "300", "--disable_tqdm", "true"]
        options = prompt_tuning.PromptArguments, "", prompt_tuning.DEFAULTS, argv
        prompt_tuning.main(*parse_arguments(*options))
    said = capsys.readouterr().out
    assert "The customer has a problem with the" in said
    assert "' shipping'" in said
    words = PromptTemplate.load("runs/words/template.yaml")
    assert set(words.verbalizer) == {"billing", "technical", "delivery"}
    assert read_json(tmp_path / "runs/zero/metrics.json")["trainable_parameters"] == 0
    assert read_json(tmp_path / "runs/tickets/metrics.json")["train_rows"] == 11
    (answer,) = read_jsonl(tmp_path / "runs/tickets/predictions_new.jsonl")
    assert answer["prediction"] in words.verbalizer


def test_adapters_in_ones_own_code_are_made_as_shown(tmp_path, monkeypatch):
    folder = save_tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    shutil.copy(
        ROOT / "recipes" / "recipelib" / "adapters" / "bottleneck.py",
        tmp_path / "peft_bottleneck.py",
    )
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = [one for one in blocks("python") if "BottleneckConfig" in one]
    model, base = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    names = {"model": model, "base": base}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    rows = re.findall(r"`((?:placement|layers_to_transform)=[^`]*)`", README)
    assert len(rows) == 3
    for row in rows:
        assert eval(f"BottleneckConfig({row})", names)


def test_every_field_of_a_template_is_explained_and_no_other():
    table = README.split("| field |")[1].split("\n\n")[0]
    explained = set(re.findall(r"`([a-z_]+)`", "\n".join(re.findall(r"^\|([^|]*)\|", table, re.M))))
    assert explained == set(KINDS)


def test_it_can_be_read_in_five_minutes():
    opened = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(opened.split()) < 1500
