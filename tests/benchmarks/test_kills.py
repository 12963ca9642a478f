"""The benchmark of kills, of runs that stand in for a recipe's."""

import json
import sys

import kills
import pytest
from measuring import RunFailed

# Takes four steps, keeps its sum in checkpoints and goes on from the last one. A forgetful one
# starts anew and does not notice.
STAND_IN = """
import json, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
folder, forgets = Path(sys.argv[1]), sys.argv[2] == "forgets"
folder.mkdir(exist_ok=True)
kept = sorted(folder.glob("checkpoint-*/trainer_state.json"))
total, first = (0, 0)
if kept:
    total, first = json.loads(kept[-1].read_text())
if kept and forgets:
    total = 0
for step in range(first, 4):
    time.sleep(0.1)
    total += step + 1
    place = folder / f"checkpoint-{step + 1}"
    place.mkdir()
    (place / "trainer_state.json").write_text(json.dumps([total, step + 1]))
save_file({"total": np.array([total], dtype=np.float32)}, folder / "model.safetensors")
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def start(how: str) -> tuple[dict, str]:
        script = str(tmp_path / "stand_in.py")
        command = property(lambda self: lambda: [sys.executable, script, str(self.folder), how])
        monkeypatch.setattr(kills.Run, "command", command)
        monkeypatch.setattr(kills, "make_inputs", lambda folder: {})
        monkeypatch.setattr(kills.random.Random, "uniform", lambda self, low, high: 0.7 * high)
        kills.main(["--quick", "--kinds", "one"])
        said = capsys.readouterr().out
        return json.loads(said.splitlines()[-1]), said

    return start


def test_what_was_killed_and_restarted_is_compared_and_counted(run):
    result, said = run("remembers")
    found = result["kinds"]["one"]
    assert found["largest_difference"] == 0
    assert found["stages"] == {"training": 2}
    assert "weights apart by at most" in said


def test_a_run_that_ends_with_other_weights_fails_the_benchmark(run):
    with pytest.raises(RunFailed, match=r"^one: killed while training, ended with weights"):
        run("forgets")
