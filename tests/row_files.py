"""Files of rows for tests, and what loading them gives."""

import csv
import json
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset

from recipelib.data.rows import load_rows
from recipelib.prompts.template import PromptTemplate
from recipelib.runtime.errors import UserError

SST2 = PromptTemplate.load("sst2")
ASK = {
    "name": "ask",
    "form": "generative",
    "prompt": "{{ question_text }}",
    "answer": " {{ gold }}",
}
ROWS = [
    {"sentence": "plain", "label": "1"},
    {"sentence": 'a "quoted", comma', "label": "0"},
    {"sentence": "two\nlines", "label": "1"},
    {"sentence": "a carriage\r\nreturn", "label": "0"},
    {"sentence": "separators\u2028\u2029\x85\x0b\x0c\x1c inside", "label": "1"},
    {"sentence": "日本語 🎬 ü", "label": "0"},
    {"sentence": "a\ttab", "label": "1"},
    {"sentence": "", "label": "0"},
]


def ask(**fields):
    return PromptTemplate({**ASK, **fields})


def dump(row):
    return json.dumps(row, ensure_ascii=False)


def write(path, rows):
    """The rows as a file in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        path.write_bytes("".join(dump(row) + "\n" for row in rows).encode())
    elif path.suffix == ".json":
        path.write_bytes(json.dumps(rows, ensure_ascii=False, indent=2).encode())
    elif path.suffix == ".parquet":
        datasets.disable_progress_bars()
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".tsv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_bytes("".join("\t".join(line) + "\n" for line in lines).encode())
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def numbered(count, **more):
    return [
        {"sentence": f"row {number}", "label": str(number % 2), **more} for number in range(count)
    ]


def load(path, template=SST2, **options):
    return load_rows(template, str(path), "train", **options)


def refusal(path, template=SST2, **options):
    """The text of the error that loading ends in, with the folder left out."""
    with pytest.raises(UserError) as error:
        load(path, template, **options)
    return str(error.value).replace(f"{path.parent}/", "")


def arguments(dataset=None, **given):
    """A recipe's arguments about rows."""
    defaults = {
        "train_split": None,
        "eval_split": None,
        "max_train_samples": None,
        "max_eval_samples": None,
        "skip_bad_rows": False,
        "encoding": None,
        "field": None,
    }
    return SimpleNamespace(dataset=dataset and str(dataset), **{**defaults, **given})
