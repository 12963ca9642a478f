"""recipes/merge.py: the merged model is the adapter on its base, in plain transformers."""

import shutil
from pathlib import Path

import adapter_sft
import lora_sft
import merge
import prompt_tuning
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from run_files import read_json
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

IDS = torch.tensor([[5, 17, 42, 99, 7, 3, 64, 12]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def refusal(capsys, *argv: object) -> str:
    """The one line that a command ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        merge.main([str(word) for word in argv])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.fixture
def adapter(causal_model, tmp_path) -> Path:
    """The folder of an adapter that does something, with its tokenizer."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(causal_model),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(causal_model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"rslora": True, "r": 4}, {"pissa": True}])
def test_the_merged_model_of_a_run_gives_the_adapters_logits(runs, causal_model, more, capsys):
    folder = runs(lora_sft)(learning_rate=0.01, max_steps=2, **more)
    base = AutoModelForCausalLM.from_pretrained(causal_model)
    untouched = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, folder))
    capsys.readouterr()
    merge.main([str(folder)])
    assert capsys.readouterr().out == f"written: {folder}/merged\n"
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    assert (merged - adapted).abs().max() < 1e-4
    assert (merged - untouched).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(folder / "merged").eos_token == "</s>"
    assert not list((folder / "merged").glob("adapter_*"))


def test_a_masked_model_stays_one(masked_model, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(masked_model)
    lora = LoraConfig(target_modules=["query"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    merge.main([str(tmp_path / "adapter")])
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "adapter" / "merged")
    assert read_json(tmp_path / "adapter" / "merged" / "config.json")["architectures"] == [
        "BertForMaskedLM"
    ]
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)


def test_output_and_dtype_are_those_that_are_asked_for(adapter, tmp_path):
    merge.main([str(adapter), "--output", str(tmp_path / "new" / "whole"), "--dtype", "bfloat16"])
    assert read_json(tmp_path / "new" / "whole" / "config.json")["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "whole")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert not (adapter / "merged").exists()


def test_nothing_of_a_model_merged_before_stays_beside_the_new_one(adapter, tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    for name in ("model-00002-of-00002.safetensors", "chat_template.jinja", "README.md"):
        (output / name).write_text("of another")
    merge.main([str(adapter), "--output", str(output)])
    names = {file.name for file in output.iterdir()}
    assert {"model.safetensors", "README.md"} <= names
    assert not names & {"model-00002-of-00002.safetensors", "chat_template.jinja"}


def test_the_base_may_lie_elsewhere_now(adapter, causal_model, tmp_path, capsys):
    expected = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal_model), adapter)
    )
    config = (adapter / "adapter_config.json").read_text()
    moved = shutil.copytree(causal_model, tmp_path / "moved")
    gone = config.replace(str(causal_model), str(tmp_path / "gone"))
    (adapter / "adapter_config.json").write_text(gone)
    assert refusal(capsys, adapter).startswith(f"error: {tmp_path}/gone: ")
    merge.main([str(adapter), "--model_name_or_path", str(moved)])
    merged = logits(AutoModelForCausalLM.from_pretrained(adapter / "merged"))
    assert (merged - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        (adapter_sft, {}, "not linear"),
        (prompt_tuning, {"virtual_tokens": 4, "max_length": 100}, "a soft prompt is no weight of"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(runs, recipe, options, said, capsys):
    folder = runs(recipe)(max_steps=1, **options)
    line = refusal(capsys, folder)
    assert line.startswith(f"error: {folder}: ")
    assert said in line
    assert not (folder / "merged").exists()


def test_neither_a_file_nor_what_is_merged_is_written_over(adapter, causal_model, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    files = {file: file.read_bytes() for file in [*adapter.iterdir(), *causal_model.iterdir()]}
    assert "is a file; name a folder" in refusal(capsys, adapter, "--output", tmp_path / "file")
    for folder in (adapter, causal_model):
        line = refusal(capsys, adapter, "--output", folder)
        assert line == f"error: --output {folder}: holds what is merged; name another folder"
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.json").write_text("{}")
    line = refusal(capsys, adapter, "--output", other)
    assert line == f"error: --output {other}: holds a run or an adapter; name another folder"
    assert {file: file.read_bytes() for file in files} == files
    assert {*adapter.iterdir(), *causal_model.iterdir()} == files.keys()


def test_a_folder_without_an_adapter_is_one_line(causal_model, tmp_path, capsys):
    for folder, said in (
        (tmp_path / "nowhere", "no such folder"),
        (causal_model, "no adapter_config.json"),
    ):
        assert said in refusal(capsys, folder)
