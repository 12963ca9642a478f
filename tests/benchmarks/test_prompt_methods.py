"""The benchmark of what is trained through label words."""

import prompt_methods
from run_files import read_json, read_jsonl


def test_every_recipe_is_run_and_lora_on_the_rows_that_the_others_drew(start, tmp_path):
    words = ["--quick", "--methods", "soft_prompt", "model", "lora", "--regimes", "few"]
    words += ["--draws", 1, "--steps", 1, "--keep", tmp_path]
    result, shown = start(prompt_methods, *words)
    runs = result["tasks"]["movie_reviews"]
    assert runs.keys() == {"zero", "soft_prompt-few", "model-few", "lora-few"}
    assert runs["zero"]["trainable_parameters"] == 0
    assert runs["soft_prompt-few"]["trainable_parameters"] == 16 * 32
    assert runs["model-few"]["trainable_parameters"] > runs["lora-few"]["trainable_parameters"]
    rows = read_jsonl(tmp_path / "movie_reviews-lora-few" / "rows_0" / "train.jsonl")
    assert sorted(row["label"] for row in rows) == ["negative"] * 4 + ["positive"] * 4
    for method in ("soft_prompt", "model"):
        metrics = read_json(tmp_path / f"movie_reviews-{method}-few" / "metrics.json")
        assert metrics["train_rows"] == len(rows)
    assert "model through the cloze" in shown
    assert (tmp_path / "prompt_methods.png").read_bytes().startswith(b"\x89PNG")
