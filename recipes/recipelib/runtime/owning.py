"""One run at a time writes into an output folder."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recipelib.runtime.console import say
from recipelib.runtime.errors import UserError, first_line
from recipelib.runtime.ranks import is_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".run.lock"
# A disk that is full, a quota, no rights, a disk or server that is gone.
_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
}
_ENDS = ", which is ending"
_PATIENCE = 75  # seconds that a run which is ending is waited for

# The folders that this process owns, and the open lock of each: a forked process owns none.
_owned: dict[tuple[int, Path], int] = {}


@contextmanager
def sole_run(output_dir: str) -> Iterator[None]:
    """A context in which the main process owns a folder: other runs end in one line that names this
    process. The system takes the lock from a process that dies. A folder that is made for the lock
    and stays empty is removed.

    Raises:
        UserError: a run of another process owns the folder, or it cannot be written to.
    """
    folder = Path(output_dir).resolve()
    key = (os.getpid(), folder)
    if not is_main_process() or key in _owned:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    _owned[key] = lock = _take(folder, output_dir)
    try:
        yield
    finally:
        del _owned[key]
        with suppress(OSError):  # the folder is gone, or cannot be written to any more
            Path(folder, LOCK).unlink(missing_ok=True)  # before another run can take it
        os.close(lock)
        for place in made:
            with suppress(OSError):  # it holds something
                place.rmdir()


def say_that_the_run_ends() -> None:
    """Let a run that waits for a folder know that this one ends; for handlers of signals."""
    for (process, _), lock in _owned.items():
        if process == os.getpid():
            with suppress(OSError):
                os.write(lock, _ENDS.encode())


@contextmanager
def in_one_line(output_dir: str) -> Iterator[None]:
    """A context in which a file that cannot be written ends in one line, whoever writes it.

    Raises:
        UserError: instead of the error of the system, of safetensors or of torch.
    """
    try:
        yield
    except Exception as error:
        if (problem := _unwritable(error, output_dir)) is None:
            raise
        raise UserError(
            f"{problem}; make room or mend it. Whole checkpoints in {output_dir} are kept: "
            "--resume_from_checkpoint last goes on from there"
        ) from None


def _unwritable(error: Exception, output_dir: str) -> str | None:
    """What could not be written and why; None if that is not what the error says."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        name = os.fspath(error.filename) if isinstance(error.filename, str | Path) else output_dir
        vanished = isinstance(error, FileNotFoundError) and _is_inside(name, output_dir)
        if vanished or error.errno in _UNWRITABLE:
            return f"{name}: {error.strerror or error}"
    # Neither has a type for it; torch's archives are written in parts, and only the first may fail.
    elif (isinstance(error, SafetensorError) and "os error" in str(error)) or (
        isinstance(error, RuntimeError)
        and any(said in str(error) for said in ("PytorchStreamWriter", "inline_container"))
    ):
        return f"{output_dir}: cannot be written to ({first_line(error)})"
    return None


def _is_inside(name: str, folder: str) -> bool:
    return Path(name).resolve().is_relative_to(Path(folder).resolve())


def _take(folder: Path, output_dir: str) -> int:
    """The open lock of a folder."""
    start, path = time.monotonic(), folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--output_dir {output_dir}: is a file; name a folder") from None
        except OSError as error:
            raise UserError(
                f"--output_dir {output_dir}: cannot be written to ({error.strerror}); name another"
            ) from None
        try:
            _lock(lock, output_dir)
            held = os.fstat(lock)
            # Its holder may have removed the file after it was opened here.
            if path.exists() and os.path.samestat(held, path.stat()):
                with suppress(OSError):  # the disk is full: nobody learns who it is
                    os.ftruncate(lock, 0)
                    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return lock
            os.close(lock)
        except (BlockingIOError, PermissionError):
            holder = os.read(lock, 1000).decode("utf-8", "replace") or "another process"
            os.close(lock)
            if not holder.endswith(_ENDS) or time.monotonic() - start > _PATIENCE:
                raise UserError(
                    f"--output_dir {output_dir}: {holder.removesuffix(_ENDS)} is writing there; "
                    "wait for its end, end it, or name another"
                ) from None
            time.sleep(0.2)


def _lock(file: int, output_dir: str) -> None:
    """Lock an open file, where the file system can.

    Raises:
        BlockingIOError, PermissionError: another process has locked it.
    """
    try:
        if fcntl is None:
            raise OSError("no locks")
        # Not flock's, which forked workers would keep when this process has died.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        say(
            f"warning: --output_dir {output_dir}: its file system has no locks ({error}), so "
            "nothing keeps a second run out"
        )
