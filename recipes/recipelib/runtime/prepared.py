"""What is prepared once and kept: folders of Arrow files, found again by all that they depend on.

One process of each machine makes a folder while the machine's others wait for it; then all map the
same files into memory. A folder gets its name when it is whole, so what a killed run leaves behind
is never taken for it.
"""

from __future__ import annotations

import atexit
import errno
import gc
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from multiprocessing import connection, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipelib.runtime.console import progress_bar, say
from recipelib.runtime.errors import UserError
from recipelib.runtime.launch import cores
from recipelib.runtime.ranks import local_rank, processes_started

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features

_BATCH = 200_000  # tokens or letters that are held in memory until they are written
_WORTH_PROCESSES = 4  # pieces; fewer are done before processes have started
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Tick = Callable[[], None]


@dataclass(frozen=True)
class Store:
    """Where what is prepared lies, and how many processes make it.

    Attributes:
        processes: that work on it at once; a single one works in this process.
        folder: where it is kept for other runs; None for this run alone.
    """

    processes: int = 1
    folder: Path | None = None
    _made: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, training) -> Store:
        """The store of a run, from its `dataset_num_proc` and `dataset_cache`."""
        processes = training.dataset_num_proc or cores()
        if not training.dataset_cache:
            return cls(processes)
        from datasets import config

        return cls(processes, Path(config.HF_DATASETS_CACHE, "recipes"))

    @cached_property
    def root(self) -> Path:
        """The folder itself, which all processes of this machine share."""
        return self.folder or _folder_of_this_run()

    def get(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of this kind and key. If it is not there, the machine's first process calls
        `make` with the folder that will become it, and the others wait.

        Raises:
            UserError: the disk is full, or cannot be written to; and what `make` raises.
        """
        path = self.root / f"{kind}-{key}"
        if path.exists():
            return path
        if not _makes():
            while not path.exists():  # a launcher ends this process if the first one fails
                time.sleep(0.1)
            return path
        with self._alone(path):
            if not path.exists():
                self._make(path, make)
        return path

    @property
    def _cure(self) -> str:
        variable = "HF_DATASETS_CACHE" if self.folder else "TMPDIR"
        return f"point {variable} at a folder with room, or delete what is not needed there"

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """A context that one run at a time can be in."""
        from filelock import FileLock, Timeout

        lock = FileLock(path.with_suffix(".lock"))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                say("another run is preparing the same rows; waiting for it")
                lock.acquire()
        except OSError as error:
            raise UserError(f"{self.root}: {error.strerror or error}; {self._cure}") from None
        try:
            yield
        finally:
            lock.release()

    def _make(self, path: Path, make: Callable[[Path], None]) -> None:
        unfinished = path.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        try:
            unfinished.mkdir()
            make(unfinished)
            os.replace(unfinished, path)
            self._made.append(path)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise UserError(f"{self.root}: the disk is full; {self._cure}") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def say_what_was_kept(self) -> None:
        """Say how much this run has added to what is kept, and how to clear it."""
        if self._made and self.folder:
            own, total = sum(map(_size, self._made)), _size(self.folder)
            say(
                f"kept for the next run: {megabytes(own)} of prepared rows in {self.folder}, "
                f"{megabytes(total)} with those of other runs; delete the folder to clear them, "
                "or pass --dataset_cache false"
            )
        self._made.clear()

    def fill(
        self,
        folder: Path,
        work: Callable[[int, Any, Tick], Any],
        pieces: Sequence[Any],
        *,
        total: int,
        description: str,
    ) -> list[Any]:
        """Call `work` for each piece, in this store's processes.

        Args:
            folder: where `work` writes.
            work: is given the piece's number, the piece, and a function to call for each row.
            total: how many rows there are, for the progress bar.
            description: of the bar.
        Returns:
            What `work` returned, in the order of the pieces.
        Raises:
            UserError: the disk is full, or a process was killed.
        """
        waiting = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1
        if waiting:
            description += f" ({waiting} {'process waits' if waiting == 1 else 'processes wait'})"
        with progress_bar(description, total) as bar:
            try:
                several = self.processes > 1 and len(pieces) >= _WORTH_PROCESSES
                if several and sys.platform == "linux":  # elsewhere libraries survive no fork
                    return _in_processes(work, pieces, min(self.processes, len(pieces)), bar)
                return [work(number, piece, bar.update) for number, piece in enumerate(pieces)]
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                written, free = _size(folder), shutil.disk_usage(folder).free
                done = max(bar.n, 1) / max(total, 1)
                raise UserError(
                    f"{self.root}: the disk is full: about {megabytes(written / done)} are "
                    f"needed, {megabytes(written + free)} were free; {self._cure}"
                ) from None


def _makes() -> bool:
    """Whether this process prepares what the processes of this machine share."""
    return local_rank() == 0


_own_folder: Path | None = None


def _folder_of_this_run() -> Path:
    """A folder that the processes of this machine share and that goes when they end."""
    global _own_folder
    if _own_folder is not None:
        return _own_folder
    if _makes():
        _own_folder = Path(tempfile.mkdtemp(prefix="recipes-"))
        atexit.register(shutil.rmtree, _own_folder, ignore_errors=True)
    if processes_started() > 1:
        import torch.distributed as dist

        folders: list = [None] * dist.get_world_size()
        dist.all_gather_object(folders, (socket.gethostname(), _own_folder))
        host = socket.gethostname()
        _own_folder = next(folder for name, folder in folders if name == host and folder)
    return _own_folder


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; those that go meanwhile are not counted."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def megabytes(size: float) -> str:
    """A size in bytes as people read it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# Work in several processes. They are forked, so that nothing has to be pickled on the way there; a
# process that finds its parent gone ends, so a kill leaves none behind.


def _in_processes(work: Callable, pieces: Sequence[Any], processes: int, bar) -> list[Any]:
    context = get_context("fork")
    following, rows = context.Value("q", 0), context.Value("q", 0)
    pipes, started, failed = [], [], {}
    results: list[Any] = [None] * len(pieces)
    try:
        for _ in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (work, pieces, following, rows, sender, os.getpid())
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            started.append(process)
        while pipes:
            for pipe in connection.wait(pipes, timeout=0.1):
                try:
                    number, result, error = pipe.recv()
                except EOFError:
                    pipes.remove(pipe)
                    continue
                results[number] = result
                if error is not None:
                    failed[number] = error
            bar.update(rows.value - bar.n)
        for process in started:
            process.join()
        if failed:
            raise failed[min(failed)]
        if any(process.exitcode for process in started):
            raise UserError(
                "--dataset_num_proc: a process that prepares rows was killed, perhaps because "
                "memory ran out; pass a smaller number"
            )
        return results
    finally:
        for process in started:
            process.terminate()
            process.join()


def _worker(work, pieces, following, rows, sender, parent: int) -> None:
    """Take the next piece, work on it and send the result, until there is none."""
    gc.freeze()  # else a collection would copy what is the parent's, page by page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    waiting = 0

    def tick() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 32:
            with rows.get_lock():
                rows.value += waiting
            waiting = 0
            if os.getppid() != parent:
                raise SystemExit

    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(pieces):
            break
        try:
            sender.send((number, work(number, pieces[number], tick), None))
        except BrokenPipeError:  # the parent is gone
            raise SystemExit from None
        except Exception as error:  # raised again by the parent
            with following.get_lock():  # what comes before this piece is finished, nothing behind
                following.value = len(pieces)
            sender.send((number, None, error))
    with rows.get_lock():
        rows.value += waiting
    sender.close()


# Keys and files


def digest(*parts: Any) -> str:
    """A key for values that JSON can write, bytes and paths; the same in every process and run."""
    import xxhash

    hashed = xxhash.xxh3_128()
    for part in parts:
        data = part if isinstance(part, bytes | memoryview) else json.dumps(part, default=str)
        hashed.update(data.encode() if isinstance(data, str) else data)
        hashed.update(b"\0")
    return hashed.hexdigest()


def code_digest(*rooms: str) -> str:
    """A key for the code of some rooms, and for the versions of the libraries that they lean on:
    what was prepared by other code is not found.
    """
    root = Path(__file__).parents[1]
    files = [file for room in rooms for file in sorted((root / room).glob("*.py"))]
    libraries = [version(name) for name in ("jinja2", "tokenizers", "transformers")]
    return digest(libraries, *(file.read_bytes() for file in files))


def cut(count: int, processes: int, *, least: int = 100, most: int = 10_000) -> list[range]:
    """Ranges of places that together are all `count`, for several processes to work on.

    Args:
        least, most: rows of a piece: enough to be worth a process, few enough to bound its memory.
    """
    size = min(most, max(least, -(-count // (4 * processes))))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class ArrowFile:
    """An Arrow file that is written record by record, as a context."""

    def __init__(self, path: Path, features: Features):
        import pyarrow

        self._schema = features.arrow_schema
        self._file = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_stream(self._file, self._schema)
        self._batch: list[Sequence] = []
        self._held = 0

    def __enter__(self) -> ArrowFile:
        return self

    def __exit__(self, kind, *error) -> None:
        try:
            if kind is None:
                self._write()
                self._writer.close()
        finally:
            self._file.close()

    def add(self, *record: Any) -> None:
        """Append a record, its values in the order of the features."""
        self._batch.append(record)
        self._held += 40 + sum(map(_length, record))
        if self._held >= _BATCH:
            self._write()

    def _write(self) -> None:
        import pyarrow

        columns = zip(*self._batch, strict=True)
        arrays = [
            _array(column, kind.type)
            for column, kind in zip(columns, self._schema, strict=bool(self._batch))
        ]
        if arrays:
            self._writer.write_batch(pyarrow.record_batch(arrays, schema=self._schema))
        self._batch.clear()
        self._held = 0


def _length(value: Any) -> int:
    """How many tokens or letters a value of a record has, about."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return sum(map(_length, value))
    return len(value) if isinstance(value, list | str) else 0


def _array(values: Sequence, kind: pyarrow.DataType) -> pyarrow.Array:
    """Values as Arrow's array; those of a list of `datasets.Json` are its text."""
    import pyarrow

    if pyarrow.types.is_list(kind) and isinstance(kind.value_type, pyarrow.BaseExtensionType):
        return pyarrow.array(values, pyarrow.list_(pyarrow.string())).cast(kind)
    return pyarrow.array(values, kind)


def read_arrow(paths: Iterable[Path | str]) -> Dataset:
    """The rows of Arrow files, one file after the other, mapped into memory."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable, concat_tables

    # Not a `Dataset` for each file: making one takes longer than opening the file.
    return Dataset(concat_tables([MemoryMappedTable.from_file(str(path)) for path in paths]))
