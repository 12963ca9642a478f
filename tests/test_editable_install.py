"""A copied recipe runs anywhere after `pip install -e .`, in a virtual environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from run_files import losses, read_json
from tiny_llama import save_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
MODEL_AND_ROWS = "--model_name_or_path model --max_train_samples 8 --max_eval_samples 2"


def files(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository, as far as an install reads it: this one is left as it is."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("recipes", "data_templates"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs the Python of a new virtual environment, which has this one's packages too."""
    folder = tmp_path_factory.mktemp("environment")
    venv = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", folder]
    subprocess.run(venv, check=True)
    executable = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    # `--system-site-packages` means those of the system, not those of the environment we run in.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([executable, "-c", ask], check=True, capture_output=True, text=True)
    Path(own.stdout.strip(), "running.pth").write_text("\n".join(paths) + "\n")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [executable, *argv], cwd=cwd, env=outside, capture_output=True, text=True
        )

    return run


@pytest.mark.slow
def test_a_copied_recipe_runs_where_recipelib_is_installed(checkout, python, tmp_path):
    save_tiny_llama(tmp_path / "model")
    shutil.copy(ROOT / "recipes" / "lora_sft.py", tmp_path / "my_sft.py")
    command = f"my_sft.py --template movie_reviews {MODEL_AND_ROWS} --max_steps 2 --output_dir out"

    missing = python(*command.split(), cwd=tmp_path)
    assert "No module named 'recipelib'" in missing.stderr

    before = files(checkout)
    install = "-m pip install --no-deps --no-build-isolation --no-index --disable-pip-version-check"
    installed = python(*install.split(), "-e", str(checkout), cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert all(".egg-info" in str(file) for file in files(checkout) - before)
    assert "*.egg-info/" in (ROOT / ".gitignore").read_text().splitlines()

    done = python(*command.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert (metrics["task"], metrics["train_rows"]) == ("movie_reviews", 8)
    assert len(losses(tmp_path / "out")) == 2

    # A recipe that was not copied, from Python.
    code = (
        "import lora_sft, recipelib.cli as cli; print(lora_sft.__file__, cli.__file__, sep='\\n')"
    )
    imported = python("-c", code, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    recipes = checkout.resolve() / "recipes"
    assert imported.stdout.split() == [
        str(recipes / "lora_sft.py"),
        str(recipes / "recipelib" / "cli.py"),
    ]
