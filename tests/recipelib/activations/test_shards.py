"""Shards are whole or they are made again, and only those that are not; what cannot be written is
one line.
"""

import errno
import os
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from deep_models import LAYERS, deep, examples_of, freeze
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from recipelib.activations import STATES, FrozenLayers, StateCache, state_cache
from recipelib.runtime import UserError

LENGTHS = [3, 9, 1, 12, 5, 5, 7, 2] * 4
Usage = namedtuple("Usage", "total used free")


@cache
def model_and_layers():
    model = freeze(deep("llama"), range(2, LAYERS))
    return model, FrozenLayers.of(model)


def cache_in(folder: Path, dtype=torch.float32, lengths=LENGTHS) -> StateCache:
    return StateCache(model_and_layers()[1], examples_of(lengths), folder, dtype)


def fill(folder: Path, **options) -> StateCache:
    kept = cache_in(folder, **options)
    kept.fill(model_and_layers()[0])
    return kept


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a cache that is whole; to be read."""
    return fill(tmp_path_factory.mktemp("made")).folder


@pytest.fixture
def kept(made, tmp_path) -> StateCache:
    """The same cache in a folder of the test's own."""
    own = cache_in(tmp_path)
    shutil.copytree(made, own.folder)
    return own


def contents(folder: Path) -> dict[str, tuple]:
    """What is in each shard of a folder, by its name."""
    found = {}
    for path in folder.glob("states-*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                found[path.name] = file.get_tensor(STATES).tolist(), file.metadata()
        except SafetensorError:
            found[path.name] = "damaged", None
    return found


def written(kept: StateCache) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in kept.folder.iterdir()}


def in_another_process(work: Callable[[], None]) -> int:
    """Its exit code."""

    def run() -> None:
        torch.set_num_threads(1)  # others do not survive a fork
        work()

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


# Made again -------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def flip_a_byte_of_the_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[9] ^= 255
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def take_another(path: Path) -> None:
    shutil.copy(path.with_name("states-00001.safetensors"), path)


def take_another_dtype(path: Path) -> None:
    save_file({STATES: load_file(path)[STATES].half()}, path, {"checksum": "unknown"})


def take_one_without_checksum(path: Path) -> None:
    save_file(load_file(path), path)


def take_one_of_something_else(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        flip_a_byte,
        flip_a_byte_of_the_header,
        cut_off,
        empty,
        take_another,
        take_another_dtype,
        take_one_without_checksum,
        take_one_of_something_else,
    ],
)
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(damage, kept, made):
    assert len(kept.shards) > 8
    before = written(kept)
    broken = kept.path(kept.shards[4])
    damage(broken)
    assert contents(kept.folder) != contents(made)
    kept.fill(model_and_layers()[0])
    assert contents(kept.folder) == contents(made)
    after = written(kept)
    assert {name for name in after if after[name] != before[name]} == {broken.name}


