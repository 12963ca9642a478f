"""The folder of what frozen layers have computed, which other things lie in too."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from recipelib.activations import cache_folder
from recipelib.runtime import Store, UserError


def asked(cache_dir=None, clear_cache=False, **changes) -> SimpleNamespace:
    plain = {"cache": True, "cache_dtype": None, "clear_cache": clear_cache}
    return SimpleNamespace(**{**plain, "cache_dir": cache_dir and str(cache_dir), **changes})


@pytest.mark.parametrize(
    "option", [{"cache_dtype": "bfloat16"}, {"cache_dir": "states"}, {"clear_cache": True}]
)
def test_where_nothing_is_kept_there_is_none_and_an_option_for_it_is_one_line(option, tmp_path):
    store = Store(1, tmp_path / "rows")
    assert cache_folder(asked(cache=False), store) is None
    with pytest.raises(UserError, match=f"--cache false: nothing is kept, --{next(iter(option))} "):
        cache_folder(asked(cache=False, **option), store)
    assert not (tmp_path / "rows").exists()


def write(file: Path, size: int) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(size))


def test_it_is_the_one_that_is_named_or_that_of_prepared_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    store = Store(1, tmp_path / "rows")
    assert cache_folder(asked(), store) == tmp_path / "rows"
    assert cache_folder(asked("~/states"), store) == tmp_path / "states"
    assert (tmp_path / "states").is_dir()


def test_clearing_removes_what_was_computed_of_all_runs_and_nothing_else(tmp_path, capsys):
    write(tmp_path / "activations-01" / "states-00000.safetensors", 300_000)
    write(tmp_path / "activations-01" / ".states-00001.safetensors.7.tmp", 200_000)
    write(tmp_path / "activations-02" / "states-00000.safetensors", 1_000_000)
    write(tmp_path / "features-03", 500_000)
    for kept in ("examples-0123/rows.arrow", "activations.txt", "my-features-1/file"):
        write(tmp_path / kept, 4)
    cache_folder(asked(tmp_path, clear_cache=True), Store())
    assert (
        f"cleared 2.0 MB of what frozen layers have computed in {tmp_path}"
        in capsys.readouterr().out
    )
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"examples-0123/rows.arrow", "activations.txt", "my-features-1/file"}
    cache_folder(asked(tmp_path, clear_cache=True), Store())
    assert "cleared 0.0 MB" in capsys.readouterr().out


def test_nothing_is_removed_unasked(tmp_path):
    write(tmp_path / "activations-01" / "states-00000.safetensors", 3)
    cache_folder(asked(tmp_path), Store())
    assert (tmp_path / "activations-01" / "states-00000.safetensors").exists()


def test_one_that_cannot_be_made_is_one_line(tmp_path):
    write(tmp_path / "file", 1)
    with pytest.raises(
        UserError, match=f"^--cache_dir {tmp_path}/file/states: Not a directory; name"
    ):
        cache_folder(asked(tmp_path / "file" / "states"), Store())
