"""Models and tokenizers from every kind of place, and what a user reads when one is no good."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors as hub
from tiny_llama import save_tiny_llama, tiny_backend
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recipelib import models
from recipelib.runtime.errors import UserError

RECIPES = Path(models.__file__).parents[1]


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and its tokenizer, not to be changed."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def model_folder(saved_model, tmp_path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "tiny-llama"))


# A folder ----------------------------------------------------------------------------------------


def test_a_folder_loads_in_the_asked_dtype_and_pads_with_the_end_token(saved_model):
    model = models.load_pretrained(str(saved_model), dtype=torch.float64)
    assert (type(model), model.dtype) == (LlamaForCausalLM, torch.float64)
    tokenizer = models.load_tokenizer(str(saved_model))
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert models.describe_model(str(saved_model)) == "tiny-llama"
    assert models.describe_model("org/name") == "org/name"


def test_a_folder_is_named_by_its_name_however_it_is_reached(saved_model, monkeypatch):
    monkeypatch.chdir(saved_model)
    assert models.describe_model(".") == models.describe_model("../tiny-llama/") == "tiny-llama"


def test_dtype_is_by_default_the_one_that_was_saved(saved_model, tmp_path):
    LlamaForCausalLM.from_pretrained(saved_model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert models.load_pretrained(str(tmp_path)).dtype == torch.bfloat16


def test_another_class_and_its_arguments_reach_from_pretrained(saved_model):
    from transformers import AutoModelForSequenceClassification

    model = models.load_pretrained(
        str(saved_model),
        model_class=AutoModelForSequenceClassification,
        num_labels=3,
        attn_implementation="eager",
    )
    assert model.score.out_features == 3
    assert model.config._attn_implementation == "eager"


def test_a_home_relative_folder_is_found(saved_model, monkeypatch):
    monkeypatch.setenv("HOME", str(saved_model.parent))
    assert models.resolve_model("~/tiny-llama") == str(saved_model)


def test_an_existing_pad_token_is_kept(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(model_folder)
    assert models.load_tokenizer(str(model_folder)).pad_token == "<unk>"


def test_neither_pad_nor_end_token_is_refused(model_folder):
    PreTrainedTokenizerFast(tokenizer_object=tiny_backend()).save_pretrained(model_folder)
    with pytest.raises(UserError, match="neither a pad nor an eos token; set pad_token"):
        models.load_tokenizer(str(model_folder))


def test_a_slow_tokenizer_is_refused_with_the_cure(model_folder):
    (model_folder / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(model_folder)
    with pytest.raises(UserError, match=r"ByT5Tokenizer is a slow tokenizer .* offsets.*convert"):
        models.load_tokenizer(str(model_folder))


@pytest.mark.parametrize("name", ["./x", "../x", "/nowhere/x", "~/nowhere/x", "a/b/c", "runs/"])
def test_a_missing_folder_is_never_asked_of_the_hub(name):
    with pytest.raises(UserError, match=rf"^{name}: no such folder; check the path"):
        models.load_pretrained(name)


def test_a_folder_without_config_says_what_is_missing(model_folder):
    (model_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"tiny-llama: no config\.json"):
        models.load_pretrained(str(model_folder))


def test_a_folder_without_weights_says_what_is_missing(model_folder):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights \(model\.safetensors\)"):
        models.load_pretrained(str(model_folder))


def test_a_file_that_is_no_gguf_is_refused(model_folder):
    with pytest.raises(UserError, match=r"pass the folder that holds config\.json"):
        models.load_pretrained(str(model_folder / "model.safetensors"))


def test_an_adapter_is_no_model_but_has_a_tokenizer(saved_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(saved_model), LoraConfig(target_modules="all-linear")
    )
    adapted.save_pretrained(tmp_path)
    models.load_tokenizer(str(saved_model)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a PEFT adapter, .*merge it .* or pass the base model"):
        models.load_pretrained(str(tmp_path))
    ids = models.load_tokenizer(str(tmp_path))("the capital").input_ids
    assert ids == models.load_tokenizer(str(saved_model))("the capital").input_ids


def test_pickled_weights_are_refused_and_the_hint_converts_them(model_folder):
    before = LlamaForCausalLM.from_pretrained(model_folder).state_dict()
    torch.save(before, model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only pickled weights .*safetensors") as caught:
        models.load_pretrained(str(model_folder))
    assert "\n" not in str(caught.value)

    python, flag, code = shlex.split(str(caught.value).split("once: ")[1])
    assert (python, flag) == ("python", "-c")
    exec(code)
    after = models.load_pretrained(str(model_folder)).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("architectures", [None, [], ["X; import os"]])
def test_the_hint_takes_no_code_from_a_config(model_folder, architectures):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"m = t\.AutoModelForCausalLM\.from_pretrained"):
        models.load_pretrained(str(model_folder))


def test_broken_weights_end_in_one_line(model_folder):
    (model_folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="tiny-llama: cannot be loaded") as caught:
        models.load_pretrained(str(model_folder))
    assert "\n" not in str(caught.value)


def test_custom_code_is_not_run_without_leave(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"},
    }
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "code.py").write_text("raise SystemExit('custom code was run')")
    with pytest.raises(UserError, match=r"own Python code; pass --trust_remote_code"):
        models.load_pretrained(str(model_folder))


def test_a_revision_is_refused_where_it_would_be_ignored(saved_model):
    with pytest.raises(UserError, match="--revision applies to a hub id only"):
        models.load_pretrained(str(saved_model), revision="v2")


# The hub -----------------------------------------------------------------------------------------


def hub_error(kind: type) -> Exception:
    response = SimpleNamespace(headers={}, request=None)
    return kind("refused by the hub\nsecond line", response=response)


HUB_ERRORS = {
    "gated": (
        lambda: hub_error(hub.GatedRepoError),
        r"accept its license at https://huggingface\.co/org/name and run `hf auth login`",
    ),
    "missing": (
        lambda: hub_error(hub.RepositoryNotFoundError),
        r"neither a folder here nor a model on the hub; check the spelling",
    ),
    "revision": (
        lambda: hub_error(hub.RevisionNotFoundError),
        r"the hub has no revision 'v9' of it",
    ),
    "offline": (
        lambda: hub.LocalEntryNotFoundError("cannot find the files in the cache"),
        r"no connection to the hub and not in its cache; pass a local folder",
    ),
    "pickled": (
        lambda: OSError("org/name does not appear to have a file named model.safetensors"),
        r"no safetensors weights on the hub",
    ),
    "other": (
        lambda: ValueError("model type `new` is not known\nsecond line"),
        r"cannot be loaded \(model type `new` is not known\)",
    ),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
@pytest.mark.parametrize("auto", [AutoTokenizer, AutoModelForCausalLM])
def test_a_refusal_of_the_hub_is_one_line_with_the_cure(case, auto, monkeypatch):
    make, expected = HUB_ERRORS[case]

    def refuse(*args, **kwargs):
        try:
            raise make()
        except OSError as error:
            raise OSError("what transformers says\nin several lines: " + str(error)) from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: LlamaConfig())
    monkeypatch.setattr(auto, "from_pretrained", refuse)
    load = models.load_tokenizer if auto is AutoTokenizer else models.load_pretrained
    with pytest.raises(UserError, match=f"^org/name: .*{expected}") as caught:
        load("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_only_safetensors_and_no_custom_code_are_asked_of_the_hub(monkeypatch):
    asked = {}

    def fetch(name, **kwargs):
        asked.update(kwargs, n=name)
        return SimpleNamespace(config=LlamaConfig()), {"missing_keys": []}

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: LlamaConfig())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fetch)
    models.load_pretrained("org/name", revision="v2", dtype="float32")
    assert asked["n"] == "org/name"
    assert (asked["use_safetensors"], asked["trust_remote_code"]) == (True, False)
    assert (asked["revision"], asked["dtype"]) == ("v2", "float32")


def test_a_body_without_its_head_is_no_language_model(saved_model, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(saved_model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    model.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no lm_head.weight, which would start at random"):
        models.load_pretrained(str(tmp_path))
    models.load_pretrained(str(tmp_path), headless=True)
    assert "its untouched score is chance" in capsys.readouterr().out


def test_a_mistake_of_the_caller_keeps_its_traceback(saved_model):
    with pytest.raises(TypeError):
        models.load_pretrained(str(saved_model), no_such_argument=1)


def test_a_missing_gguf_is_one_line():
    with pytest.raises(UserError, match=r"^org/x\.gguf: no such \.gguf file"):
        models.load_tokenizer("org/x.gguf")


# The real thing -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_model_knows_the_capital_of_france():
    tokenizer, model = models.load_tokenizer(None), models.load_pretrained(None)
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**chat, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(written[0, chat["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
