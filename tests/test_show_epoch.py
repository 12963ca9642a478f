"""recipes/show_epoch.py: which rows each process sees, as a table."""

import argparse
import re
from collections import Counter

import pytest
import show_epoch

# What each option may be, beside 3 processes and 10 rows.
OPTIONS = {
    "num_processes": "2",
    "rows": "11",
    "epochs": "1",
    "per_device_train_batch_size": "3",
    "gradient_accumulation_steps": "2",
    "seed": "7",
    "streaming_files": "3",
    "train_sampling_strategy": "batch_rebalance",
    "dataloader_drop_last": "true",
}
GIVEN = ["--num_processes", "3", "--rows", "10"]


def shown(capsys, *words: str) -> str:
    show_epoch.main([*GIVEN, *words])
    return capsys.readouterr().out


def test_each_epoch_shows_all_rows_and_what_is_repeated_beside_torchs(capsys):
    out = shown(capsys)
    epochs = [re.split("^torch", text, flags=re.M) for text in re.split(r"epoch \d\n", out)[1:]]
    assert len(epochs) == 2
    for ours, torchs in epochs:
        for text in (ours, torchs):
            rows = re.findall(r"(?<= )(\d+)(\*?)(?=\s)", re.sub(r"(process|step) \d+", "", text))
            rows = rows[:-2]  # the counts below
            assert {int(row) for row, _ in rows} == set(range(10))
            assert sum(star == "*" for _, star in rows) == len(rows) - 10 == 2
            assert "  10 rows, 2 repeated" in text
    assert epochs[0][0] != epochs[1][0]


def test_a_stream_shows_every_pass(capsys):
    out = shown(capsys, "--streaming_files", "3", "--per_device_train_batch_size", "1")
    rows = re.findall(r"(?<= )\d+(?=\s)", re.sub(r"(process|step) \d+", "", out))[:-1]
    assert len(rows) == 3 * 7  # of two passes, in whole steps
    assert set(Counter(rows)) == {str(row) for row in range(10)}


def test_every_option_shows(capsys, monkeypatch):
    found = [shown(capsys), *(shown(capsys, f"--{name}", it) for name, it in OPTIONS.items())]
    assert len({*found}) == len(found)
    assert shown(capsys, "--dataloader_drop_last").endswith("  6 rows\n")

    def stop(parser, argv):
        assert {action.dest for action in parser._actions} == {"help", *OPTIONS}
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(StopIteration):
        show_epoch.main([])


def test_a_number_out_of_range_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        show_epoch.main(["--rows", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: --rows 0: must be 1 or more\n")
