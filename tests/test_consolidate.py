"""Tests of `consolidate.py`: shards that two processes left become one file."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from consolidate import consolidate, main
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM

from recipelib.runtime.errors import UserError


def sharded(folder, model, config, weights):
    """A checkpoint as the trainer leaves it under sharded state dicts."""
    dcp.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    config.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4}))
    return folder


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(300), LoraConfig(target_modules="all-linear"))
    for name, one in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one)
    folder = tmp_path / "checkpoint-4"
    return sharded(
        folder, model, model.peft_config["default"], get_peft_model_state_dict(model)
    ), model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


def test_a_consolidated_adapter_loads_with_plain_peft(adapter, capsys):
    folder, model = adapter
    main([str(folder)])
    assert capsys.readouterr().out == f"written: {folder}/adapter_model.safetensors\n"
    loaded = PeftModel.from_pretrained(tiny_llama(300), folder)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not list(folder.glob("consolidating-*"))


def test_the_output_folder_is_complete_and_the_checkpoint_left_as_it_was(adapter, tmp_path):
    folder, model = adapter
    beside = {"generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in beside:
        (folder / name).write_text("{}")
    before = sorted(folder.rglob("*"))
    file = consolidate(str(folder), str(tmp_path / "new" / "step4"))
    assert sorted(folder.rglob("*")) == before
    names = {one.name for one in file.parent.iterdir()}
    assert names == {file.name, "adapter_config.json", *beside}
    loaded = PeftModel.from_pretrained(tiny_llama(300), file.parent)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_consolidated_model_loads_with_plain_transformers(tmp_path):
    model = tiny_llama(300)
    folder = sharded(tmp_path / "checkpoint-4", model, model.config, model.state_dict())
    assert consolidate(str(folder)).name == "model.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_what_is_no_sharded_checkpoint_is_one_line(adapter, tmp_path, capsys):
    folder, _ = adapter
    with pytest.raises(UserError, match="no whole checkpoint"):
        consolidate(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        consolidate(str(folder), str(tmp_path / "file"))
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "stage-00001-of-00002.safetensors").write_text("")
    with pytest.raises(UserError, match=r"of a pipeline; recipes/gpipe_sft\.py goes on from it"):
        consolidate(str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run; name another folder"):
        consolidate(str(folder), str(tmp_path / "run"))


def test_a_checkpoint_that_was_cut_short_is_refused(adapter):
    folder, _ = adapter
    (folder / "trainer_state.json").write_text('{"global')
    with pytest.raises(UserError, match="missing or cut short"):
        consolidate(str(folder))
