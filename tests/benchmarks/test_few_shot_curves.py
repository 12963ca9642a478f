"""The benchmark of demonstrations."""

import few_shot_curves
import pytest
from run_files import read_json

from recipelib.runtime.errors import UserError


def test_every_number_of_shots_is_evaluated_once_and_kept(start, tmp_path):
    words = ["--keep", tmp_path, "--rows", 6, "--draws", 2, "--shots", 0, 2]
    result, shown = start(few_shot_curves, *words)
    for shots, draws in (("0", 1), ("2", 2)):
        run = result["tasks"]["movie_reviews"][shots]
        metrics = read_json(tmp_path / f"movie_reviews-{shots}" / "metrics.json")
        assert (metrics["shots"], metrics["draws"], run["rows"]) == (int(shots), draws, 6)
        assert run["uncalibrated"] == metrics["draw_scores"]
        assert len(run["calibrated"]) == draws
        assert 0.5 <= run["most_frequent_class"] <= 1
        (tmp_path / f"movie_reviews-{shots}" / "predictions.jsonl").unlink()
    assert (tmp_path / "few_shot_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "bundled reviews, 2 shots: uncalibrated 0." in shown
    assert "most frequent class" in shown
    assert start(few_shot_curves, *words)[0] == result
    assert not list(tmp_path.glob("*/predictions.jsonl"))  # nothing was evaluated again
    with pytest.raises(UserError, match=r"was run with other settings \(rows\)"):
        start(few_shot_curves, *words, "--rows", 7)
