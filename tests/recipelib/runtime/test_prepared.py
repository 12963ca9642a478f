"""What is prepared is made once, by one process for all, whole or not at all."""

import errno
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from datasets import Features, List, Value

from recipelib.runtime import prepared
from recipelib.runtime.errors import UserError
from recipelib.runtime.prepared import ArrowFile, Store, code_digest, cut, digest, read_arrow

FORK = get_context("fork")


def wait_for(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not yet reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write_word(text: str):
    return lambda folder: (folder / "word").write_text(text)


# Once


def test_a_folder_is_made_once_and_found_again(tmp_path):
    first = Store(1, tmp_path).get("words", "a", write_word("one"))
    again = Store(1, tmp_path).get("words", "a", write_word("two"))
    other = Store(1, tmp_path).get("words", "b", write_word("three"))
    assert first == again != other
    assert (first / "word").read_text() == "one"


def test_what_fails_leaves_nothing_and_is_made_anew(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "word").write_text("half")
        raise UserError("bad rows")

    with pytest.raises(UserError, match="bad rows"):
        Store(1, tmp_path).get("words", "a", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["words-a.lock"]
    path = Store(1, tmp_path).get("words", "a", write_word("whole"))
    assert (path / "word").read_text() == "whole"


def test_what_a_killed_run_left_is_neither_used_nor_kept(tmp_path):
    (tmp_path / "words-a.unfinished").mkdir()
    (tmp_path / "words-a.unfinished/old").write_text("half")
    path = Store(1, tmp_path).get("words", "a", write_word("whole"))
    assert [file.name for file in path.iterdir()] == ["word"]
    assert not (tmp_path / "words-a.unfinished").exists()


def test_the_machines_other_processes_wait_for_the_first(tmp_path):
    def other() -> None:
        os.environ["LOCAL_RANK"] = "1"
        path = Store(1, tmp_path).get("words", "a", write_word("of another process"))
        (tmp_path / "seen").write_text((path / "word").read_text())

    process = FORK.Process(target=other)
    process.start()
    time.sleep(0.3)
    assert process.is_alive()
    assert not (tmp_path / "words-a").exists()
    Store(1, tmp_path).get("words", "a", write_word("of the first"))
    process.join(10)
    assert (tmp_path / "seen").read_text() == "of the first"


def test_of_two_runs_one_makes_what_both_need(tmp_path, capfd):
    started = FORK.Event()

    def slow(folder: Path) -> None:
        started.set()
        time.sleep(1.2)
        (folder / "word").write_text("of the slow run")

    process = FORK.Process(target=lambda: Store(1, tmp_path).get("words", "a", slow))
    process.start()
    started.wait(10)
    path = Store(1, tmp_path).get("words", "a", write_word("of the second"))
    process.join(10)
    assert (path / "word").read_text() == "of the slow run"
    assert "another run is preparing the same rows; waiting for it" in capfd.readouterr().out


def test_without_a_cache_nothing_is_kept_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_own_folder", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def run() -> None:
        path = Store().get("words", "a", write_word("one"))
        assert path.is_relative_to(tmp_path)
        (tmp_path / "said").write_text((path / "word").read_text())
        prepared.atexit._run_exitfuncs()

    process = FORK.Process(target=run)
    process.start()
    process.join(10)
    assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_a_run_says_how_much_it_keeps_and_how_to_clear_it(tmp_path, capsys):
    store = Store(1, tmp_path / "cache")
    store.get("words", "a", write_word("x" * 2_000_000))
    store.say_what_was_kept()
    said = capsys.readouterr().out
    assert f"2.0 MB of prepared rows in {tmp_path / 'cache'}, 2.0 MB with those of" in said
    assert "delete the folder to clear them, or pass --dataset_cache false" in said
    store.get("words", "a", write_word("found"))
    store.say_what_was_kept()
    assert capsys.readouterr().out == ""


# In several processes


def square(folder: Path):
    """Work that writes a piece's numbers, and returns their squares' sum."""

    def work(number: int, piece: range, tick) -> int:
        with ArrowFile(folder / f"{number}.arrow", Features(n=Value("int64"))) as file:
            for n in piece:
                file.add(n)
                tick()
        return sum(n * n for n in piece)

    return work


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_pieces(tmp_path, processes):
    pieces = cut(10_001, processes, least=100)
    store = Store(processes, tmp_path)
    found = store.fill(tmp_path, square(tmp_path), pieces, total=10_001, description="squares")
    assert found == [sum(n * n for n in piece) for piece in pieces]
    rows = read_arrow(tmp_path / f"{number}.arrow" for number in range(len(pieces)))
    assert rows["n"][:] == list(range(10_001))


def test_the_bar_counts_every_row_and_says_who_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    pieces = cut(3_000, 2, least=100)
    Store(2, tmp_path).fill(tmp_path, square(tmp_path), pieces, total=3_000, description="squares")
    said = capsys.readouterr().err
    assert "squares (7 processes wait): 100%" in said
    assert "3000/3000" in said


def test_of_several_errors_the_first_pieces_is_raised(tmp_path):
    def work(number: int, piece: int, tick) -> None:
        time.sleep(0.3 if number == 2 else 0)
        if number in (2, 3):
            raise UserError(f"row {number}")

    with pytest.raises(UserError, match="row 2"):
        Store(2, tmp_path).fill(tmp_path, work, range(9), total=9, description="work")


def test_a_killed_process_is_one_line_and_leaves_no_other(tmp_path):
    def work(number: int, piece: int, tick) -> None:
        (tmp_path / str(os.getpid())).touch()
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)

    with pytest.raises(UserError, match=r"--dataset_num_proc: .* was killed.* smaller number"):
        Store(2, tmp_path).fill(tmp_path, work, range(4), total=4, description="work")
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


def test_a_killed_run_leaves_no_process(tmp_path):
    def work(number: int, piece: int, tick) -> None:
        (tmp_path / str(os.getpid())).touch()
        while True:
            time.sleep(0.001)
            tick()

    def run() -> None:
        Store(2, tmp_path).fill(tmp_path, work, range(4), total=4, description="work")

    process = FORK.Process(target=run)
    process.start()
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    process.kill()
    process.join()
    assert wait_for(lambda: not any(map(alive, workers)))


# Disks


def test_a_full_disk_is_one_line_that_says_how_much_is_needed(tmp_path):
    def work(number: int, piece: int, tick) -> None:
        (folder / str(number)).write_bytes(bytes(1_000_000))
        tick()
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    def make(path: Path) -> None:
        nonlocal folder
        folder = path
        store.fill(path, work, range(12), total=12, description="work")

    folder, store = None, Store(1, tmp_path)
    with pytest.raises(UserError) as caught:
        store.get("words", "a", make)
    # Three of twelve rows took 3 MB.
    assert f"{tmp_path}: the disk is full: about 12.0 MB are needed" in str(caught.value)
    assert "point HF_DATASETS_CACHE at a folder with room" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["words-a.lock"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache: .*; point HF_DATASETS_CACHE at a folder"):
        Store(1, tmp_path / "file/cache").get("words", "a", write_word("one"))


# Files and keys


def test_an_arrow_file_gives_back_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_BATCH", 100)  # several batches
    features = Features(text=Value("string"), ids=List(Value("int32")))
    records = [("ü" * n, list(range(n))) for n in range(30)] + [(None, [])]
    with ArrowFile(tmp_path / "a.arrow", features) as file:
        for record in records:
            file.add(*record)
    rows = read_arrow([tmp_path / "a.arrow"] * 2)
    assert [(row["text"], row["ids"]) for row in rows] == records * 2
    assert rows.features == features


def test_keys_differ_with_every_part_and_with_the_code():
    keys = [digest("a", 1), digest("a", "1"), digest("a1"), digest("a", 1, None), digest(b"a", 1)]
    assert len(set(keys)) == 5
    assert digest({"a": [1, 2]}, b"x") == digest({"a": [1, 2]}, b"x")
    assert code_digest("data") != code_digest("encoding")


@pytest.mark.parametrize(("count", "processes"), [(0, 2), (1, 8), (99, 2), (10**5, 4), (10**6, 2)])
def test_pieces_cover_all_rows_and_are_neither_tiny_nor_huge(count, processes):
    pieces = cut(count, processes)
    assert [n for piece in pieces for n in piece] == list(range(count))
    assert all(100 <= len(piece) <= 10_000 for piece in pieces[:-1])
