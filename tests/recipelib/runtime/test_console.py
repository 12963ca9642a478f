"""What a run prints: by one process only, as plain text where there is no terminal."""

import pytest

from recipelib.runtime.console import print_table, progress_bar, say


def test_a_piped_table_is_plain_text_of_at_most_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    rows = {"score": 0.8412345, "rows": 6920, "none": None, "path": "x" * 300, "日本": "[bold]é[/]"}
    print_table("LoRA on [movie_reviews]", rows)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) == 100
    for shown in ("LoRA on [movie_reviews]", "0.8412", "6,920", "日本", "[bold]é[/]"):
        assert shown in out
    assert out.count("x") == 300  # folded, not cut off


@pytest.mark.parametrize(("rank", "printed"), [(None, True), ("0", True), ("1", False)])
def test_only_the_main_process_prints(rank, printed, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    print_table("title", {"a": 1})
    assert bool(capsys.readouterr().out) == printed


def test_control_characters_in_a_value_are_shown_not_obeyed(capsys):
    print_table("t\x07", {"name\x1b[31m": "\x1b]0;title\x07"})
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(out)
    assert r"name\x1b[31m" in out


def test_a_terminal_without_utf8_still_gets_its_table(tmp_path, monkeypatch):
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        print_table("título", {"日": "±"})
    assert r"\xb1" in path.read_text("ascii")


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_one_process_speaks_and_shows_bars(rank, speaks, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("hello")
    with progress_bar("counting", 3) as bar:
        bar.update(3)
    captured = capsys.readouterr()
    assert captured.out == ("hello\n" if speaks else "")
    assert ("counting" in captured.err) == speaks
