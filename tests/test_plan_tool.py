"""recipes/plan.py: the command line."""

import argparse
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import plan
import pytest
from tiny_llama import save_tiny_llama

from recipelib import planning

# What each option may be; on eight GPUs of 80 GiB with 64 rows.
OPTIONS = {
    "model_name_or_path": "8B",
    "gpus": "4",
    "gpus_per_node": "4",
    "gpu": "rtx4090",
    "memory_gib": "1",
    "tflops": "1",
    "link_gbs": "1",
    "network_gbs": "1",
    "length": "9",
    "batch": "9",
    "micro_batch": "2",
    "supervised": "0.1",
    "r": "2",
    "dtype": "float32",
    "optim": "sgd",
    "activation_checkpointing": None,
    "schedule": "gpipe",
    "utilization": "0.1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def refused(capsys, *words: str) -> str:
    """The one line that a command ends in."""
    with pytest.raises(SystemExit) as ended:
        plan.main([*words])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.fixture
def no_steps(monkeypatch) -> None:
    """Instead of fake steps, which take long and have tests of their own, some activations."""
    for module in ("recipelib.planning.memory", "recipelib.training.memory"):
        monkeypatch.setattr(f"{module}.step_peaks", lambda *args: [Counter(activations=2**20)])


def test_the_table_ends_with_the_answer(folder, no_steps, capsys):
    plan.main(["--model_name_or_path", str(folder), "--gpus", "2", "--length", "32"])
    shown = capsys.readouterr().out
    for word in ("2 x h100 (80 GiB), bfloat16, 64 rows of 32 tokens", "pipeline 2", "FSDP2"):
        assert word in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    last = shown.splitlines()[-1]
    assert last.startswith("fastest that fits: ")
    assert "LoRA by " in last
    assert "all parameters by " in last


def test_what_does_not_fit_is_said(folder, no_steps, capsys):
    plan.main(["--model_name_or_path", str(folder), "--gpus", "2", "--memory_gib", "0.0001"])
    shown = capsys.readouterr().out
    assert shown.count(" no ") == 8
    assert shown.splitlines()[-1].startswith("nothing fits into 0 GiB; the least is ")


def test_every_option_reaches_what_it_is_for(folder, monkeypatch, capsys):
    given = []

    def compare(config, work, gpu):
        given.append((config.num_hidden_layers, work, gpu))
        return []

    monkeypatch.setattr(planning, "compare_strategies", compare)
    monkeypatch.setattr(planning, "answer", lambda plans, usable: "")
    base = ["--model_name_or_path", str(folder)]
    plan.main(base)
    for name, value in OPTIONS.items():
        plan.main([*base, f"--{name}", *([] if value is None else [value])])
    assert len({*given}) == len(given) == 1 + len(OPTIONS)


def test_the_help_lists_every_option_and_its_default(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join([*planning.GPUS][:-1]) in shown
    for field in fields(planning.Workload):
        help_text = re.search(rf" --{field.name} [^-].*?\[([^]]+)\]", shown.split("options:")[1])
        if field.default is not False:
            assert help_text[1] == str(field.default)

    def stop(parser, argv):
        assert {action.dest for action in parser._actions} == {"help", *OPTIONS}
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(StopIteration):
        plan.main([])


def test_the_help_answers_without_torch():
    code = (
        "import sys, plan\ntry: plan.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(plan.__file__).parent,
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "abacus"], "error: --gpu abacus: not known; one of h100, "),
        (["--gpus", "0"], "error: --gpus 0: must be 1 or more"),
        (["--tflops", "-1"], "error: --tflops -1: must be above 0"),
        (["--memory_gib", "nan"], "error: --memory_gib nan: must be above 0"),
        (["--supervised", "2"], "error: --supervised 2.0: must be above 0 and at most 1"),
        (["--model_name_or_path", "./nowhere"], "error: ./nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, said):
    assert refused(capsys, *words).startswith(said)
