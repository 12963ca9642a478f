"""What a reader of the whole repository may rely on: its style, and its bundled examples."""

import ast
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "data_templates" / "examples"
# Written so that this line itself holds no such path.
MACHINE_PATH = re.compile(r"(?<![\w.~$}*-])/(?:home|root|tmp|work|Users)/\w")


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def undocumented(file: Path) -> list[str]:
    """The public names of a file, and the file itself, that have no docstring."""
    found = []

    def look(node, name: str) -> None:
        if ast.get_docstring(node) is None:
            found.append(f"{file.name}: {name}")
        for one in node.body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            inside = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(one, kinds) and inside and not one.name.startswith("_"):
                look(one, one.name)

    look(ast.parse(file.read_text(encoding="utf-8")), "the module")
    return found


def test_every_public_name_of_the_recipes_says_what_it_is():
    assert list(itertools.chain(*map(undocumented, (ROOT / "recipes").rglob("*.py")))) == []


def test_no_file_names_a_place_on_somebodys_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong here is known to git only")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 40
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").split("\n"), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


# The bundled examples


def rows_of(folder: Path, split: str) -> list[dict]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(row: dict) -> frozenset[str]:
    text = " ".join(value for name, value in row.items() if name != "label")
    return frozenset(re.findall(r"\w+", text.casefold()))


def folders() -> list[Path]:
    """Those with rows written one by one; test_word_problems.py is about the generated ones."""
    return sorted(
        one for one in EXAMPLES.iterdir() if one.is_dir() and not (one / "situations.yaml").exists()
    )


@pytest.mark.parametrize("folder", folders(), ids=lambda one: one.name)
def test_no_example_is_a_copy_of_another(folder):
    rows = rows_of(folder, "train") + rows_of(folder, "validation")
    bags = [words(row) for row in rows]
    assert all(bags)
    # Jaccard index of at least a half: |a & b| / |a | b|
    copies = [
        (rows[a], rows[b])
        for a, b in itertools.combinations(range(len(rows)), 2)
        if 2 * len(bags[a] & bags[b]) >= len(bags[a] | bags[b])
    ]
    assert copies == []


@pytest.mark.parametrize("folder", folders(), ids=lambda one: one.name)
@pytest.mark.parametrize(("split", "least"), [("train", 240), ("validation", 80)])
def test_the_examples_are_many_and_balanced(folder, split, least):
    rows = rows_of(folder, split)
    counts = Counter(row["label"] for row in rows)
    assert len(rows) >= least
    assert len(counts) >= 2
    assert max(counts.values()) - min(counts.values()) <= 0.05 * len(rows)