def test_where_all_are_whole_nothing_is_computed_and_no_room_is_needed(kept, monkeypatch):
    def run(*_):
        raise AssertionError("the model was run")

    model = model_and_layers()[0]
    handle = model.register_forward_pre_hook(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    before = written(kept)
    kept.fill(model)
    handle.remove()
    assert written(kept) == before
    assert torch.isfinite(kept[3]).all()


# Killed -----------------------------------------------------------------------------------------


def test_what_breaks_in_the_middle_leaves_whole_shards_and_the_rest_is_made_next(
    tmp_path, made, monkeypatch
):
    kept, write = cache_in(tmp_path), StateCache._write

    def break_at_the_sixth(self, shard, states):
        if shard == self.shards[5]:
            raise KeyboardInterrupt
        write(self, shard, states)

    with monkeypatch.context() as patch:
        patch.setattr(StateCache, "_write", break_at_the_sixth)
        with pytest.raises(KeyboardInterrupt):
            kept.fill(model_and_layers()[0])
    assert_goes_on(kept, 5, made)


def test_a_kill_while_a_shard_is_written_leaves_none_that_is_taken_for_whole(tmp_path, made):
    def fill_and_be_killed() -> None:
        saved = []

        def half_written(tensors, path, metadata):
            saved.append(path)
            if len(saved) == 4:
                Path(path).write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            save_file(tensors, path, metadata)

        state_cache.save_file = half_written
        fill(tmp_path)

    assert in_another_process(fill_and_be_killed) == -signal.SIGKILL
    kept = cache_in(tmp_path)
    (left,) = kept.folder.glob(".*.tmp")
    assert left.read_bytes() == b"half of it"
    assert_goes_on(kept, 3, made)


def assert_goes_on(kept: StateCache, whole: int, made: Path) -> None:
    """So many shards are there, whole, and the next run makes the others and only those."""
    assert len(contents(kept.folder)) == whole
    assert contents(kept.folder).items() <= contents(made).items()
    assert not kept.is_there()
    first = written(kept)
    kept.fill(model_and_layers()[0])
    assert kept.is_there()
    assert contents(kept.folder) == contents(made)
    assert first.items() <= written(kept).items()


# Not written ------------------------------------------------------------------------------------


def test_without_room_it_ends_before_anything_is_computed_with_the_size_and_the_cure(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1_000_000))
    model, _ = model_and_layers()
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    kept = cache_in(tmp_path, lengths=[100] * 90)  # x 32 x 4 bytes = 1.152 MB
    line = (
        f"{tmp_path}: the states of the frozen layers need 1.2 MB, 1.0 MB are free; point "
        "--cache_dir at a folder with room, pass --cache_dtype bfloat16, or --cache false"
    )
    with pytest.raises(UserError) as told:
        kept.fill(model)
    handle.remove()
    assert str(told.value) == line
    assert runs == []
    cache_in(tmp_path, torch.bfloat16, [100] * 90)._check_room(kept.shards)  # which fits


def test_only_what_is_missing_needs_room(kept, monkeypatch):
    shard = kept.path(kept.shards[0])
    size = shard.stat().st_size
    shard.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size))
    kept.fill(model_and_layers()[0])
    assert kept.is_there()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/activations-\w+: Not a directory; point"):
        fill(tmp_path / "file")


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_meanwhile_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(state_cache, "save_file", no_space)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/activations-\w+: No space left on device; point"
    ):
        fill(tmp_path)


def test_so_is_a_file_that_the_system_lets_grow_no_further(tmp_path):
    def fill_with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            fill(tmp_path / "states")
        except UserError as error:
            (tmp_path / "said").write_text(str(error))

    in_another_process(fill_with_little_room)
    line = (tmp_path / "said").read_text()
    assert line.startswith(f"{tmp_path}/states/activations-")
    assert "File too large" in line
    assert "; point --cache_dir at a folder with room" in line
    assert "\n" not in line
    assert contents(cache_in(tmp_path / "states").folder) == {}


# In memory --------------------------------------------------------------------------------------


def test_a_batch_that_runs_out_of_memory_is_run_in_halves(tmp_path, made):
    model, _ = model_and_layers()
    ran = []

    def little_memory(module, args, kwargs):
        rows, tokens = kwargs["input_ids"].shape
        if rows > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        ran.append(tokens)

    handle = model.register_forward_pre_hook(little_memory, with_kwargs=True)
    kept = cache_in(tmp_path)
    kept.fill(model)
    handle.remove()
    assert sorted(ran) == sorted(LENGTHS)
    for file in made.iterdir():
        found, wanted = (load_file(path)[STATES] for path in (kept.folder / file.name, file))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_row_that_does_not_fit_by_itself_is_one_line(tmp_path):
    model, _ = model_and_layers()

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.register_forward_pre_hook(no_memory)
    with pytest.raises(UserError, match=r"^out of memory with a single row of \d+ tokens; lower"):
        fill(tmp_path)
    handle.remove()
