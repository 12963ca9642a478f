"""recipes/notebook.ipynb runs from its first cell to its last, and is kept without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from launching import environment
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "recipes" / "notebook.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def test_the_notebook_is_valid_and_without_outputs(notebook):
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert codes
    for cell in codes:
        assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {}), cell.id
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # no one's own version


@pytest.mark.slow
def test_the_notebook_trains_and_answers(notebook, causal_model, tmp_path, monkeypatch):
    for name in ("recipes", "data_templates"):  # what it writes stays out of the repository
        (tmp_path / name).symlink_to(ROOT / name)
    few = {"model_name_or_path": str(causal_model), "max_train_samples": 4, "max_eval_samples": 4}
    (settings,) = [cell for cell in notebook.cells if cell.id == "settings"]
    settings.source += f"\nSETTINGS |= {few!r}"
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment()[name])
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    mistake = nbformat.v4.new_code_cell("arguments(lora_sft, templat='sst2')", id="mistake")
    mistake.metadata.tags = ["raises-exception"]
    notebook.cells.append(mistake)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = {cell.id: cell.outputs[-1] for cell in notebook.cells if cell.get("outputs")}
    run = tmp_path / "runs" / "notebook" / "lora"
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"'score': {metrics['score']}" in shown["scores"].data["text/plain"]
    assert "image/png" in shown["curves"].data
    answers = (run / "predictions_asked.jsonl").read_text().splitlines()
    assert (
        str([json.loads(line)["prediction"] for line in answers])
        in (shown["predict"].data["text/plain"])
    )
    line = "error: arguments: templat: unknown key; did you mean template?"
    assert shown["mistake"].traceback == [line]
    card = (run / "README.md").read_text()
    assert "accelerate launch recipes/lora_sft.py --template runs/notebook/my_reviews.yaml" in card
